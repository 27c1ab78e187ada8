// What is drawn: the heat map of attention, the ring of the cache over all steps, norms, times.

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function drawing(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const picture = (width, height, label, parts) =>
  drawing("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...parts);

// A canvas of columns x rows cells that fits its frame, sharp on every screen; returns its context and a cell's size.
function fitCanvas(canvas, columns, rows, widest, highest) {
  const scale = devicePixelRatio || 1;
  const width = canvas.parentElement.clientWidth;
  const w = Math.max(1, Math.floor(scale * Math.min(widest, width / columns)));
  const h = highest === undefined ? w : Math.max(1, Math.floor(scale * highest));
  canvas.width = columns * w;
  canvas.height = rows * h;
  const shown = Math.min(width, (columns * w) / scale);
  canvas.style.width = shown + "px";
  canvas.style.height = (highest === undefined ? (shown * rows) / columns : (rows * h) / scale) + "px";
  return { context: canvas.getContext("2d"), w, h, scale };
}

function cellUnder(event, columns, rows) {
  const box = event.currentTarget.getBoundingClientRect();
  return {
    column: clamp(Math.floor(((event.clientX - box.left) / box.width) * columns), 0, columns - 1),
    row: clamp(Math.floor(((event.clientY - box.top) / box.height) * rows), 0, rows - 1),
  };
}

// ---- attention ----

function drawHeat(weights) {
  const { context, w, scale } = fitCanvas($("heat"), T, T, 26);
  const [cold, hot] = [rgb(colour("--panel")), rgb(colour("--heat"))];
  const image = new ImageData(T, T);
  for (let row = 0; row < T; row++) {
    for (let column = 0; column <= row; column++) {
      const share = Math.sqrt(weightAt(weights, state.head, row, column)); // so that small weights show
      const at = 4 * (row * T + column);
      for (let i = 0; i < 3; i++) image.data[at + i] = cold[i] + share * (hot[i] - cold[i]);
      image.data[at + 3] = 255;
    }
  }
  const small = document.createElement("canvas");
  small.width = small.height = T;
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, T * w, T * w);
  drawWindow(context, w, scale);
  context.strokeStyle = colour("--mark");
  context.lineWidth = 2 * scale;
  context.strokeRect(0, state.position * w, (state.position + 1) * w, w);
}

// All heads as small pictures on one canvas, a row for each layer. It is drawn once for each size and theme, layer by
// layer; `markHead` frames the one that is open, over a copy.
const glance = document.createElement("canvas");
let glances = 0;

async function drawGlance() {
  const mine = ++glances;
  const { w } = fitCanvas($("heads"), heads, layers, 44);
  glance.width = heads * w;
  glance.height = layers * w;
  const context = glance.getContext("2d");
  const side = Math.max(1, w - Math.ceil(w / 20)); // the rest is a gap
  for (let layer = 0; layer < layers; layer++) {
    const weights = unpacked.get(layer) ?? (await unpack(data.attention[layer], Uint8Array));
    if (mine !== glances) return; // another size or theme was faster
    for (let head = 0; head < heads; head++) {
      context.putImageData(smallPicture(weights, head, side), head * w, layer * w);
    }
    markHead();
  }
}

// One head in side x side pixels: each is the largest weight under it, so that a line of single weights stays.
function smallPicture(weights, head, side) {
  const [cold, hot] = [rgb(colour("--page")), rgb(colour("--heat"))];
  const largest = new Float32Array(side * side);
  const cells = Math.max(1, Math.ceil(side / T)); // pixels of one weight, if there are more than weights
  const first = Int32Array.from({ length: T }, (_, i) => (i * side) / T); // rounded down
  for (let row = 0; row < T; row++) {
    for (let column = 0; column <= row; column++) {
      const weight = weightAt(weights, head, row, column);
      for (let y = first[row]; y < Math.min(side, first[row] + cells); y++) {
        for (let x = first[column]; x < Math.min(side, first[column] + cells); x++) {
          largest[y * side + x] = Math.max(largest[y * side + x], weight);
        }
      }
    }
  }
  const image = new ImageData(side, side);
  largest.forEach((weight, at) => {
    const share = Math.sqrt(weight);
    for (let i = 0; i < 3; i++) image.data[4 * at + i] = cold[i] + share * (hot[i] - cold[i]);
    image.data[4 * at + 3] = 255;
  });
  return image;
}

function markHead() {
  const canvas = $("heads");
  const context = canvas.getContext("2d");
  const w = canvas.width / heads;
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(glance, 0, 0);
  const line = 2 * (devicePixelRatio || 1);
  context.strokeStyle = colour("--mark");
  context.lineWidth = line;
  context.strokeRect(state.head * w + line / 2, state.layer * w + line / 2, w - line, w - line);
}

// Hatching over what a query at row t cannot reach: keys up to t - W; and the edge of the future.
function drawWindow(context, w, scale) {
  const hatch = document.createElement("canvas");
  hatch.width = hatch.height = 6 * scale;
  const lines = hatch.getContext("2d");
  lines.strokeStyle = colour("--line");
  lines.lineWidth = 1.5 * scale;
  lines.moveTo(0, 6 * scale);
  lines.lineTo(6 * scale, 0);
  lines.stroke();
  context.fillStyle = context.createPattern(hatch, "repeat");
  context.strokeStyle = colour("--line");
  context.lineWidth = scale;
  context.beginPath();
  for (let row = 0; row < T; row++) {
    if (reach !== null && row >= reach) {
      const hidden = (row - reach + 1) * w;
      context.fillRect(0, row * w, hidden, w);
      context.moveTo(hidden, row * w);
      context.lineTo(hidden, (row + 1) * w);
      context.moveTo(hidden - w, row * w);
      context.lineTo(hidden, row * w);
    }
    context.moveTo((row + 1) * w, (row + 1) * w);
    context.lineTo((row + 1) * w, row * w);
    context.lineTo(row * w, row * w);
  }
  context.stroke();
}

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

// ---- cache ----

function drawRing(current) {
  const rows = data.steps.length;
  const { context, w, h, scale } = fitCanvas($("ring"), data.slots, rows, 30, clamp(440 / rows, 1, 18));
  const gap = Math.min(w, h) > 4 * scale ? scale : 0;
  const colours = ["--page", "--held", "--written", "--evicting"].map(colour);
  tables.forEach((table, row) => {
    const written = new Map(data.steps[row].writes.map(([slot, _, evicted]) => [slot, evicted]));
    table.forEach((position, slot) => {
      const kind = written.has(slot) ? (written.get(slot) < 0 ? 2 : 3) : position < 0 ? 0 : 1;
      context.fillStyle = colours[kind];
      context.fillRect(slot * w, row * h, w - gap, h - gap);
      if (position >= 0 && w >= 20 * scale && h >= 11 * scale) {
        context.fillStyle = colour(kind === 1 ? "--ink" : "--panel");
        context.font = `${10 * scale}px sans-serif`;
        context.textAlign = "center";
        context.textBaseline = "middle";
        context.fillText(position, (slot + 0.5) * w, (row + 0.5) * h);
      }
    });
  });
  context.strokeStyle = colour("--mark");
  context.lineWidth = 2 * scale;
  context.strokeRect(scale, current * h, data.slots * w - 2 * scale, h);
}

// ---- hidden states ----

function showNorms() {
  const values = (first, count) => Array.from({ length: count }, (_, i) => normAt(first + i, state.position));
  const series = [
    { colour: "--heat", first: 0, values: values(0, layers + 1) },
    { colour: "--attention", first: 1, values: values(layers + 1, layers) },
    { colour: "--mlp", first: 1, values: values(2 * layers + 1, layers) },
  ];
  const all = series.flatMap((line) => line.values).map(Math.log10);
  const [low, high] = [Math.floor(Math.min(...all)), Math.ceil(Math.max(...all) + 1e-6)];
  const [width, height] = [$("chart").clientWidth, 250];
  const x = (i) => 42 + (i * (width - 58)) / layers;
  const y = (value) => 12 + ((high - Math.log10(value)) * (height - 48)) / (high - low);
  const parts = normAxes(x, y, low, high, width, height);
  for (const line of series) {
    const points = line.values.map((value, i) => [x(i + line.first), y(value), value]);
    const path = points.map(([px, py]) => `${px.toFixed(1)},${py.toFixed(1)}`).join(" ");
    parts.push(drawing("polyline", { points: path, fill: "none", stroke: `var(${line.colour})`, "stroke-width": 2 }));
    for (const [px, py, value] of points) {
      const title = drawing("title", {}, value.toPrecision(3));
      parts.push(drawing("circle", { cx: px, cy: py, r: 3.5, fill: `var(${line.colour})` }, title));
    }
  }
  $("chart").replaceChildren(picture(width, height, `norms of position ${state.position}`, parts));
}

function normAxes(x, y, low, high, width, height) {
  const parts = [];
  for (let power = low; power <= high; power++) {
    const at = y(10 ** power);
    parts.push(drawing("line", { x1: 42, x2: width - 8, y1: at, y2: at, stroke: "var(--line)" }));
    parts.push(drawing("text", { x: 36, y: at + 4, "text-anchor": "end" }, String(10 ** power)));
  }
  const every = Math.ceil((layers * 26) / (width - 58)); // labels that do not touch
  for (let i = 0; i <= layers; i += every) {
    const label = i === 0 ? "emb" : String(i - 1);
    parts.push(drawing("text", { x: x(i), y: height - 18, "text-anchor": "middle" }, label));
  }
  parts.push(drawing("text", { x: x(layers), y: height - 3, "text-anchor": "end" }, "block"));
  return parts;
}

// ---- time ----

const milliseconds = (ms) => (ms >= 100 ? ms.toFixed(0) : ms >= 10 ? ms.toFixed(1) : ms.toFixed(2)) + " ms";

function showTime() {
  const current = stepOf(state.position);
  const step = data.steps[current];
  const [width, height] = [$("steps").clientWidth, 110];
  const wide = Math.min(24, (width - 2) / data.steps.length);
  const longest = Math.max(...data.steps.map(total), 1e-9);
  const bars = data.steps.map((step, i) => {
    const high = Math.max(2, (total(step) / longest) * (height - 20));
    const fill = i === current ? "--mark" : step.end - step.start > 1 ? "--heat" : "--held";
    const box = { x: i * wide, y: height - high, width: Math.max(wide - 1.5, wide * 0.6), height: high, rx: 1 };
    const title = drawing("title", {}, `step ${i + 1}, ${span(step)}: ${milliseconds(total(step))}`);
    const bar = drawing("rect", { ...box, fill: `var(${fill})` }, title);
    bar.addEventListener("click", () => select(step.end - 1));
    return bar;
  });
  bars.push(drawing("text", { x: 0, y: 11 }, `a bar for each step; the longest: ${milliseconds(longest)}`));
  $("steps").replaceChildren(picture(width, height, "time of each step", bars));
  $("took").textContent = `Step ${current + 1}, ${span(step)}: ${milliseconds(total(step))}`;
  const most = Math.max(...step.times);
  showBars(
    $("parts"),
    data.parts.map((part, i) => ({ label: part, share: step.times[i] / most, value: milliseconds(step.times[i]) })),
  );
}

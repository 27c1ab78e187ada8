// The panels of text: tokens, what comes next, what a token looks at, the logit lens, the slots of the cache.

const $ = (id) => document.getElementById(id);
const clamp = (n, least, most) => Math.min(Math.max(n, least), most);

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

function percent(p) {
  if (p >= 0.9995) return "100%";
  return p < 0.0005 ? "< 0.1%" : (100 * p).toFixed(1) + "%";
}

// Rows of label, bar and value: {label, token, share, value, mark, position}; a row with a position leads there.
function showBars(into, rows) {
  into.replaceChildren(
    ...rows.map((row) => {
      const label = element(
        row.position === undefined ? "span" : "button",
        "label" + (row.token ? " token" : ""),
        row.label,
      );
      label.title = row.label;
      if (row.position !== undefined) label.onclick = () => select(row.position);
      const fill = element("div", "fill");
      fill.style.width = 100 * clamp(row.share, 0, 1) + "%";
      return element(
        "div",
        "row" + (row.mark ? " mark" : ""),
        label,
        element("div", "track", fill),
        element("span", "value", row.value),
      );
    }),
  );
}

// Scrolls a box of its own, and not the page, to one of its children.
function keepVisible(box, child) {
  const above = child.offsetTop - box.offsetTop;
  if (above < box.scrollTop || above + child.offsetHeight > box.scrollTop + box.clientHeight) {
    box.scrollTop = above - box.clientHeight / 2;
  }
}

// ---- tokens ----

function makeTokens() {
  $("strip").replaceChildren(
    ...data.tokens.map((id, position) => {
      const button = element("button", "token", text(id));
      button.type = "button";
      button.dataset.position = position;
      button.classList.toggle("generated", position >= data.prompt);
      button.classList.toggle("control", data.control.includes(id));
      button.onclick = () => select(position);
      return button;
    }),
  );
}

function showTokens(weights) {
  [...$("strip").children].forEach((button, position) => {
    const chosen = position === state.position;
    button.setAttribute("aria-pressed", chosen);
    button.tabIndex = chosen ? 0 : -1;
    let shade = position > 0 ? surpriseAt(position) : 0;
    let said = position > 0 ? `surprise: the model gave it ${percent(1 - shade)}` : "the first token";
    if (state.shade === "attention") {
      shade = position <= state.position ? weightAt(weights, state.head, state.position, position) : 0;
      said = `attention: ${percent(shade)}`;
    }
    button.style.setProperty("--p", state.shade === "attention" ? Math.sqrt(shade) : shade);
    button.title = `position ${position}, id ${data.tokens[position]}; ${said}`;
  });
  keepVisible($("strip"), $("strip").children[state.position]);
  const origin = state.position < data.prompt ? "given" : "generated";
  $("here").replaceChildren(
    element("strong", "token", tokenAt(state.position)),
    ` · position ${state.position} of 0 to ${T - 1} · ${origin} · id ${data.tokens[state.position]}`,
  );
  $("back").disabled = state.position === 0;
  $("forth").disabled = state.position === T - 1;
}

// ---- what comes next ----

function showNext() {
  const came = data.tokens[state.position + 1];
  const rows = [];
  for (let rank = 0; rank < data.top; rank++) {
    const { id, p } = lensAt(layers, state.position, rank);
    rows.push({ label: text(id), token: true, share: p, value: percent(p), mark: id === came });
  }
  if (came !== undefined && !rows.some((row) => row.mark)) {
    const p = following[layers * T + state.position] / 65535;
    rows.push({ label: text(came), token: true, share: p, value: percent(p), mark: true });
  }
  showBars($("candidates"), rows);
  const note = came === undefined ? "The text ends here." : "Marked: the token that came.";
  $("candidates").append(element("p", "legend", note));
}

// ---- attention ----

function showAttention(weights) {
  $("layer").value = state.layer;
  $("head").value = state.head;
  const groups = data.model.groups;
  $("shared").textContent = groups > 1 ? `reads key/value head ${Math.floor(state.head / groups)}` : "";
  markHead();
  drawHeat(weights);
  const seen = [];
  for (let column = 0; column <= state.position; column++) {
    seen.push({ position: column, p: weightAt(weights, state.head, state.position, column) });
  }
  seen.sort((a, b) => b.p - a.p || b.position - a.position);
  $("looks").replaceChildren(element("span", "token", tokenAt(state.position)), " looks most at");
  showBars(
    $("seen"),
    seen
      .slice(0, 6)
      .filter(({ p }) => p > 0)
      .map(({ position, p }) => ({
        label: `${position} ${tokenAt(position)}`,
        token: true,
        share: p,
        value: percent(p),
        position,
      })),
  );
}

// ---- logit lens ----

function showLens() {
  const width = $("lens").clientWidth - 130; // what the names of the layers leave
  const columns = clamp(Math.floor(width / (width < 400 ? 68 : 112)), 1, Math.min(9, T));
  const first = clamp(state.position - Math.floor(columns / 2), 0, T - columns);
  const positions = Array.from({ length: columns }, (_, i) => first + i);
  const corner = element("th", "", "layer");
  const header = element("tr", "", corner, ...positions.map((position) => lensHeader(position)));
  const rows = Array.from({ length: layers + 1 }, (_, layer) => {
    const name = layer === 0 ? "embedding" : layer === layers ? "output" : `block ${layer - 1}`;
    const label = element("th", "", name);
    label.scope = "row";
    return element("tr", "", label, ...positions.map((position) => lensCell(layer, position)));
  });
  $("grid").replaceChildren(element("thead", "", header), element("tbody", "", ...rows));
}

function lensHeader(position) {
  const header = element(
    "th",
    position === state.position ? "chosen" : "",
    `${position} `,
    element("span", "token", tokenAt(position)),
  );
  header.scope = "col";
  header.onclick = () => select(position);
  return header;
}

function lensCell(layer, position) {
  const best = lensAt(layer, position, 0);
  const cell = element("td", "token", text(best.id));
  cell.classList.toggle("chosen", position === state.position);
  cell.classList.toggle("came", best.id === data.tokens[position + 1]);
  cell.style.setProperty("--p", best.p);
  const all = Array.from({ length: data.top }, (_, rank) => lensAt(layer, position, rank));
  cell.title = all.map(({ id, p }) => `${text(id)}  ${percent(p)}`).join("\n");
  cell.onclick = () => select(position);
  return cell;
}

// ---- cache ----

function showCache() {
  const current = stepOf(state.position);
  drawRing(current);
  const step = data.steps[current];
  const write = step.writes.find((write) => write[1] === state.position);
  $("told").textContent =
    `Step ${current + 1} of ${data.steps.length} read ${span(step)}. ${fate(step, write)} ${rolling()}`;
  $("after").textContent = `Slots after step ${current + 1}`;
  const written = new Map(step.writes.map(([slot, _, evicted]) => [slot, evicted]));
  const boxes = Array.from(tables[current], (position, slot) => slotBox(slot, position, written.get(slot)));
  $("slots").replaceChildren(...boxes);
  if (write) keepVisible($("slots"), boxes[write[0]]);
  showExample(state.position);
}

// Why there are as many slots as there are.
function slotCount() {
  if (reach === null || data.slots < reach) return "There are as many as this run can need.";
  if (data.slots === reach) return "There are as many as the window is long.";
  return `There are ${data.slots - reach} more than the window is long, for tokens that are rolled back.`;
}

// The division that leads a position to its slot.
function showExample(position) {
  const [times, slot] = [Math.floor(position / data.slots), position % data.slots];
  $("example").replaceChildren(
    `Position ${position}, `,
    element("span", "token", tokenAt(position)),
    `: ${position} = ${times} \u00d7 ${data.slots} + ${slot}, so slot ${slot}.`,
  );
}

// A slot and what it holds; `evicted` is undefined where the step did not write it.
function slotBox(slot, position, evicted) {
  const number = element("span", "number", position < 0 ? `${slot}: -` : `${slot}: ${position}`);
  const kind = evicted === undefined ? "" : evicted < 0 ? "w" : "e";
  const box = element("div", kind, number, element("span", "token", position < 0 ? "" : tokenAt(position)));
  box.classList.toggle("chosen", position === state.position);
  const before = kind === "e" ? `, before: ${evicted}` : "";
  if (position >= 0) box.onpointerenter = () => showExample(position);
  box.title = position < 0 ? `slot ${slot}, empty` : `slot ${slot}, position ${position}${before}`;
  return box;
}

function fate(step, write) {
  const p = state.position;
  if (!write)
    return `Position ${p} is not kept: a later position of the same step takes its slot, number ${p % data.slots}.`;
  const [slot, , evicted] = write;
  if (evicted < 0) return `Position ${p} went to slot ${slot}, which was empty.`;
  return `Position ${p} went to slot ${slot}, where position ${evicted} was. It is evicted: no later token sees it.`;
}

function rolling() {
  if (reach === null) return "This model has no window, so nothing is ever evicted.";
  if (T > data.slots) return "";
  return `Nothing is evicted: ${T} tokens fit into the window of ${reach}. A smaller --window shows the cache roll.`;
}

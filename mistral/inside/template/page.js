// What is selected, and what changes it. Every change draws every panel anew.

const state = { position: data.prompt - 1, ...data.opens, shade: "surprise" };

let asked = 0;
async function show() {
  const mine = ++asked;
  showNext();
  showLens();
  showCache();
  showNorms();
  showTime();
  const weights = await attentionOf(state.layer);
  if (mine !== asked) return; // a later click was faster
  showTokens(weights);
  showAttention(weights);
  document.body.dataset.shown = [state.position, state.layer, state.head].join(" ");
}

function change(what) {
  Object.assign(state, what);
  return show().catch(fail);
}

function select(position) {
  const focused = $("strip").contains(document.activeElement);
  const ready = change({ position: clamp(position, 0, T - 1) });
  if (focused) ready.then(() => $("strip").children[state.position].focus({ preventScroll: true }));
}

function fail(error) {
  $("failed").hidden = false;
  $("failed").textContent = `This page could not be drawn: ${error}. It needs a browser of 2023 or later.`;
}

function listen() {
  $("back").onclick = () => select(state.position - 1);
  $("forth").onclick = () => select(state.position + 1);
  $("shade").onchange = () => change({ shade: $("shade").value });
  $("layer").onchange = () => change({ layer: Number($("layer").value) });
  $("head").onchange = () => change({ head: Number($("head").value) });
  $("heat").onclick = (event) => select(cellUnder(event, T, T).row);
  $("heat").onpointermove = (event) => {
    const { row, column } = cellUnder(event, T, T);
    const weights = unpacked.get(state.layer);
    const hidden = column > row || (reach !== null && column <= row - reach);
    const says = hidden || !weights ? "out of sight" : percent(weightAt(weights, state.head, row, column));
    $("heat").title = `${row} ${tokenAt(row)} looks at ${column} ${tokenAt(column)}: ${says}`;
  };
  $("heads").onclick = (event) => {
    const { row, column } = cellUnder(event, heads, layers);
    change({ layer: row, head: column });
  };
  $("heads").onpointermove = (event) => {
    const { row, column } = cellUnder(event, heads, layers);
    $("heads").title = `layer ${row}, head ${column}`;
  };
  $("ring").onpointermove = (event) => {
    const { row, column } = cellUnder(event, data.slots, data.steps.length);
    const held = tables[row][column];
    showExample(held < 0 ? state.position : held);
  };
  for (const id of ["ring", "slots"]) $(id).onpointerleave = () => showExample(state.position);
  $("ring").onclick = (event) => {
    const { row, column } = cellUnder(event, data.slots, data.steps.length);
    const step = data.steps[row],
      held = tables[row][column];
    select(held >= step.start ? held : step.end - 1);
  };
  document.addEventListener("keydown", moveByKey);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAgain);
  let width = document.documentElement.clientWidth;
  new ResizeObserver(() => {
    if (width === document.documentElement.clientWidth) return;
    width = document.documentElement.clientWidth;
    drawAgain();
  }).observe(document.documentElement);
}

function drawAgain() {
  drawGlance().catch(fail);
  change({});
}

function moveByKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest?.("select")) return;
  const moves = { ArrowLeft: state.position - 1, ArrowRight: state.position + 1 };
  if ($("strip").contains(event.target)) Object.assign(moves, { Home: 0, End: T - 1 });
  if (!(event.key in moves)) return;
  event.preventDefault();
  select(moves[event.key]);
}

async function start() {
  const { model } = data;
  $("name").textContent = model.name;
  const millions = model.parameters / 1e6;
  const size = millions >= 1000 ? (millions / 1000).toFixed(2) + " billion" : millions.toFixed(1) + " million";
  const facts = [
    `${size} parameters`,
    `${layers} layers`,
    `${heads} query heads`,
    `${heads / model.groups} key/value heads`,
  ];
  facts.push(reach === null ? "no window" : `a window of ${reach.toLocaleString("en")}`, model.where);
  $("greedy").hidden = !data.greedy;
  $("facts").textContent = `${facts.join(", ")}. ${data.prompt} tokens were given, ${T - data.prompt} generated.`;
  const least =
    data.least > 1 ? `, those below ${percent((data.least - 0.5) / 255)} left out to keep the page small` : "";
  $("rounding").textContent = `Weights are rounded to 1/255${least}.`;
  $("opens").textContent =
    `The page opens on layer ${data.opens.layer}, head ${data.opens.head}: of all heads it is the least like one that ` +
    "looks at the first token, at all tokens alike, or always as far back.";
  document.querySelectorAll(".modulus").forEach((span) => (span.textContent = data.slots));
  $("why").textContent = slotCount();
  $("layer").replaceChildren(...Array.from({ length: layers }, (_, i) => new Option(i, i)));
  $("head").replaceChildren(...Array.from({ length: heads }, (_, i) => new Option(i, i)));
  await unpackTables();
  makeTokens();
  listen();
  await show();
  await drawGlance();
}

start().catch(fail);

// The run, live: slots, tokens, and forward passes. While the panel is closed nothing of it is asked for.

import * as api from "./api.js";
import { $, button, el, kilo } from "./dom.js";
import { read, write } from "./kept.js";
import { emit, noted, on, state } from "./state.js";
import { Passes } from "./passes.js";
import { slotOf } from "./slots.js";
import * as store from "./store.js";
import { Tokens } from "./tokens.js";
import { pathTo } from "./tree.js";

const AGAIN = 3000; // ms
let asking = null; // the AbortController of the stream of slots
let parts = null;
let drawn = false; // a frame is asked for
let recalled = null; // the conversation whose kept answers are in state.details

export function begin() {
  $("run-toggle").onclick = () => set(!state.panel);
  on("node", soon);
  on("conversation", soon);
  on("shown", soon);
  on("conversation", () => noted(recall()));
  on("about", () => state.panel && (listen(), draw()));
  if (read("panel", false) && !matchMedia("(max-width: 800px)").matches) set(true);
}

function set(isOpen) {
  state.panel = isOpen;
  write("panel", isOpen);
  $("run").hidden = !isOpen;
  $("run-toggle").setAttribute("aria-pressed", String(isOpen));
  document.body.classList.toggle("with-run", isOpen);
  asking?.abort();
  asking = null;
  if (isOpen) {
    build();
    listen();
    draw();
    noted(recall());
  } else {
    $("run").replaceChildren();
    parts = null;
    $("run-toggle").focus();
  }
  emit("panel");
}

function build() {
  const close = button("close", "Close", () => set(false));
  parts = {
    slots: el("div", { className: "slots" }),
    turn: el("p", { className: "soft" }),
    told: el("p", { className: "soft" }),
    tokens: new Tokens(),
    passes: new Passes(),
  };
  const legend = (...keys) => el("p", { className: "legend" }, ...keys.map(([name, text]) => el("span", {}, el("i", { className: `key ${name}` }), text)));
  $("run").replaceChildren(
    el("div", { className: "bar" }, el("h2", { textContent: "The run, live" }), close),
    el("section", {}, el("h3", { textContent: "Tokens" }), parts.told, parts.tokens.element, parts.tokens.legend()),
    el("section", {}, el("h3", { textContent: "Forward passes" }), parts.passes.element, parts.passes.legend()),
    el("section", {}, el("h3", { textContent: "Slots of the cache" }), parts.turn, parts.slots, legend(["reused", "reused"], ["prompt", "prompt"], ["generated", "generated"], ["rolled", "rolled over"], ["kept", "kept for the next"])),
  );
}

function soon() {
  if (!state.panel || drawn) return;
  drawn = true;
  requestAnimationFrame(() => {
    drawn = false;
    draw();
  });
}

// What the browser keeps of answers that were recorded before the page was loaded.
async function recall() {
  const id = state.conversation?.id;
  if (!state.panel || !id || id === recalled) return;
  recalled = id;
  for (const { id: answer, ...details } of await store.detailsOf(id)) if (!state.details.has(answer)) state.details.set(answer, details);
  emit("shown");
}

// The answer that was chosen, or the last one of the branch that was recorded.
function draw() {
  if (!parts) return;
  const recorded = pathTo(state.nodes, state.head).filter(({ id }) => state.details.has(id));
  const node = recorded.find(({ id }) => id === state.shown) ?? recorded.at(-1);
  const details = node && state.details.get(node.id);
  parts.tokens.show(node?.id ?? null, details);
  parts.passes.show(node?.id ?? null, details);
  parts.told.textContent = details ? windowLine(details) : `Ask something: answers are recorded while this panel is open. The browser keeps the last ${store.MOST_RECORDED}, of up to ${kilo(store.MOST_TOKENS)} tokens.`;
}

function windowLine({ prompt, tokens, end }) {
  const count = (prompt?.tokens.length ?? 0) + tokens.length;
  const window = end?.window ?? state.about?.window;
  const cached = prompt?.cached ? `${kilo(prompt.cached)} of the prompt's tokens were in the slot already. ` : "";
  if (!window) return `${cached}${kilo(count)} tokens, no window: all are seen.`;
  const rolled = Math.max(0, count - window);
  const out = rolled ? `; ${kilo(rolled)} ${rolled === 1 ? "has" : "have"} rolled out` : "";
  return `${cached}${kilo(count)} tokens, of which the next one sees the last ${kilo(Math.min(count, window))} (window ${kilo(window)})${out}.`;
}

async function listen() {
  if (asking || !state.about) return;
  const mine = new AbortController();
  asking = mine;
  while (!mine.signal.aborted) {
    try {
      for await (const facts of api.run(mine.signal)) if (!mine.signal.aborted) showSlots(facts);
    } catch (error) {
      if (mine.signal.aborted) return;
      if (error.status === 404) {
        parts.slots.replaceChildren(el("p", { className: "soft", textContent: "This server does not tell about its slots." }));
        return;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, AGAIN));
  }
}

function showSlots({ slots, waiting, turn }) {
  if (!parts) return;
  parts.slots.replaceChildren(...slots.map(slotOf));
  const queue = waiting ? `${kilo(waiting)} ${waiting === 1 ? "request waits" : "requests wait"} for a slot. ` : "";
  parts.turn.textContent = turn ? `${queue}Last forward pass: ${turn.ms.toFixed(1)} ms, ${turn.kind}, ${turn.rows} ${turn.rows === 1 ? "row" : "rows"}, ${kilo(turn.tokens)} ${turn.tokens === 1 ? "token" : "tokens"}.` : queue;
}

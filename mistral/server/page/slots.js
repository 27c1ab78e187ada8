// One row of the cache as a strip of cells. A cell stands for equally many slots.

import { el, kilo } from "./dom.js";

const CELLS = 64;

export function slotOf({ id, state, held_tokens: held, capacity, prompt_tokens: prompt = 0, cached_tokens: cached = 0 }) {
  const count = Math.min(capacity, CELLS);
  const cells = Array.from({ length: count }, (_, i) => {
    const position = positionIn(Math.floor(((i + 0.5) * capacity) / count), held, capacity);
    return el("i", { className: kindOf(position, state, capacity, cached, prompt) });
  });
  const facts = held > capacity ? `the last ${kilo(capacity)} of ${kilo(held)}` : `${kilo(held)} of ${kilo(capacity)}`;
  const strip = el("div", { className: "strip", role: "img", "aria-label": `slot ${id}: ${state}, ${facts}` }, ...cells);
  return el("div", { className: "slot" }, el("div", { className: "bar" }, el("strong", { textContent: `slot ${id}` }), el("span", { textContent: state }), el("span", { className: "count", textContent: facts })), strip);
}

// Position p is in slot p mod capacity: the last of them that was written. -1: the slot is empty.
function positionIn(slot, held, capacity) {
  if (held <= capacity) return slot < held ? slot : -1;
  const last = held - 1;
  return last - ((((last - slot) % capacity) + capacity) % capacity);
}

function kindOf(position, state, capacity, cached, prompt) {
  if (position < 0) return "";
  if (state === "free") return "kept";
  if (position >= capacity) return "rolled"; // written again, over an older position
  if (position < cached) return "reused";
  return position < prompt ? "prompt" : "generated";
}

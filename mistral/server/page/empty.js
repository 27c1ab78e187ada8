// The page before the first message: what it is, and questions to begin with.

import { ask } from "./answer.js";
import { el } from "./dom.js";
import { noted, state } from "./state.js";
import { known } from "./tools.js";

const QUESTIONS = [
  ["Explain", "How does a rolling cache with a sliding window work? Explain it with a small example."],
  ["Write", "Write a Python function that checks whether brackets in a text are balanced, with tests."],
  ["Compare", "Compare RMSNorm and LayerNorm in a short table."],
];

export function empty() {
  const { about } = state;
  const [tool] = known();
  const questions = tool ? [...QUESTIONS.slice(0, 2), ["Use a tool", `What can you do with the tool ${tool.name}? Try it.`]] : QUESTIONS;
  const cards = questions.map(([title, text]) => {
    const made = el("button", { type: "button", className: "card", onclick: () => noted(ask(text)) });
    made.append(el("strong", { textContent: title }), el("span", { textContent: text }));
    return made;
  });
  const ring = el("span", { className: "ring big", "aria-hidden": "true" });
  const title = el("h1", { textContent: about ? about.name : "Mistral" });
  const says = el("p", { textContent: "Everything stays on the machine that runs the model." });
  return el("div", { className: "empty" }, ring, title, says, el("div", { className: "cards" }, ...cards));
}

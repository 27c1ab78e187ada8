// The page before the first message: what it is, and questions to begin with.

import { ask } from "./answer.js";
import { el } from "./dom.js";
import { noted, state } from "./state.js";
import { known } from "./tools.js";

const MOST = 3;
const SMALL = 1e9; // parameters; a smaller model has little to say about what is hard
const QUESTIONS = [
  ["Explain", "How does a rolling cache with a sliding window work? Explain it with a small example."],
  ["Write", "Write a Python function that checks whether brackets in a text are balanced, with tests."],
  ["Compare", "Compare RMSNorm and LayerNorm in a short table."],
];
const SIMPLE_QUESTIONS = [
  ["Explain", "Why is the sky blue? Explain it in three sentences."],
  ["Write", "Write a short story about a lighthouse."],
  ["List", "List five things to take along on a hike."],
];

// General ones, and those that the server proposes for its model.
function questions({ questions: own = [], parameters }) {
  const general = parameters && parameters < SMALL ? SIMPLE_QUESTIONS : QUESTIONS;
  const [tool] = known();
  if (!own.length && tool) own = [["Use a tool", `What can you do with the tool ${tool.name}? Try it.`]];
  return [...general.slice(0, Math.max(MOST - own.length, 0)), ...own].slice(0, MOST);
}

export function empty() {
  const { about } = state;
  const cards = questions(about ?? {}).map(([title, text]) => {
    const made = el("button", { type: "button", className: "card", onclick: () => noted(ask(text)) });
    made.append(el("strong", { textContent: title }), el("span", { textContent: text }));
    return made;
  });
  const ring = el("span", { className: "ring big", "aria-hidden": "true" });
  const title = el("h1", { textContent: about ? about.name : "Mistral" });
  const says = el("p", { textContent: "Everything stays on the machine that runs the model." });
  return el("div", { className: "empty" }, ring, title, says, el("div", { className: "cards" }, ...cards));
}

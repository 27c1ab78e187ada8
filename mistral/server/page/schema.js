// JSON mode: answers that follow a schema, which is written here.

import { $, dialog, el } from "./dom.js";
import { change, on, state } from "./state.js";

const object = (properties) => ({ type: "object", properties, required: Object.keys(properties) });
const EXAMPLES = {
  "Any object": "",
  Person: object({ name: { type: "string" }, age: { type: "integer", minimum: 0 }, email: { type: "string" } }),
  Verdict: object({ sentiment: { enum: ["positive", "neutral", "negative"] }, reason: { type: "string" } }),
  List: object({ items: { type: "array", items: object({ title: { type: "string" }, priority: { type: "integer" } }), minItems: 1 } }),
};

export function begin() {
  $("json").onclick = open;
  on("settings", chip);
  chip();
}

function chip() {
  $("json").setAttribute("aria-pressed", String(state.settings.json));
  $("json").classList.toggle("on", state.settings.json);
  $("json").title = state.settings.json ? "Answers are JSON" : "Let answers be JSON that follows a schema";
}

// What is wrong with a schema as text; null: nothing. The server says what a grammar cannot express.
export function problemOf(text) {
  if (!text.trim()) return null;
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    return `This is not valid JSON: ${error.message}`;
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) return "A schema is a JSON object.";
  return null;
}

function open() {
  const area = el("textarea", { className: "code", rows: 14, spellcheck: false, value: state.settings.schema, "aria-label": "JSON schema", placeholder: "Empty: any JSON object" });
  const problem = el("p", { className: "problem", role: "status" });
  const isOn = el("input", { type: "checkbox", checked: state.settings.json });
  const check = () => {
    problem.textContent = problemOf(area.value) ?? "";
    area.setAttribute("aria-invalid", String(problem.textContent !== ""));
    isOn.disabled = problem.textContent !== "";
    // A schema that cannot be read is not sent: the mode is off until it can be.
    if (isOn.disabled) change({ json: false });
    else change({ json: isOn.checked, schema: area.value });
  };
  area.oninput = check;
  isOn.onchange = check;
  area.onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) shown.close();
  };
  const examples = Object.entries(EXAMPLES).map(([name, schema]) => {
    const use = () => {
      area.value = schema && JSON.stringify(schema, null, 2);
      isOn.disabled = false;
      isOn.checked = true;
      check();
      area.focus();
    };
    return el("button", { type: "button", className: "chip", textContent: name, onclick: use });
  });
  const says = el("p", { className: "soft", textContent: "A grammar holds each answer to the schema, and the model reads it before the first message." });
  const shown = dialog("JSON answers", el("label", { className: "switch" }, isOn, "Answers are JSON"), says, el("div", { className: "examples" }, ...examples), area, problem);
  shown.classList.add("large");
  area.focus();
}

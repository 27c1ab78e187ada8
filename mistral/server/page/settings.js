// Settings: the system prompt, sampling, stop strings, tools. Fields have the names of the server's API.

import { apiKey, write } from "./kept.js";
import { $, dialog, el, icon, kilo } from "./dom.js";
import { change, emit, noted, on, state, TEMPERATURE } from "./state.js";
import * as store from "./store.js";
import { keyOf, known, permit } from "./tools.js";

// name: [lowest, highest, step, what it does]
export const FIELDS = {
  temperature: [0, 5, 0.1, "0: always the most probable token"],
  top_p: [0, 1, 0.01, "keep the most probable tokens up to this sum"],
  top_k: [0, 1000, 1, "keep so many tokens; 0: all"],
  min_p: [0, 1, 0.01, "keep tokens with this share of the best one"],
  repetition_penalty: [0.1, 3, 0.05, "over 1: fewer repetitions"],
  frequency_penalty: [-2, 2, 0.1, "by how often a token was generated"],
  presence_penalty: [-2, 2, 0.1, "for each token that was generated"],
  seed: [0, 4294967295, 1, "the same seed: the same answer"],
  max_tokens: [1, 1000000, 1, "of an answer; empty: what there is room for"],
};
const NEUTRAL = { top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1, frequency_penalty: 0, presence_penalty: 0 };

export function begin() {
  for (const [id, name] of [["settings", "settings"], ["run-toggle", "run"]]) $(id).append(icon(name));
  $("settings").onclick = open;
  $("tools").onclick = openTools;
  on("settings", tools);
  on("about", tools);
  theme();
}

function open() {
  dialog("Settings", systemField(), samplingFields(), stopField(), keyField()).classList.add("large");
}

function systemField() {
  const area = el("textarea", { rows: 4, value: state.conversation ? state.conversation.system : state.newSystem, placeholder: "You are a helpful assistant.", id: "system-prompt" });
  area.oninput = () => {
    if (!state.conversation) state.newSystem = area.value;
    else {
      state.conversation.system = area.value;
      noted(store.putConversation(state.conversation.id, { system: area.value }));
      emit("conversation");
    }
  };
  return group("System prompt", "Of this conversation: the model reads it before the first message.", area);
}

function group(title, says, ...children) {
  return el("section", { className: "group" }, el("h3", { textContent: title }), el("p", { className: "soft", textContent: says }), ...children);
}

function samplingFields() {
  const fields = Object.entries(FIELDS).map(([name, [min, max, step, says]]) => {
    const standard = name === "temperature" ? TEMPERATURE : state.about?.sampling?.[name] ?? NEUTRAL[name];
    const input = el("input", { type: "number", min, max, step: "any", value: state.settings.sampling[name] ?? "", placeholder: standard ?? "", id: `field-${name}`, inputMode: "decimal" });
    input.oninput = () => {
      const value = input.value === "" ? null : Number(input.value);
      const isFit = value === null || (input.checkValidity() && (step !== 1 || Number.isInteger(value)));
      input.setAttribute("aria-invalid", String(!isFit));
      if (isFit && !input.validity.badInput) keep(name, value);
    };
    input.title = `${min} to ${kilo(max)}${step === 1 ? ", a whole number" : ""}`;
    return el("label", { className: "field" }, el("code", { textContent: name }), input, el("span", { className: "soft", textContent: says }));
  });
  const resets = el("button", { type: "button", className: "quiet", textContent: "Reset all", onclick: () => reset(fields) });
  return group("Sampling", "Empty fields have the values that are shown in grey.", el("div", { className: "fields" }, ...fields), resets);
}

function keep(name, value) {
  const sampling = { ...state.settings.sampling };
  if (value === null) delete sampling[name];
  else sampling[name] = value;
  change({ sampling });
}

function reset(fields) {
  change({ sampling: {} });
  for (const field of fields) {
    const input = field.querySelector("input");
    input.value = "";
    input.removeAttribute("aria-invalid");
  }
}

function stopField() {
  const area = el("textarea", { rows: 2, value: state.settings.stop, id: "field-stop", "aria-label": "stop" });
  area.oninput = () => change({ stop: area.value });
  return group("stop", "An answer ends before one of these strings. One a line; \\n is a newline.", area);
}

function keyField() {
  if (!state.about?.needs_key && !apiKey()) return null;
  const input = el("input", { type: "password", value: apiKey(), autocomplete: "off", "aria-label": "API key" });
  input.onchange = () => (apiKey(input.value), emit("reload"));
  return group("API key", "Kept until this tab is closed.", input);
}

// The tools: which the model is told about, and which may run without a question.

function tools() {
  const all = known();
  const used = all.filter((tool) => !state.settings.off.includes(tool.name));
  $("tools").hidden = !all.length;
  $("tools").textContent = `Tools ${used.length}`;
  $("tools").classList.toggle("on", used.length > 0 && !state.settings.json);
  $("tools").title = state.settings.json ? "In JSON mode the model calls no tools" : "Which tools the model may call";
}

function openTools() {
  const rows = known().map((tool) => {
    const isOn = el("input", { type: "checkbox", checked: !state.settings.off.includes(tool.name), "aria-label": `Offer ${tool.name}` });
    isOn.onchange = () => change({ off: isOn.checked ? state.settings.off.filter((name) => name !== tool.name) : [...state.settings.off, tool.name] });
    const choices = [["", "ask each time"], ["always", "always run"], ["never", "never run"]];
    const may = el("select", { "aria-label": `May ${tool.name} run?` }, ...choices.map(([value, text]) => el("option", { value, textContent: text })));
    may.value = state.settings.allowed[keyOf(tool)] ?? "";
    may.onchange = () => permit(tool, may.value || null);
    const says = el("div", {}, el("code", { textContent: tool.name }), el("p", { className: "soft", textContent: tool.description ?? "" }), el("p", { className: "soft", textContent: tool.source ? `from ${tool.source}` : "" }));
    return el("li", {}, el("label", { className: "hit" }, isOn), says, may);
  });
  const says = "They run on the machine of the server, each call after you allowed it.";
  dialog("Tools", el("p", { className: "soft", textContent: says }), el("ul", { className: "tools" }, ...rows)).classList.add("large");
}

// Colours: those of the system, light, dark.

function theme() {
  const names = ["auto", "light", "dark"];
  const labels = { auto: "Colours: as the system", light: "Colours: light", dark: "Colours: dark" };
  let at = names.indexOf(document.documentElement.dataset.theme ?? "auto");
  const show = () => {
    $("theme").replaceChildren(icon(names[at]));
    $("theme").setAttribute("aria-label", labels[names[at]]);
    $("theme").title = labels[names[at]];
  };
  $("theme").onclick = () => {
    at = (at + 1) % names.length;
    if (names[at] === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = names[at];
    write("theme", names[at]);
    show();
  };
  show();
}

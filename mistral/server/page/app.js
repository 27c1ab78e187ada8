// The page starts here: what the server is, which conversation is open, and what is said when the server is gone.

import * as api from "./api.js";
import * as composer from "./composer.js";
import * as conversations from "./conversations.js";
import { $, button, dialog, el, focusBox, icon, kilo } from "./dom.js";
import { apiKey } from "./kept.js";
import * as messages from "./messages.js";
import * as run from "./run.js";
import * as schema from "./schema.js";
import * as settings from "./settings.js";
import { emit, on, state } from "./state.js";
import * as store from "./store.js";

const AGAIN = 2000; // ms between two questions to a server that does not answer

async function start() {
  $("sidebar-open").append(icon("menu"));
  $("sidebar-close").append(icon("close"));
  $("help").append(icon("help"));
  $("sidebar-open").onclick = toggleSidebar;
  $("sidebar-close").onclick = conversations.hideSidebar;
  $("shade").onclick = conversations.hideSidebar;
  $("help").onclick = help;
  on("note", (text) => banner(text, true));
  on("unreachable", meet);
  on("reload", meet);
  // The server may have been started anew, with another model or other tools.
  document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && meet());
  const isKept = await store.open();
  messages.begin();
  composer.begin();
  settings.begin();
  schema.begin();
  run.begin();
  await conversations.begin();
  if (!isKept) banner("This browser does not keep conversations: they last as long as the page.", true);
  const wanted = location.hash.slice(1);
  if (wanted) await conversations.open(wanted);
  else messages.draw();
  await meet();
  focusBox();
  document.body.dataset.ready = "yes";
}

// A wide screen hides the list and shows it again; on a narrow one it covers the messages.
function toggleSidebar() {
  if (matchMedia("(max-width: 800px)").matches) conversations.showSidebar();
  else document.body.classList.toggle("without-sidebar");
}

let meeting = false;

// Ask the server what it is, again and again until it answers.
async function meet(error = null) {
  if (error) banner(error.message);
  if (meeting) return;
  meeting = true;
  for (;;) {
    try {
      state.about = await api.about();
      noServerBanner();
      break;
    } catch (problem) {
      if (problem.status === 404) {
        noServerBanner(); // an older server: chat works, and what needs this page's routes is hidden
        break;
      }
      if (problem.status === 401) {
        banner("The server wants an API key.");
        await askKey();
        continue;
      }
      const isLoading = problem.status === 503;
      banner(isLoading ? `${capital(problem.message)}.` : `${problem.message} It is asked again every ${AGAIN / 1000} seconds.`);
      await new Promise((resolve) => setTimeout(resolve, AGAIN));
    }
  }
  meeting = false;
  modelLine();
  emit("about");
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function askKey() {
  return new Promise((resolve) => {
    const input = el("input", { type: "password", autocomplete: "off", "aria-label": "API key" });
    const done = () => shown.close();
    input.onkeydown = (event) => event.key === "Enter" && done();
    const says = el("p", { className: "soft", textContent: "The server was started with --api-key. The key is kept until this tab is closed." });
    const goes = el("button", { type: "button", className: "primary", textContent: "Continue", onclick: done });
    const shown = dialog("API key", says, input, el("div", { className: "choices" }, goes));
    shown.addEventListener("close", () => (apiKey(input.value), resolve()));
    input.focus();
  });
}

function banner(text, mayClose = false) {
  $("banner").hidden = !text;
  $("banner").dataset.about = mayClose ? "note" : "server";
  $("banner").replaceChildren(...(text ? [icon("warn"), el("span", { textContent: text })] : []));
  if (mayClose) $("banner").append(button("close", "Close", () => banner(null)));
}

// What was said of the server holds no more; a note stays.
function noServerBanner() {
  if ($("banner").dataset.about === "server") banner(null);
}

function modelLine() {
  const { about } = state;
  if (!about) return;
  const facts = [about.format, about.engine, about.quantization, about.window ? `window ${kilo(about.window)}` : "no window"];
  const rest = [];
  if (about.parameters) rest.push(`${(about.parameters / 1e9).toPrecision(3)} billion parameters`);
  if (about.bytes) rest.push(`${(about.bytes / 1e9).toPrecision(3)} GB`);
  if (about.slots) rest.push(`${about.slots} slots of ${kilo(about.limit)} tokens`);
  const name = el("strong", { textContent: about.name });
  const list = el("span", { className: "model-facts" }, ...facts.filter(Boolean).map((fact) => el("span", { textContent: fact })));
  $("model").replaceChildren(name, list);
  $("model").title = [about.name, ...facts.filter(Boolean), ...rest].join(" · ");
  $("hint").textContent = about.parameters && about.parameters < 1e9 ? "A small model: it is often wrong." : "A model may be wrong. Check what matters.";
}

function help() {
  const keys = [
    ["Enter", "send"],
    ["Shift + Enter", "new line"],
    ["Esc", "stop the answer"],
    ["↑ in an empty box", "edit the last question"],
    ["Ctrl + K", "search conversations, or begin a new one"],
    ["Ctrl + Shift + O", "new chat"],
    ["/", "to the message box"],
  ];
  const rows = keys.map(([key, does]) => el("tr", {}, el("th", { scope: "row" }, el("kbd", { textContent: key })), el("td", { textContent: does })));
  const says = "An edited question and another answer are branches: ‹ 1 / 2 › leads from one to the other. Export writes JSON lines that scripts/chat.py --load reads: it continues the branch that is shown; the page reads all of them.";
  dialog("Keyboard and help", el("table", { className: "keys" }, el("tbody", {}, ...rows)), el("p", { className: "soft", textContent: says }));
}

start().catch((error) => {
  banner(`The page could not start: ${error.message}. It needs a browser of 2024 or later.`);
  throw error;
});

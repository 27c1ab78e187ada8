// The list of conversations: open, search, rename, remove, export, import; and what other tabs change.

import { draw, noteInterrupted, scrollToEnd } from "./messages.js";
import { $, button, confirmed, dialog, download, el, focusBox, icon, say } from "./dom.js";
import { emit, noted, on, state } from "./state.js";
import { stop } from "./answer.js";
import * as store from "./store.js";
import { leafOf } from "./tree.js";
import { find } from "./tools.js";
import { conversationOf, fileName, linesOf } from "./transfer.js";

const MOST_FOUND = 50;

export function begin() {
  $("new-chat").prepend(icon("plus"));
  $("search").prepend(icon("search"));
  $("search").append(el("kbd", { textContent: "Ctrl K" }));
  $("import").prepend(icon("download"));
  $("new-chat").onclick = () => fresh();
  $("search").onclick = () => noted(search());
  $("export").onclick = exportShown;
  $("import").onclick = () => $("import-file").click();
  $("import-file").onchange = importFiles;
  on("list", () => noted(list()));
  on("conversation", () => noted(list()));
  store.onChange((change) => noted(changedElsewhere(change)));
  return list();
}

export function fresh() {
  stop();
  Object.assign(state, { conversation: null, nodes: new Map(), head: null, newSystem: "" });
  history.replaceState(null, "", location.pathname);
  emit("conversation");
  hideSidebar();
  focusBox();
}

export async function open(id) {
  if (state.conversation?.id === id && state.writing) return hideSidebar();
  const conversation = await store.conversation(id);
  if (!conversation) return fresh();
  stop();
  const nodes = new Map((await store.nodesOf(id)).map((node) => [node.id, node]));
  const head = nodes.has(conversation.head) ? conversation.head : leafOf(nodes, null);
  Object.assign(state, { conversation, nodes, head });
  history.replaceState(null, "", `#${id}`);
  emit("conversation");
  noteInterrupted();
  hideSidebar();
  scrollToEnd();
  focusBox();
}

export function showSidebar() {
  document.body.classList.add("with-sidebar");
  $("shade").hidden = false;
  $("new-chat").focus();
}

export function hideSidebar() {
  document.body.classList.remove("with-sidebar");
  $("shade").hidden = true;
}

const DAY = 86_400_000;
function ageOf(updated) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (updated >= midnight) return "Today";
  if (updated >= midnight - DAY) return "Yesterday";
  return updated >= midnight - 7 * DAY ? "Last 7 days" : "Earlier";
}

async function list() {
  const groups = new Map();
  for (const conversation of await store.conversations()) {
    const age = ageOf(conversation.updated);
    if (!groups.has(age)) groups.set(age, []);
    groups.get(age).push(entry(conversation));
  }
  const parts = [...groups].map(([age, entries]) => el("section", {}, el("h2", { textContent: age }), el("ul", {}, ...entries)));
  if (!parts.length) parts.push(el("p", { className: "soft", textContent: "Conversations are kept in this browser." }));
  const focused = $("conversations").contains(document.activeElement) ? document.activeElement.dataset.id : null;
  $("conversations").replaceChildren(...parts);
  if (focused) $("conversations").querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus();
  document.title = state.conversation ? `${state.conversation.title} · Mistral` : "Mistral";
}

function entry(conversation) {
  const { id, title } = conversation;
  const opens = el("button", { type: "button", className: "title", textContent: title, title, dataset: { id }, onclick: () => noted(open(id)) });
  if (id === state.conversation?.id) opens.setAttribute("aria-current", "true");
  const renames = button("edit", `Rename ${title}`, () => rename(conversation));
  const removes = button("trash", `Delete ${title}`, () => noted(removeAsked(conversation)));
  return el("li", {}, opens, renames, removes);
}

function rename(conversation) {
  const input = el("input", { value: conversation.title, "aria-label": "Title", maxLength: 200 });
  const save = async () => {
    const title = input.value.trim();
    if (title) await store.putConversation(conversation.id, { title });
    if (title && state.conversation?.id === conversation.id) state.conversation.title = title;
    shown.close();
    emit("list");
  };
  input.onkeydown = (event) => event.key === "Enter" && noted(save());
  const saves = el("button", { type: "button", className: "primary", textContent: "Rename", onclick: () => noted(save()) });
  const shown = dialog("Rename the conversation", input, el("div", { className: "choices" }, saves));
  input.select();
}

async function removeAsked({ id, title }) {
  if (!(await confirmed(`Delete “${title}”?`, "Delete"))) return;
  if (state.conversation?.id === id) stop();
  await store.remove(id);
  if (state.conversation?.id === id) fresh();
  emit("list");
  say("Deleted");
}

function excerptOf(text, word) {
  const start = Math.max(text.toLowerCase().indexOf(word) - 20, 0);
  return `${start ? "…" : ""}${text.slice(start, start + 80)}`.replace(/\s+/g, " ");
}

// Ctrl+K: a field, and below it the titles that fit, then the texts; the first entry begins a new conversation.
export async function search() {
  if (document.querySelector("dialog")) return;
  const all = await store.conversations();
  const input = el("input", { type: "search", placeholder: "Search conversations", "aria-label": "Search conversations", role: "combobox", "aria-expanded": "true", "aria-controls": "found" });
  const found = el("div", { id: "found", role: "listbox", "aria-label": "Conversations" });
  const shown = dialog("Search", input, found);
  shown.classList.add("search");
  let at = 0;
  let nodes = null; // of all conversations, once something is searched for
  const mark = () => {
    [...found.children].forEach((option, i) => option.setAttribute("aria-selected", String(i === at)));
    found.children[at]?.scrollIntoView({ block: "nearest" });
  };
  const refresh = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const isFit = (text) => words.every((word) => text.toLowerCase().includes(word));
    const fits = all.filter(({ title }) => isFit(title)).slice(0, MOST_FOUND);
    for (const conversation of words.length ? all : []) {
      if (fits.length >= MOST_FOUND) break;
      const node = !fits.includes(conversation) && nodes?.get(conversation.id)?.find(({ message }) => isFit(message.content));
      if (node) fits.push({ ...conversation, excerpt: excerptOf(node.message.content, words[0]) });
    }
    if (words.length && !nodes) {
      nodes = new Map(); // until they are read
      noted(store.everything().then((read) => ((nodes = read), refresh())));
    }
    const options = [{ title: "New chat", id: null }, ...fits].map(({ title, id, excerpt }) => {
      const go = () => (shown.close(), id ? noted(open(id)) : fresh());
      return el("div", { role: "option", className: "option", onclick: go }, title, excerpt && el("span", { className: "soft", textContent: excerpt }));
    });
    found.replaceChildren(...options);
    at = words.length && fits.length ? 1 : 0;
    mark();
  };
  input.oninput = refresh;
  input.onkeydown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) (event.preventDefault(), (at = Math.min(Math.max(at + step, 0), found.children.length - 1)), mark());
    if (event.key === "Enter") (event.preventDefault(), found.children[at]?.click());
  };
  refresh();
  input.focus();
}

function exportShown() {
  if (!state.conversation) return emit("note", "There is nothing to export yet.");
  const lines = linesOf(state.conversation, state.nodes, state.head, state.about);
  download(fileName(state.conversation.title), lines, "application/jsonl");
}

async function importFiles() {
  const files = [...$("import-file").files];
  $("import-file").value = "";
  for (const file of files) {
    try {
      const { conversation, nodes, tools } = conversationOf(await file.text(), file.name);
      await store.putNodes(nodes);
      await store.putConversation(conversation.id, conversation);
      await open(conversation.id);
      const missing = tools.filter((name) => !find(name));
      if (missing.length) emit("note", `${file.name} was saved with tools that this server does not have: ${missing.join(", ")}`);
    } catch (error) {
      emit("note", error.message);
    }
  }
  emit("list");
}

// Another tab has written: its messages are branches here, its answers grow here too.
async function changedElsewhere({ conversation: id, gone }) {
  emit("list");
  if (id !== state.conversation?.id) return;
  if (gone) return fresh();
  const fromStore = await store.nodesOf(id);
  if (id !== state.conversation?.id) return;
  for (const node of fromStore) merge(node);
  draw();
}

function merge(node) {
  const known = state.nodes.get(node.id);
  const isFinal = known && !["writing", "interrupted"].includes(known.status);
  if (!isFinal && !state.mine.has(node.id)) state.nodes.set(node.id, node);
}

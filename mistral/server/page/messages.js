// The conversation on the screen: one article a message, changed in place while an answer grows.

import { answer, ask, moveHead, reword } from "./answer.js";
import { $, button, copy, el, focusBox, icon, kilo, say } from "./dom.js";
import { empty } from "./empty.js";
import { lookInside } from "./inside.js";
import { codeOf, show } from "./markdown.js";
import { emit, noted, on, state } from "./state.js";
import * as store from "./store.js";
import { leafOf, pathTo, resultsOf, siblingsOf } from "./tree.js";
import { cardOf } from "./calls.js";

const articles = new Map(); // id of a message -> its article
const waiting = new Set(); // messages that are drawn at the next frame
let editing = null; // id of the message that is being edited

export function begin() {
  on("conversation", draw);
  on("busy", draw);
  on("asked", draw);
  on("panel", draw);
  on("shown", draw);
  on("about", draw);
  on("node", drawSoon);
  $("scroll").addEventListener("scroll", () => ($("to-end").hidden = isAtEnd()), { passive: true });
  $("to-end").append(icon("down"));
  $("to-end").onclick = () => scrollToEnd("smooth");
  setInterval(() => state.nodes.size && noteInterrupted(), 2000);
}

const isAtEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 80;

export function scrollToEnd(behavior = "instant") {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  $("scroll").scrollTo({ top: $("scroll").scrollHeight, behavior: calm ? "instant" : behavior });
}

// A long text takes long to draw: the next frame waits as many times that.
let rest = 0;
function drawSoon(node) {
  if (!waiting.size) setTimeout(() => requestAnimationFrame(drawWaiting), rest);
  waiting.add(node.id);
}

function drawWaiting() {
  const start = performance.now();
  const follow = isAtEnd();
  const path = pathTo(state.nodes, state.head);
  for (const id of waiting) {
    const place = path.findIndex((node) => node.id === id);
    if (place < 0) continue;
    if (path[place].message.role === "tool") fill(path, ownerOf(path, place));
    else fill(path, place);
  }
  waiting.clear();
  if (follow) scrollToEnd();
  rest = Math.min(3 * (performance.now() - start), 2000);
}

function ownerOf(path, place) {
  while (path[place].message.role === "tool") place--;
  return place;
}

export function draw() {
  const follow = isAtEnd();
  const path = pathTo(state.nodes, state.head);
  const shown = path.filter((node) => node.message.role !== "tool");
  for (const [id, article] of articles) {
    if (shown.some((node) => node.id === id)) continue;
    article.remove();
    articles.delete(id);
  }
  document.body.classList.toggle("blank", !shown.length);
  if (!shown.length) {
    $("messages").replaceChildren(empty());
    return;
  }
  const wanted = [systemOf(), ...shown.map((node) => articleOf(node)), endOf(path)].filter(Boolean);
  // What stays in its place is not touched: it may have the focus or a selection.
  wanted.forEach((element, place) => {
    const there = $("messages").children[place];
    if (there !== element) $("messages").insertBefore(element, there ?? null);
  });
  while ($("messages").children.length > wanted.length) $("messages").lastElementChild.remove();
  path.forEach((node, place) => node.message.role !== "tool" && fill(path, place));
  if (follow) scrollToEnd();
}

function systemOf() {
  const text = state.conversation?.system;
  if (!text) return null;
  const known = $("messages").querySelector(":scope > .system");
  if (known?.text === text) return known;
  const made = el("details", { className: "system" }, el("summary", { textContent: "System prompt" }), el("p", { textContent: text }));
  made.text = text;
  return made;
}

function articleOf(node) {
  if (!articles.has(node.id)) {
    const isUser = node.message.role === "user";
    const label = isUser ? "Question" : "Answer";
    articles.set(node.id, el("article", { className: isUser ? "question" : "answer", "aria-label": label, tabIndex: -1 }));
  }
  return articles.get(node.id);
}

// What is missing at the end: a question or a result without an answer.
function endOf(path) {
  const last = path[path.length - 1];
  if (state.writing || last.message.role === "assistant" || last.status === "writing") return null;
  return el("div", { className: "notice" }, el("span", { textContent: "There is no answer yet." }), button("retry", "Answer", () => noted(answer(last.id)), "Answer"));
}

function fill(path, place) {
  const node = path[place];
  if (node.message.role === "user") fillQuestion(node);
  else fillAnswer(node, resultsOf(path, place), place + 1 + resultsOf(path, place).length === path.length);
}

function fillQuestion(node) {
  const article = articleOf(node);
  const isEdited = editing === node.id;
  const key = JSON.stringify([isEdited, branchKey(node), Boolean(state.writing)]);
  if (article.key === key) return;
  article.key = key;
  if (isEdited) return article.replaceChildren(editorOf(node));
  const { content } = node.message;
  const long = content.length > 4000;
  const bubble = el("div", { className: "bubble", dir: "auto" }, long ? `${content.slice(0, 4000)}…` : content);
  if (long) {
    const more = el("button", { type: "button", className: "quiet", textContent: `Show all ${kilo(content.length)} characters` });
    more.onclick = () => bubble.replaceChildren(content);
    bubble.append(el("div", {}, more));
  }
  const copies = button("copy", "Copy", () => copy(content, copies));
  const edits = button("edit", "Edit", () => edit(node.id));
  edits.disabled = Boolean(state.writing);
  article.replaceChildren(bubble, el("div", { className: "actions" }, branches(node), copies, edits));
}

export function edit(id) {
  editing = id;
  draw();
  const area = articles.get(id)?.querySelector("textarea");
  area?.focus();
  area?.setSelectionRange(area.value.length, area.value.length);
}

function editorOf(node) {
  const isUser = node.message.role === "user";
  const area = el("textarea", { value: node.message.content, "aria-label": isUser ? "Edit the question" : "Edit the answer", rows: 2 });
  const close = () => {
    editing = null;
    draw();
    focusBox();
  };
  const send = () => {
    const text = area.value;
    if (!text.trim() || state.writing) return;
    close();
    noted(isUser ? ask(text, node.parent) : reword(node, text));
  };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) (event.preventDefault(), send());
    if (event.key === "Escape") (event.stopPropagation(), close());
  });
  const sends = el("button", { type: "button", className: "primary", textContent: `${isUser ? "Send" : "Keep"} as a new branch`, onclick: send });
  const cancels = el("button", { type: "button", textContent: "Cancel", onclick: close });
  return el("div", { className: "editor" }, area, el("div", { className: "choices" }, cancels, sends));
}

function branchKey(node) {
  return siblingsOf(state.nodes, node).map((sibling) => sibling.id);
}

function branches(node) {
  const all = siblingsOf(state.nodes, node);
  if (all.length < 2) return null;
  const place = all.indexOf(node);
  const go = (step) => {
    const { id } = all[place + step];
    noted(moveHead(leafOf(state.nodes, id)));
    articles.get(id).querySelector(".branches button:enabled").focus();
  };
  const before = button("left", "Branch before", () => go(-1));
  const after = button("right", "Next branch", () => go(1));
  before.disabled = place === 0 || Boolean(state.writing);
  after.disabled = place === all.length - 1 || Boolean(state.writing);
  return el("span", { className: "branches" }, before, el("span", { textContent: `${place + 1} / ${all.length}` }), after);
}

function fillAnswer(node, results, isLast) {
  const article = articleOf(node);
  if (editing === node.id) {
    if (!article.querySelector(".editor")) article.replaceChildren(editorOf(node));
    return Object.assign(article, { prose: null, text: null, afterKey: null, cards: null });
  }
  if (!article.prose) {
    article.prose = el("div", { className: "prose" });
    article.calls = el("div", { className: "calls" });
    article.after = el("div", { className: "after" });
    article.replaceChildren(article.prose, article.calls, article.after);
  }
  const { content, tool_calls: calls = [] } = node.message;
  if (article.text !== content) showText(article, node, content);
  article.text = content;
  const isWriting = node.status === "writing" && !isInterrupted(node);
  const isOurs = state.writing !== null && isLast;
  article.classList.toggle("writing", isWriting || isOurs);
  article.classList.toggle("pending", (isWriting || isOurs) && !content && !calls.length);
  article.setAttribute("aria-busy", String(isWriting));
  article.calls.replaceWith((article.calls = el("div", { className: "calls" }, ...callCards(node, calls, results, isOurs, article))));
  fillAfter(article, node, isWriting, isLast);
}

function callCards(node, calls, results, isTurn, article) {
  const kept = article.cards ?? new Map();
  article.cards = new Map();
  return calls.map((call, i) => {
    const card = cardOf(call, results[i], node.status === "writing", isTurn, kept.get(i));
    article.cards.set(i, card);
    return card;
  });
}

function showText(article, node, content) {
  if (!node.info.json) return show(article.prose, content);
  article.prose.replaceChildren(content ? codeOf(content, "json") : "");
}

const WHY = { length: "The answer was cut off at its limit of tokens.", content_filter: "The answer was filtered." };

function fillAfter(article, node, isWriting, isLast) {
  const key = JSON.stringify([node.status, node.error, node.info.usage, isLast, isWriting, branchKey(node), Boolean(state.writing), state.about?.inside, isRecorded(node), state.shown]);
  if (article.afterKey === key) return;
  article.afterKey = key;
  const retry = () => {
    focusBox(); // this button goes
    noted(answer(node.parent));
  };
  const problem = problemOf(node, isWriting);
  const notice = problem && el("div", { className: `notice ${node.status}`, role: node.status === "failed" ? "alert" : null });
  notice?.append(icon("warn"), el("span", { textContent: problem }));
  if (notice && !state.writing) notice.append(button("retry", "Retry", retry, "Retry"));
  const copies = button("copy", "Copy", () => copy(node.message.content, copies));
  const edits = node.message.tool_calls ? null : button("edit", "Edit", () => edit(node.id));
  const retries = button("retry", "Another answer", retry);
  for (const one of [edits, retries]) if (one) one.disabled = Boolean(state.writing);
  const insides = state.about?.inside && !node.info.isEdited ? button("inside", "Look inside this answer", () => lookInside(node, insides)) : null;
  const runs = isRecorded(node) ? button("run", "The run of this answer", () => ((state.shown = node.id), emit("shown"))) : null;
  runs?.setAttribute("aria-pressed", String(state.shown === node.id));
  const actions = el("div", { className: "actions" }, branches(node), copies, edits, retries, insides, runs, el("span", { className: "facts", textContent: factsOf(node.info) }));
  article.after.replaceChildren(...[notice, isWriting ? null : actions].filter(Boolean));
}

// The panel is open, and has something to show of this answer.
const isRecorded = (node) => state.panel && state.details.has(node.id);

function problemOf(node, isWriting) {
  if (node.status === "failed") return node.error;
  if (node.status === "stopped") return "Stopped.";
  if (node.status === "interrupted" || (node.status === "writing" && !isWriting)) return "Interrupted: the page was left in the middle of the answer.";
  return WHY[node.info.finish] ?? null;
}

function factsOf({ usage, timings, first, seconds, isEdited }) {
  const facts = isEdited ? ["edited"] : [];
  const tokens = usage?.completion_tokens;
  const speed = timings?.predicted_per_second ?? (tokens > 1 && seconds > first ? (tokens - 1) / (seconds - first) : null);
  if (speed) facts.push(`${speed >= 100 ? Math.round(speed) : speed.toFixed(1)} tokens/s`);
  if (first !== undefined) facts.push(`first token after ${first < 10 ? first.toFixed(2) : first.toFixed(1)} s`);
  if (tokens) facts.push(`${kilo(tokens)} ${tokens === 1 ? "token" : "tokens"}`);
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (cached) facts.push(`${kilo(cached)} of ${kilo(usage.prompt_tokens)} prompt tokens reused`);
  return facts.join(" · ");
}

const isInterrupted = (node) => !state.mine.has(node.id) && store.isInterrupted(node);

// An answer whose writer is gone: another tab was closed, or this one was reloaded.
export function noteInterrupted() {
  for (const node of state.nodes.values()) {
    if (!isInterrupted(node)) continue;
    node.status = "interrupted";
    if (node.message.role === "tool") node.message.content = JSON.stringify({ error: "The call was interrupted." });
    else delete node.message.tool_calls;
    draw();
    say("The answer was interrupted");
  }
}

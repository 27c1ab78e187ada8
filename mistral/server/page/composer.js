// The box for messages, and the keys of the page.

import { ask, stop } from "./answer.js";
import { $, el, icon, kilo } from "./dom.js";
import { fresh, hideSidebar, search } from "./conversations.js";
import { edit, scrollToEnd } from "./messages.js";
import { noted, on, state } from "./state.js";
import { pathTo } from "./tree.js";

const text = $("composer-text");
const TOUCH = matchMedia("(pointer: coarse)");

export function begin() {
  $("send").onclick = () => (state.writing ? stop() : send());
  text.addEventListener("input", fit);
  text.addEventListener("keydown", typed);
  document.addEventListener("keydown", pressed);
  on("busy", busy);
  on("conversation", room);
  on("node", room);
  on("about", room);
  busy();
  fit();
}

export function fit() {
  text.style.setProperty("height", "auto");
  text.style.setProperty("height", `${Math.min(text.scrollHeight, innerHeight * 0.4)}px`);
  $("send").disabled = !state.writing && !text.value.trim();
}

function send() {
  const written = text.value;
  if (!written.trim() || state.writing) return;
  text.value = "";
  fit();
  noted(ask(written));
  scrollToEnd();
}

function typed(event) {
  if (event.isComposing) return;
  const isSend = event.key === "Enter" && !event.shiftKey && (!TOUCH.matches || event.ctrlKey || event.metaKey);
  if (isSend) {
    event.preventDefault();
    send();
  }
  if (event.key === "ArrowUp" && !text.value && !state.writing) {
    const last = pathTo(state.nodes, state.head).findLast((node) => node.message.role === "user");
    if (last) (event.preventDefault(), edit(last.id));
  }
}

// Keys that work everywhere.
function pressed(event) {
  const command = event.ctrlKey || event.metaKey;
  if (command && event.key.toLowerCase() === "k" && !event.shiftKey && !event.altKey) {
    event.preventDefault();
    noted(search());
  } else if (command && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    fresh();
  } else if (event.key === "Escape" && !document.querySelector("dialog")) {
    if (state.writing) stop();
    hideSidebar();
  } else if (event.key === "/" && !command && !isField(event.target)) {
    event.preventDefault();
    text.focus();
  }
}

const isField = (target) => target.closest?.("input, textarea, select, [contenteditable]");

function busy() {
  const isWriting = Boolean(state.writing);
  $("send").replaceChildren(icon(isWriting ? "stop" : "send"));
  $("send").setAttribute("aria-label", isWriting ? "Stop" : "Send");
  $("send").title = isWriting ? "Stop (Esc)" : "Send (Enter)";
  $("send").classList.toggle("stop", isWriting);
  fit();
}

// How much of the slot the conversation fills, as the last answer had it.
function room() {
  const path = pathTo(state.nodes, state.head);
  const usage = path.findLast((node) => node.info?.usage)?.info.usage;
  const limit = state.about?.limit;
  const window = state.about?.window;
  $("room").replaceChildren();
  if (!usage) return;
  const most = window && window < (limit ?? Infinity) ? window : limit;
  const share = most ? Math.min(usage.total_tokens / most, 1) : 0;
  const counts = [usage.total_tokens, most].filter(Boolean).map(kilo).join(" / ");
  $("room").append(el("span", {}, counts, el("span", { className: "unit", textContent: " tokens" })));
  $("room").title = most === window ? "Tokens of this conversation, and the window: older ones roll out of it" : "Tokens of this conversation, and how many a slot holds";
  $("room").style.setProperty("--share", share);
  $("room").classList.toggle("full", share === 1);
}

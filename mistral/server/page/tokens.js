// The conversation as the model has it: tokens, shaded by probability, and which of them have left the window.

import { el, kilo } from "./dom.js";
import * as popover from "./popover.js";
import { state } from "./state.js";

const MOST = 3000; // tokens of the prompt that are drawn, the last ones
const ORIGINS = { sampled: "sampled", forced: "forced: the grammar left no choice", drafted: "drafted: a guess that the model confirmed" };
function percent(p) {
  if (p < 0.0005) return "< 0.1%";
  return p >= 0.9995 ? "100%" : `${(100 * p).toFixed(1)}%`;
}
// Spaces and newlines at their places, visible where they are alone.
const shown = (text) => (text === "" ? "∅" : text.replaceAll("\n", "↵\n"));
const named = (text) => JSON.stringify(text);

export class Tokens {
  constructor() {
    this.element = el("div", { className: "tokens", role: "group", "aria-label": "tokens" });
    popover.attach(this.element, (span) => this.told(Number(span.dataset.at)), ".token[data-at]");
    this.element.addEventListener("keydown", (event) => this.move(event));
    this.clear(null);
  }

  clear(id) {
    this.id = id;
    this.first = 0; // position of the first token that is drawn
    this.hasPrompt = false;
    this.count = 0; // tokens of the answer that are drawn
    this.rolled = 0; // tokens at the beginning that are marked as gone
    this.details = null;
    this.element.replaceChildren();
  }

  show(id, details) {
    if (id !== this.id) this.clear(id);
    if (!details) return;
    this.details = details;
    const isAtEnd = this.element.scrollHeight - this.element.scrollTop - this.element.clientHeight < 40;
    if (details.prompt && !this.hasPrompt) this.addPrompt(details.prompt);
    for (; this.count < details.tokens.length; this.count++) this.addToken(details.tokens[this.count]);
    this.shade();
    if (isAtEnd) this.element.scrollTop = this.element.scrollHeight;
  }

  addPrompt({ tokens, cached }) {
    this.hasPrompt = true;
    this.first = Math.max(0, tokens.length - MOST);
    if (this.first) this.element.append(el("p", { className: "soft", textContent: `${kilo(this.first)} earlier tokens are not drawn.` }));
    tokens.slice(this.first).forEach(([, text], i) => this.add(text, `prompt ${this.first + i < cached ? "cached" : "new"}`, this.first + i));
  }

  addToken({ text, p, origin }) {
    const span = this.add(text, `generated ${origin}`, this.promptLength() + this.count);
    if (p !== null && p !== undefined) span.style.setProperty("--p", 1 - p);
  }

  add(text, className, at) {
    const span = el("span", { className: `token ${className}`, textContent: shown(text), dataset: { at } });
    span.tabIndex = this.element.querySelector(".token") ? -1 : 0; // one stop for the Tab key; the arrows lead on
    this.element.append(span);
    return span;
  }

  promptLength() {
    return this.details.prompt?.tokens.length ?? 0;
  }

  shade() {
    const window = this.details.end?.window ?? state.about?.window;
    const gone = window ? Math.max(0, this.promptLength() + this.count - window) : 0;
    if (gone === this.rolled) return;
    const spans = this.element.querySelectorAll(".token");
    for (let at = Math.max(this.rolled, this.first); at < gone; at++) spans[at - this.first]?.classList.add("rolled");
    this.rolled = gone;
  }

  told(at) {
    const inPrompt = at < this.promptLength();
    const place = el("p", { className: "soft", textContent: `position ${kilo(at)}${at < this.rolled ? ", rolled out of the window" : ""}` });
    if (inPrompt) {
      const [id, text] = this.details.prompt.tokens[at];
      const says = at < this.details.prompt.cached ? "of the prompt, in the slot already" : "of the prompt";
      return [el("strong", { textContent: named(text) }), el("p", { textContent: `token ${id}, ${says}` }), place];
    }
    const token = this.details.tokens[at - this.promptLength()];
    const forward = this.details.forwards.find(({ n }) => n === token.forward);
    const cost = forward ? `, forward pass ${forward.n} (${forward.ms.toFixed(1)} ms)` : "";
    const probability = token.p === null || token.p === undefined ? "" : `, ${percent(token.p)}`;
    const list = (token.top ?? []).map(([text, p]) => alternative(text, p, text === token.text));
    return [
      el("strong", { textContent: named(token.text) }),
      el("p", { textContent: `token ${token.id}${probability}` }),
      el("p", { textContent: `${ORIGINS[token.origin] ?? token.origin}${cost}` }),
      place,
      ...list,
    ];
  }

  move(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const spans = [...this.element.querySelectorAll(".token")];
    const next = spans[spans.indexOf(document.activeElement) + step];
    if (!next) return;
    event.preventDefault();
    document.activeElement.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  legend() {
    const keys = [["low", "improbable"], ["forced", "forced"], ["drafted", "drafted"], ["cached", "reused"], ["rolled", "rolled out"]];
    return el("p", { className: "legend" }, ...keys.map(([name, text]) => el("span", {}, el("i", { className: `key token ${name}` }), text)));
  }
}

function alternative(text, p, isChosen) {
  const bar = el("i", {});
  bar.style.setProperty("--p", p);
  return el("div", { className: isChosen ? "alternative chosen" : "alternative" }, el("code", { textContent: named(text) }), el("span", { className: "track" }, bar), el("span", { textContent: percent(p) }));
}

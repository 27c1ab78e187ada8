// Colours of code. A language's grammar is loaded when an answer has code in it.

import hljs from "./vendor/highlight.core.js";
import { sanitized } from "./markdown.js";
import { el } from "./dom.js";

const NAMES = "bash cpp diff javascript json python sql xml yaml".split(" ");
const ALIASES = {
  sh: "bash", shell: "bash", zsh: "bash", console: "bash", c: "cpp", h: "cpp", "c++": "cpp", hpp: "cpp", cc: "cpp",
  patch: "diff", js: "javascript", jsx: "javascript",
  mjs: "javascript", ts: "javascript", tsx: "javascript", typescript: "javascript", jsonl: "json", json5: "json",
  py: "python", python3: "python", pycon: "python", html: "xml", svg: "xml", xhtml: "xml",
  yml: "yaml",
};
const LONGEST = 50_000; // characters
const loaded = new Map(); // name -> a promise

// The language of a fence's info string, "" for one that is not known.
export function languageName(info) {
  const name = info.trim().split(/[\s,{]/)[0].toLowerCase();
  if (NAMES.includes(name)) return name;
  return Object.hasOwn(ALIASES, name) ? ALIASES[name] : "";
}

// Fill an element with code, at once if the grammar is there, again when it has come.
export function highlight(place, text, language) {
  if (language && text.length <= LONGEST && hljs.getLanguage(language)) {
    place.replaceChildren(sanitized(hljs.highlight(text, { language, ignoreIllegals: true }).value));
  } else {
    place.replaceChildren(text);
    if (language && text.length <= LONGEST) load(language).then(() => highlight(place, text, language), () => {});
  }
  markDirections(place);
}

function load(name) {
  if (!loaded.has(name)) {
    loaded.set(name, import(`./vendor/highlight.${name}.js`).then((grammar) => hljs.registerLanguage(name, grammar.default)));
  }
  return loaded.get(name);
}

// Signs that turn the direction of text can make code look like other code: they are shown by their numbers.
const TURNS = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/;

function markDirections(place) {
  if (!TURNS.test(place.textContent)) return;
  const walker = document.createTreeWalker(place, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode);
  for (const text of texts) {
    const parts = text.data.split(new RegExp(`(${TURNS.source})`));
    text.replaceWith(...parts.map((part) => (TURNS.test(part) ? turn(part) : part)));
  }
}

const turn = (sign) => el("mark", { textContent: `U+${sign.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}` });

// The text of a model as elements. It is hostile until proved otherwise: marked makes HTML of its Markdown, DOMPurify
// lets pass what is listed here and returns nodes, and nothing else of the page ever parses HTML. HTML that the text
// itself has is shown as text, and pictures are shown as links, so that nothing is loaded.

import { Lexer, Marked } from "./vendor/marked.esm.js";
import { button, copy, el, kilo, shortened } from "./dom.js";
import { highlight, languageName } from "./highlight.js";

const LONGEST = 200_000; // characters of an answer that are read as Markdown; what is longer is shown as it is
const LONGEST_PARAGRAPH = 5000; // what is longer is shown without emphasis and links: those take quadratic time
const DEEPEST = 40; // signs of nesting at the beginning of a line
const SHOWN = 100_000; // characters of a text that is too long, at first

const TAGS = "a b blockquote br code del em h3 h4 h5 h6 hr i li ol p pre span strong table tbody td th thead tr ul".split(" ");
const ALLOWED = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["href", "title", "align", "start", "class", "target", "rel"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["align", "start"], // values that are not addresses
  RETURN_DOM_FRAGMENT: true,
};

const purify = DOMPurify(window);
purify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A" && node.removeAttribute) node.removeAttribute("href");
  if (node.tagName === "A") {
    node.setAttribute("rel", "noopener noreferrer nofollow");
    node.setAttribute("target", "_blank");
  }
  const classes = (node.getAttribute?.("class") ?? "").split(/\s+/).filter((name) => /^(language-|hljs-)[\w+#-]*$/.test(name));
  if (classes.length) node.setAttribute("class", classes.join(" "));
  else node.removeAttribute?.("class");
});

// The one door from HTML to the page.
export const sanitized = (html) => purify.sanitize(html, ALLOWED);

const escaped = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);

const markdown = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html({ text, block }) {
      return block ? `<p>${escaped(text.trimEnd()).replaceAll("\n", "<br>")}</p>` : escaped(text);
    },
    image({ href, text }) {
      return `<a href="${escaped(href)}">image: ${escaped(text || href)}</a>`;
    },
    checkbox({ checked }) {
      return `<i class="hljs-check">${checked ? "☑" : "☐"}</i> `;
    },
    heading({ tokens, depth }) {
      const level = Math.min(depth + 2, 6);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>\n`;
    },
  },
});

// Show a text that may still grow: only the blocks that differ from what is shown are made anew.
export function show(place, text) {
  if (text.length > LONGEST || text.split("\n").some(isDeep)) return showPlain(place, text);
  const { tokens } = blocksOf(text.replace(/\r\n|\r/g, "\n"));
  const { links } = tokens;
  const blocks = tokens.filter((token) => token.type !== "space" && token.type !== "def");
  const definitions = JSON.stringify(links);
  const shown = place.blocks?.definitions === definitions ? place.blocks.raws : [];
  let same = 0;
  while (same < shown.length && same < blocks.length && shown[same] === blocks[same].raw) same++;
  while (place.children.length > same) place.lastElementChild.remove();
  for (const token of blocks.slice(same)) place.append(blockOf(token, links));
  place.blocks = { raws: blocks.map((token) => token.raw), definitions };
}

function blocksOf(text, links = {}) {
  const lexer = new Lexer(markdown.defaults);
  lexer.tokens.links = links;
  lexer.blockTokens(text, lexer.tokens);
  return lexer;
}

// The HTML of one block. It is not safe yet.
function htmlOf(token, links) {
  const lexer = blocksOf(token.raw, links);
  for (const { src, tokens } of lexer.inlineQueue) {
    if (src.length > LONGEST_PARAGRAPH) tokens.push({ type: "text", raw: src, text: src, escaped: false });
    else lexer.inlineTokens(src, tokens);
  }
  return markdown.parser(lexer.tokens);
}

// Quotes in quotes in quotes: each level is a call within a call.
function isDeep(line) {
  const signs = /^[\s>*+-]*/.exec(line)[0].replace(/\s/g, "");
  return signs.length > DEEPEST && !/^([*+-])\1*$/.test(signs);
}

function showPlain(place, text) {
  place.blocks = null;
  if (place.plain === text && place.children.length) return;
  place.plain = text;
  place.replaceChildren(shortened(text, SHOWN, "A text"));
}

// One block in an element of its own, so that blocks and elements count alike.
function blockOf(token, links) {
  const block = el("div", { className: "block", dir: "auto" });
  if (token.type === "code") {
    block.append(codeOf(token.text, token.lang ?? ""));
    return block;
  }
  try {
    block.append(sanitized(htmlOf(token, links)));
  } catch {
    block.append(shortened(token.raw, SHOWN, "A text"));
  }
  for (const code of block.querySelectorAll("pre > code")) {
    const language = [...code.classList].find((name) => name.startsWith("language-")) ?? "";
    code.parentElement.replaceWith(codeOf(code.textContent.replace(/\n$/, ""), language.slice(9)));
  }
  for (const table of block.querySelectorAll("table")) {
    const frame = el("div", { className: "table", tabIndex: 0, role: "region", "aria-label": "table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return block;
}

export function codeOf(text, lang) {
  const language = languageName(lang);
  const code = el("code", {});
  highlight(code, text, language);
  const lines = text.split("\n").length;
  const title = el("span", { className: "language", textContent: language || lang.split(/\s/)[0].slice(0, 20) || "text" });
  const copies = button("copy", "Copy code", () => copy(text, copies));
  const pre = el("pre", { tabIndex: 0 }, code);
  pre.setAttribute("aria-label", `code, ${kilo(lines)} ${lines === 1 ? "line" : "lines"}`);
  return el("figure", { className: "code", dir: "ltr" }, el("figcaption", {}, title, copies), pre);
}

// A call of a tool on the screen: what is called with what, the question whether it may run, its result.

import { codeOf } from "./markdown.js";
import { button, copy, el, focusBox, icon, shortened } from "./dom.js";
import { asked } from "./tools.js";

const SHOWN = 4000; // characters

// The card of a call; `known` is the one that is there already, kept if nothing has changed.
export function cardOf(call, result, isWriting, isTurn, known) {
  const question = asked.get(call.id);
  const isAsked = Boolean(question) && !isWriting && result?.status === "writing";
  const state = stateOf(result, isWriting, isAsked, isTurn);
  const key = JSON.stringify([call, result?.message.content, state, result?.error]);
  if (known?.key === key) return known;
  const card = el("section", { className: `call ${state.name}`, "aria-label": `Call of ${call.function.name}` });
  card.key = key;
  const title = el("div", { className: "bar" }, icon("tool"), el("code", { className: "name", textContent: call.function.name }), el("span", { className: "state", textContent: state.text }));
  card.append(title, part("Arguments", pretty(call.function.arguments)));
  if (isAsked) card.append(choices(question, card));
  else if (result && result.status !== "writing") card.append(part(result.status === "done" ? "Result" : "No result", resultText(result)));
  return card;
}

function stateOf(result, isWriting, isAsked, isTurn) {
  if (isWriting) return { name: "growing", text: "is being written" };
  if (isAsked) return { name: "asking", text: "asks to run" };
  if (!result) return { name: "none", text: isTurn ? "waits" : "did not run" };
  if (result.info.running) return { name: "running", text: "runs" };
  const { seconds } = result.info;
  if (result.status === "done") return { name: "done", text: seconds === undefined ? "done" : `done in ${seconds.toFixed(2)} s` };
  if (result.info.refused) return { name: "refused", text: "not allowed" };
  return { name: result.status, text: { writing: "waits", stopped: "stopped", failed: "did not succeed", interrupted: "interrupted" }[result.status] };
}

function choices({ tool, decide }, card) {
  const choose = (text, decision, className) => el("button", { type: "button", textContent: text, className, onclick: () => (focusBox(), decide(decision)) });
  const from = tool.source ? `From ${tool.source}. ` : "";
  const says = el("p", { textContent: `${from}It runs on the machine of the server.` });
  const row = el(
    "div",
    { className: "choices", role: "group", "aria-label": `May ${tool.name} run?` },
    choose("Never for this tool", "never", "quiet"),
    choose("Not now", "no", "quiet"),
    choose("Always for this tool", "always", ""),
    choose("Run once", "once", "primary"),
  );
  // The keyboard comes here, but not onto a button: a key that was meant for other text must not allow a call.
  row.tabIndex = -1;
  requestAnimationFrame(() => card.isConnected && !isTyping() && row.focus({ preventScroll: true }));
  return el("div", { className: "question" }, says, row);
}

const isTyping = () => Boolean(document.activeElement?.value);

function part(title, text) {
  const copies = button("copy", `Copy: ${title}`, () => copy(text, copies));
  const body = text.length <= SHOWN && isJson(text) ? codeOf(text, "json") : shortened(text, SHOWN, "A text");
  const head = el("summary", {}, title);
  return el("details", { className: "part", open: true }, head, body.tagName === "FIGURE" ? body : el("div", { className: "text", dir: "auto" }, copies, body));
}

const resultText = (result) => (result.status === "done" ? pretty(result.message.content) : result.error ?? result.message.content);

function isJson(text) {
  try {
    return typeof JSON.parse(text) === "object";
  } catch {
    return false;
  }
}

// JSON with indentation. A number with more digits than JavaScript keeps must not change: only what comes back the same
// is laid out anew.
function pretty(text) {
  if (text.length > 100_000) return text;
  try {
    const value = JSON.parse(text);
    const tight = text.replace(/("(?:[^"\\]|\\.)*")|\s+/g, (_, string) => string ?? "");
    const isSame = JSON.stringify(value) === tight;
    return typeof value === "object" && value !== null && isSame ? JSON.stringify(value, null, 2) : text;
  } catch {
    return text;
  }
}

// Conversations as files of JSON lines, as scripts/chat.py saves and loads them: the format and the tools first, then the
// messages of the branch that is shown. The other branches are in the first line:
//
// branches: {created: [when each message that is shown was made], others: [{parent, created, message}, ...]}
//
// The messages are numbered from 1, first those that are shown, then the others; a parent of 0 is none.

import { newId } from "./kept.js";
import { childrenOf, messagesOf, pathTo } from "./tree.js";
import { schemaOf } from "./tools.js";
import { titleOf } from "./answer.js";

const LARGEST = 64_000_000; // bytes, as in mistral/chat/saved.py

export function linesOf(conversation, nodes, head, about) {
  const path = pathTo(nodes, head);
  const messages = messagesOf(path, conversation.system);
  const branches = branchesOf(nodes, path, messages);
  const all = [...messages, ...(branches?.others ?? []).map(({ message }) => message)];
  const tools = all.some((message) => message.tool_calls) ? (about?.tools ?? []).map(schemaOf) : [];
  const first = { format: about?.format ?? "chatml", tools, ...(branches && { branches }) };
  return [first, ...messages].map((line) => `${JSON.stringify(line)}\n`).join("");
}

function branchesOf(nodes, path, messages) {
  const shown = messages.filter(({ role }) => role !== "system");
  const numbers = new Map([[null, 0]]); // id of a message -> its number; an answer that never began has its question's
  for (const { id, parent, message } of path) numbers.set(id, shown.indexOf(message) + 1 || numbers.get(parent));
  const others = [];
  const queue = childrenOf(nodes, null); // parents before their children
  for (const { id, parent, created, message } of queue) {
    queue.push(...childrenOf(nodes, id));
    if (numbers.has(id)) continue;
    const above = numbers.get(parent);
    const isEmpty = message.role === "assistant" && !message.content && !message.tool_calls?.length;
    numbers.set(id, isEmpty ? above : shown.length + others.length + 1);
    if (!isEmpty) others.push({ parent: above, created, message });
  }
  if (!others.length) return null;
  const times = new Map(path.map(({ message, created }) => [message, created]));
  return { created: shown.map((message) => times.get(message) ?? 0), others };
}

export const fileName = (title) => `${title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 40) || "conversation"}.jsonl`;

// {conversation, nodes, tools} of a file's text; tools: the names of those that it was saved with. Throws an Error that
// names the line.
export function conversationOf(text, name) {
  if (text.length > LARGEST) throw new Error(`${name} is larger than ${LARGEST / 1e6} MB`);
  const lines = text.replace(/\n$/, "").split("\n").map((line, i) => objectOf(line, i, name));
  if (typeof lines[0].format !== "string") throw new Error(`${name} is not a saved conversation: its first line must name the format`);
  const messages = lines.slice(1);
  messages.forEach((message, i) => check(message, i + 2, name));
  const now = Date.now();
  const system = messages[0]?.role === "system" ? messages.shift().content : "";
  const title = titleOf(messages.find((message) => message.role === "user")?.content ?? name);
  const conversation = { id: newId(), title, system, created: now, updated: now, head: null };
  const { created = [], others = [] } = branchesIn(lines[0], messages.length, name);
  const nodes = messages.map((message, i) => ({ parent: i, created: created[i] || now + i, message }));
  nodes.push(...others);
  for (const node of nodes) Object.assign(node, { id: newId(), conversation: conversation.id, status: "done", info: {} });
  for (const node of nodes) node.parent = node.parent ? nodes[node.parent - 1].id : null;
  conversation.head = messages.length ? nodes[messages.length - 1].id : null;
  return { conversation, nodes, tools: namesOf(lines[0].tools) };
}

// The branches that are not shown. A message comes after its parent.
function branchesIn({ branches }, count, name) {
  if (branches === undefined) return {};
  const wrong = new Error(`${name}, line 1, has branches that the page cannot read`);
  const { created, others } = branches ?? {};
  if (!Array.isArray(created) || !Array.isArray(others)) throw wrong;
  const read = others.map((other, i) => {
    const isIn = Number.isInteger(other?.parent) && other.parent >= 0 && other.parent <= count + i;
    if (!isIn || !Number.isFinite(other.created) || Object(other.message) !== other.message) throw wrong;
    check(other.message, 1, name);
    return { parent: other.parent, created: other.created, message: other.message };
  });
  return { created: created.map((at) => (Number.isFinite(at) ? at : 0)), others: read };
}

function namesOf(tools) {
  const names = Array.isArray(tools) ? tools.map((tool) => tool?.function?.name) : [];
  return names.filter((name) => typeof name === "string");
}

function objectOf(line, i, name) {
  let value;
  try {
    value = JSON.parse(line);
  } catch (error) {
    throw new Error(`${name}, line ${i + 1}, is not valid JSON: ${error.message}`);
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) throw new Error(`${name}, line ${i + 1}, is not a message`);
  return value;
}

function check(message, line, name) {
  const wrong = (what) => new Error(`${name}, line ${line}, ${what}`);
  if (!["system", "user", "assistant", "tool"].includes(message.role)) throw wrong("has no role that the page knows");
  if (message.role === "system" && line !== 2) throw wrong("is a system message after the first message");
  if (message.role === "assistant") {
    message.content ??= "";
    message.tool_calls = callsOf(message.tool_calls, wrong);
    if (!message.tool_calls) delete message.tool_calls;
  }
  // A tool's result may be any value, or an error; the page and OpenAI's interface have results as text.
  if (message.role === "tool") {
    const { error, content = null } = message;
    delete message.error;
    if (error !== undefined && error !== null) message.content = JSON.stringify({ error });
    else if (typeof content !== "string") message.content = JSON.stringify(content);
  }
  if (typeof message.content !== "string") throw wrong("has no content that is text");
}

// Calls in the form that the page and OpenAI's interface have: arguments as text, and an id.
function callsOf(calls, wrong) {
  if (calls === undefined || calls === null) return undefined;
  if (!Array.isArray(calls)) throw wrong("has tool_calls that are not a list");
  return calls.map((call) => {
    const given = call?.function ?? call;
    if (typeof given?.name !== "string") throw wrong("has a call without a name");
    const args = typeof given.arguments === "string" ? given.arguments : JSON.stringify(given.arguments ?? {});
    return { id: typeof call.id === "string" ? call.id : newId(), type: "function", function: { name: given.name, arguments: args } };
  });
}

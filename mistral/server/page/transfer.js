// Conversations as files of JSON lines, as scripts/chat.py saves and loads them: the format and the tools first, then the
// messages of the branch that is shown.

import { newId } from "./kept.js";
import { messagesOf, pathTo } from "./tree.js";
import { schemaOf } from "./tools.js";
import { titleOf } from "./answer.js";

const LARGEST = 64_000_000; // bytes, as in mistral/chat/saved.py

export function linesOf(conversation, nodes, head, about) {
  const messages = messagesOf(pathTo(nodes, head), conversation.system);
  const tools = messages.some((message) => message.tool_calls) ? (about?.tools ?? []).map(schemaOf) : [];
  const first = { format: about?.format ?? "chatml", tools };
  return [first, ...messages].map((line) => `${JSON.stringify(line)}\n`).join("");
}

export const fileName = (title) => `${title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 40) || "conversation"}.jsonl`;

// {conversation, nodes} of a file's text. Throws an Error that names the line.
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
  const nodes = messages.map((message, i) => ({ id: newId(), conversation: conversation.id, parent: null, created: now + i, message, status: "done", info: {} }));
  nodes.forEach((node, i) => (node.parent = i ? nodes[i - 1].id : null));
  conversation.head = nodes.length ? nodes[nodes.length - 1].id : null;
  return { conversation, nodes };
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
  // A tool's result may be any value; the page has results as text.
  if (message.role === "tool" && message.error !== undefined) message.content = JSON.stringify({ error: message.error });
  if (message.role === "tool" && typeof message.content !== "string") message.content = JSON.stringify(message.content ?? null);
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

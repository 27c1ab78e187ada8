// One turn: the model's answer, the calls in it, their results, and the next answer, until there are no more calls.

import { callTool, chat, ServerError } from "./api.js";
import { say } from "./dom.js";
import { newId, tab } from "./kept.js";
import { emit, state, TEMPERATURE } from "./state.js";
import * as store from "./store.js";
import { childrenOf, messagesOf, pathTo } from "./tree.js";
import { allowed, NotAllowed, offered } from "./tools.js";

const MOST_ROUNDS = 12; // of calls in one turn
const SAVE_EVERY = 400; // ms

// The messages of the conversation, changed in memory, in the browser's store, and on the screen.

// A browser whose storage is full does not end the conversation.
const keep = (written) => written.catch((error) => emit("note", `The conversation is not kept: ${error.message}`));

function addNode(parent, message, status = "done") {
  let created = Date.now();
  for (const node of state.nodes.values()) created = Math.max(created, node.created + 1);
  const node = { id: newId(), conversation: state.conversation.id, parent, created, message, status, info: {} };
  if (status === "writing") {
    Object.assign(node, { writer: tab, beat: Date.now() });
    state.mine.add(node.id);
  }
  state.nodes.set(node.id, node);
  return node;
}

// A message that was being written has its last form.
async function finish(node) {
  delete node.writer;
  await keep(store.putNodes([node]));
  state.mine.delete(node.id);
  emit("node", node);
}

// Show the messages up to this one.
export async function moveHead(head) {
  const { conversation } = state;
  state.head = head;
  conversation.head = head;
  emit("conversation");
  await keep(store.putConversation(conversation.id, { head }));
}

async function begin(text) {
  const system = state.newSystem;
  const now = Date.now();
  state.conversation = { id: newId(), title: titleOf(text), system, head: null, created: now, updated: now };
  state.nodes = new Map();
  history.replaceState(null, "", `#${state.conversation.id}`);
  await keep(store.putConversation(state.conversation.id, state.conversation));
  emit("list");
}

export function titleOf(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 59)}…` : line || "Empty message";
}

// A question of the person, after `parent`; undefined: after the last message.
export async function ask(text, parent) {
  if (state.writing) return;
  if (!state.conversation) await begin(text);
  const node = addNode(parent === undefined ? state.head : parent, { role: "user", content: text });
  const updated = Date.now();
  state.conversation.updated = updated;
  await keep(store.putNodes([node]));
  await keep(store.putConversation(state.conversation.id, { updated }));
  await moveHead(node.id);
  emit("list");
  await answer(node.id);
}

// An answer in the person's words, next to the model's.
export async function reword(node, content) {
  const edited = addNode(node.parent, { role: "assistant", content });
  edited.info = { isEdited: true, json: node.info.json };
  await keep(store.putNodes([edited]));
  await moveHead(edited.id);
}

export const stop = () => state.writing?.abort();

// Answer the message `parent`.
export async function answer(parent) {
  if (state.writing) return;
  const writing = new AbortController();
  state.writing = writing;
  emit("busy");
  try {
    for (let round = 0; round < MOST_ROUNDS && parent && !writing.signal.aborted; round++) {
      const node = await oneAnswer(parent, writing.signal);
      parent = node.status === "done" && node.message.tool_calls ? await results(node, writing.signal) : null;
    }
  } finally {
    state.writing = null;
    emit("busy");
  }
}

function bodyOf(messages) {
  const { sampling, stop, json, schema } = state.settings;
  const body = { temperature: TEMPERATURE, model: state.about?.name ?? "model", messages, stream: true, stream_options: { include_usage: true } };
  for (const [name, value] of Object.entries(sampling)) if (value !== null && value !== "") body[name] = value;
  const strings = stopStrings(stop);
  if (strings.length) body.stop = strings;
  if (json) body.response_format = formatOf(schema);
  const tools = json ? [] : offered();
  if (tools.length) body.tools = tools;
  if (state.panel) body.details = true;
  return body;
}

// One string a line; \n in a line is a newline.
const stopStrings = (text) =>
  text.split("\n").filter(Boolean).map((line) => line.replace(/\\([nt\\])/g, (_, sign) => ({ n: "\n", t: "\t", "\\": "\\" })[sign]));

function formatOf(schema) {
  if (!schema.trim()) return { type: "json_object" };
  return { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(schema), strict: true } };
}

async function oneAnswer(parent, signal) {
  const messages = messagesOf(pathTo(state.nodes, parent), state.conversation.system);
  const body = bodyOf(messages);
  // Another answer with the same seed would be the same answer.
  if (body.seed !== undefined) body.seed += childrenOf(state.nodes, parent).length;
  const node = addNode(parent, { role: "assistant", content: "" }, "writing");
  state.shown = null;
  node.info = { model: state.about?.name, json: Boolean(body.response_format) };
  await Promise.all([keep(store.putNodes([node])), moveHead(node.id)]);
  const saving = setInterval(() => save(node), SAVE_EVERY);
  const sent = performance.now();
  try {
    for await (const chunks of chat(body, signal)) {
      for (const chunk of chunks) read(chunk, node, sent);
      emit("node", node);
      if (Date.now() - node.beat > SAVE_EVERY) save(node); // timers are slow in a tab that is not seen
    }
    node.status = "done";
  } catch (error) {
    node.status = signal.aborted ? "stopped" : "failed";
    if (!signal.aborted) {
      node.error = error.message;
      if (error instanceof ServerError && [0, 401, 503].includes(error.status)) emit("unreachable", error);
    }
    delete node.message.tool_calls; // none of them is run
  } finally {
    clearInterval(saving);
  }
  node.info.seconds = (performance.now() - sent) / 1000;
  await finish(node);
  const details = state.details.get(node.id);
  if (details) await keep(store.putDetails({ id: node.id, conversation: node.conversation, at: Date.now(), ...details }));
  say(node.status === "failed" ? node.error : node.message.content.slice(0, 1000) || "The answer has ended");
  return node;
}

// A page that is left keeps what it has: most browsers write it before they go.
addEventListener("pagehide", () => {
  for (const id of state.mine) save(state.nodes.get(id));
});

function save(node) {
  if (!node) return; // of a conversation that is not open any more
  node.beat = Date.now();
  store.putNodes([node]).catch(() => {});
}

function read(chunk, node, sent) {
  const { message, info } = node;
  for (const { delta, finish_reason: finish } of chunk.choices ?? []) {
    if (delta?.content) message.content += delta.content;
    for (const call of delta?.tool_calls ?? []) addCall(message, call);
    if ((delta?.content || delta?.tool_calls) && info.first === undefined) info.first = (performance.now() - sent) / 1000;
    if (finish) info.finish = finish;
  }
  if (chunk.usage) info.usage = chunk.usage;
  if (chunk.timings) info.timings = chunk.timings;
  if (chunk.details) addDetails(node.id, chunk.details);
}

// A call may come in pieces: the first has its id and name, all have parts of the arguments.
function addCall(message, { index, id, function: part }) {
  message.tool_calls ??= [];
  const call = (message.tool_calls[index ?? 0] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
  if (id) call.id = id;
  if (part?.name) call.function.name += part.name;
  if (part?.arguments) call.function.arguments += part.arguments;
}

function addDetails(id, { prompt, tokens, forwards, end }) {
  if (!state.details.has(id)) {
    state.details.set(id, { prompt: null, tokens: [], forwards: [], end: null });
    for (const old of [...state.details.keys()].slice(0, -store.MOST_RECORDED)) state.details.delete(old);
  }
  const known = state.details.get(id);
  if (prompt) known.prompt = prompt;
  if (end) known.end = end;
  for (const token of tokens ?? []) known.tokens.push(token);
  for (const forward of forwards ?? []) known.forwards.push(forward);
}

// Run the calls of an answer, one after the other; every call gets a result, also one that did not run.
async function results(node, signal) {
  let parent = node.id;
  for (const call of node.message.tool_calls) {
    const { name } = call.function;
    if (signal.aborted) return null; // the person may see another conversation by now
    const message = { role: "tool", tool_call_id: call.id, name, content: "" };
    const result = addNode(parent, message, "writing");
    parent = result.id;
    await Promise.all([keep(store.putNodes([result])), moveHead(parent)]);
    const beating = setInterval(() => save(result), SAVE_EVERY);
    try {
      const args = argumentsOf(call);
      await allowed(call, signal);
      const start = performance.now();
      result.info.running = true;
      emit("node", result);
      message.content = await callTool(name, args, signal);
      result.info.seconds = (performance.now() - start) / 1000;
      result.status = "done";
    } catch (error) {
      const why = signal.aborted ? "The person stopped the call." : error.message;
      result.status = signal.aborted ? "stopped" : "failed";
      result.error = why;
      result.info.refused = error instanceof NotAllowed;
      message.content = JSON.stringify({ error: why });
    } finally {
      clearInterval(beating);
      delete result.info.running;
    }
    await finish(result);
  }
  return parent;
}

function argumentsOf(call) {
  let args;
  try {
    args = JSON.parse(call.function.arguments || "{}");
  } catch {
    throw new Error("The arguments are not valid JSON.");
  }
  if (args === null || typeof args !== "object" || Array.isArray(args)) throw new Error("The arguments are not an object.");
  return args;
}

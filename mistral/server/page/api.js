// The server: errors in one line, streams as events.

import { apiKey } from "./kept.js";
import { emit, state } from "./state.js";

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status; // 0: the server could not be reached
  }
}

async function request(method, path, { body, signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  if (state.about?.token) headers["X-Page-Token"] = state.about.token;
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw new ServerError(await problem(response), response.status);
  return response;
}

async function problem(response) {
  try {
    const said = (await response.json()).error;
    return said.message ?? String(said);
  } catch {
    return `The server answered ${response.status} ${response.statusText}`;
  }
}

export async function about() {
  return (await request("GET", "/page/about")).json();
}

// A request that needs the page's token. A server that was started anew has another one: it is fetched, and sent once.
async function withToken(path, body, signal) {
  try {
    return await request("POST", path, { body, signal });
  } catch (error) {
    if (error.status !== 403) throw error;
    state.about = await about();
    emit("about");
    return request("POST", path, { body, signal });
  }
}

// The data of each server-sent event, parsed; the events of one network chunk together.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const parts = []; // of an event that has not ended: joined once, so that a long event costs no more than its length
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const last = parts.length ? parts[parts.length - 1] : "";
      parts.push(value);
      if (!(last.slice(-1) + value).includes("\n\n")) continue;
      const blocks = parts.splice(0).join("").split("\n\n");
      parts.push(blocks.pop());
      const found = [];
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data:"));
        if (data.length) found.push(data.map((line) => line.slice(5).trimStart()).join("\n"));
      }
      if (found.length) yield found;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Lists of chunks of a chat completion. Throws ServerError for an error in the stream and for one that ends too early.
export async function* chat(body, signal) {
  const response = await request("POST", "/v1/chat/completions", { body, signal });
  try {
    for await (const list of events(response)) {
      const chunks = [];
      for (const data of list) {
        if (data === "[DONE]") {
          yield chunks;
          return;
        }
        const chunk = JSON.parse(data);
        if (chunk.error) {
          yield chunks;
          throw new ServerError(chunk.error.message ?? String(chunk.error), 500);
        }
        chunks.push(chunk);
      }
      yield chunks;
    }
  } catch (error) {
    if (error instanceof ServerError || signal.aborted) throw error;
    throw new ServerError("The connection ended in the middle of the answer.");
  }
  throw new ServerError("The connection ended in the middle of the answer.");
}

// The result of a tool that runs on the server, as text. Throws ServerError with the tool's own error.
export async function callTool(name, args, signal) {
  const reply = await (await withToken("/page/tools", { name, arguments: args }, signal)).json();
  if (reply.error !== undefined) throw new ServerError(reply.error.message ?? String(reply.error), 200);
  return typeof reply.result === "string" ? reply.result : JSON.stringify(reply.result);
}

// The state of the slots while the panel is open.
export async function* run(signal) {
  const response = await request("GET", "/page/run", { signal });
  for await (const list of events(response)) yield JSON.parse(list[list.length - 1]);
}

// The address of the page of look_inside for a text. The server keeps it there for a while, under a policy of its own.
export async function inside(messages, tools) {
  const response = await withToken("/page/inside", tools.length ? { messages, tools } : { messages });
  return response.headers.get("Content-Location");
}

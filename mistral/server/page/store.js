// Conversations in the browser's IndexedDB. A message is a record of its own, written by one tab: two tabs that continue
// one conversation make two branches, and neither overwrites the other's messages.

import { tab } from "./kept.js";

const channel = "BroadcastChannel" in window ? new BroadcastChannel("mistral") : null;
let base = null; // null: the browser refuses it, and `memory` has everything
const removed = new Set(); // conversations whose last answers may still be on their way
const memory = { conversations: new Map(), nodes: new Map() };

export async function open() {
  try {
    base = await new Promise((resolve, reject) => {
      const request = indexedDB.open("mistral", 2);
      request.onupgradeneeded = ({ oldVersion }) => {
        const create = (name) => request.result.createObjectStore(name, { keyPath: "id" });
        if (oldVersion < 1) create("conversations");
        if (oldVersion < 1) create("nodes").createIndex("conversation", "conversation");
        const details = create("details"); // since version 2
        for (const name of ["conversation", "at"]) details.createIndex(name, name);
      };
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
      request.onblocked = () => reject(new Error("blocked"));
    });
    base.onversionchange = () => base.close();
  } catch {
    base = null;
  }
  return base !== null;
}

// What another tab has changed: {conversation, gone}
export function onChange(listener) {
  if (!channel) return;
  channel.onmessage = ({ data }) => {
    if (data.gone) removed.add(data.conversation);
    listener(data);
  };
}

function tell(change) {
  channel?.postMessage(change);
}

const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

function finished(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error ?? new Error("the browser stored nothing"));
  });
}

export async function conversations() {
  const all = base
    ? await result(base.transaction("conversations").objectStore("conversations").getAll())
    : [...memory.conversations.values()];
  return all.sort((a, b) => b.updated - a.updated);
}

// id of a conversation -> its messages; of the first 20,000 messages in all.
export async function everything() {
  const nodes = base ? await result(base.transaction("nodes").objectStore("nodes").getAll(null, 20_000)) : [...memory.nodes.values()];
  return Map.groupBy(nodes, (node) => node.conversation);
}

export async function conversation(id) {
  return base ? result(base.transaction("conversations").objectStore("conversations").get(id)) : memory.conversations.get(id);
}

export async function nodesOf(id) {
  if (!base) return [...memory.nodes.values()].filter((node) => node.conversation === id);
  return result(base.transaction("nodes").objectStore("nodes").index("conversation").getAll(id));
}

// Merge changes into a conversation, as other tabs may have changed it too.
export async function putConversation(id, changes) {
  if (removed.has(id)) return;
  if (!base) {
    memory.conversations.set(id, { ...memory.conversations.get(id), ...changes, id });
  } else {
    const transaction = base.transaction("conversations", "readwrite");
    const store = transaction.objectStore("conversations");
    store.get(id).onsuccess = (event) => store.put({ ...event.target.result, ...changes, id });
    await finished(transaction);
  }
  tell({ conversation: id });
}

export async function putNodes(nodes) {
  if (!nodes.length || removed.has(nodes[0].conversation)) return;
  if (!base) {
    for (const node of nodes) memory.nodes.set(node.id, structuredClone(node));
    return;
  }
  const transaction = base.transaction("nodes", "readwrite");
  for (const node of nodes) transaction.objectStore("nodes").put(node);
  await finished(transaction);
  tell({ conversation: nodes[0].conversation });
}

// What was recorded of the last answers, those that are not too long: {id, conversation, at, prompt, tokens, ...}
export const MOST_RECORDED = 50;
export const MOST_TOKENS = 20_000;

export async function putDetails(record) {
  const count = record.tokens.length + (record.prompt?.tokens.length ?? 0);
  if (!base || count > MOST_TOKENS || removed.has(record.conversation)) return;
  const transaction = base.transaction("details", "readwrite");
  const store = transaction.objectStore("details");
  store.put(record);
  store.index("at").getAllKeys().onsuccess = ({ target }) => target.result.slice(0, -MOST_RECORDED).forEach((id) => store.delete(id));
  await finished(transaction);
}

export async function detailsOf(id) {
  return base ? result(base.transaction("details").objectStore("details").index("conversation").getAll(id)) : [];
}

export async function remove(id) {
  removed.add(id);
  if (!base) {
    memory.conversations.delete(id);
    for (const node of await nodesOf(id)) memory.nodes.delete(node.id);
    return;
  }
  const transaction = base.transaction(["conversations", "nodes", "details"], "readwrite");
  transaction.objectStore("conversations").delete(id);
  for (const name of ["nodes", "details"]) {
    const store = transaction.objectStore(name);
    store.index("conversation").getAllKeys(id).onsuccess = ({ target }) => target.result.forEach((key) => store.delete(key));
  }
  await finished(transaction);
  tell({ conversation: id, gone: true });
}

// An answer that is being written has the time of its last change. One that this tab wrote before it was reloaded, or
// that has not changed for a while, was interrupted.
const SILENCE = 6000; // ms

export function isInterrupted(node, now = Date.now()) {
  return node.status === "writing" && (node.writer === tab || now - node.beat > SILENCE);
}

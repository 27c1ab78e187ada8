// What the page knows, and who is told when it changes.

import { read, write } from "./kept.js";

export const TEMPERATURE = 0.7; // unless a setting says another; that of the API is 1, which is much for a small model

export const state = {
  about: null, // GET /page/about
  conversation: null, // {id, title, system, head, created, updated}; null: a new one that has no message yet
  nodes: new Map(), // id -> message of the conversation, see tree.js
  head: null, // id of the last message that is shown
  writing: null, // the AbortController of the answer that is being written here
  mine: new Set(), // ids of the messages that this page is writing
  details: new Map(), // id of an answer -> its tokens and forward passes, if the panel was open
  shown: null, // id of the answer that the panel shows; null: the last one that was recorded
  panel: false,
  newSystem: "", // the system prompt of a conversation that has not begun
  settings: { sampling: {}, stop: "", json: false, schema: "", off: [], allowed: {}, ...read("settings", {}) },
};

const listeners = new Map();

export function on(event, listener) {
  if (!listeners.has(event)) listeners.set(event, []);
  listeners.get(event).push(listener);
}

// about | conversation (another one, or other messages) | node (one message) | busy | list | settings | panel | shown |
// asked (the id of a call) | note (a text for the person) | unreachable (an error) | reload
export function emit(event, detail) {
  for (const listener of listeners.get(event) ?? []) listener(detail);
}

// Work that is not awaited: its errors are shown.
export const noted = (work) => work.catch((error) => emit("note", error.message));

// Another tab has changed the settings: what this one changes next must not undo that.
addEventListener("storage", ({ key }) => {
  if (key !== "mistral.settings") return;
  Object.assign(state.settings, read("settings", {}));
  emit("settings");
});

export function change(settings) {
  Object.assign(state.settings, settings);
  write("settings", state.settings);
  emit("settings");
}

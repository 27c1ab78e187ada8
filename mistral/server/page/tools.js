// The tools of the server, and who may call them. A call runs only after the person allowed it.

import { say } from "./dom.js";
import { change, emit, state } from "./state.js";

export class NotAllowed extends Error {}

export const asked = new Map(); // id of a call -> {tool, decide}: the person is asked

// A tool is the same while its name, its source and what it takes are the same: a permission is for all of them.
export const keyOf = (tool) => JSON.stringify([tool.name, tool.source, tool.description, tool.parameters]);

// None, if the model's chat format has no tools.
export const known = () => (state.about?.chat?.has_tools === false ? [] : state.about?.tools ?? []);
export const find = (name) => known().find((tool) => tool.name === name);

// The tools as a request has them, without those that are switched off.
export function offered() {
  return known().filter((tool) => !state.settings.off.includes(tool.name)).map(schemaOf);
}

// A tool as the model reads it: all but where it comes from.
export function schemaOf({ source, ...described }) {
  return { type: "function", function: described };
}

// Returns when the call may run; throws if it may not.
export async function allowed(call, signal) {
  const tool = find(call.function.name);
  if (!tool || state.settings.off.includes(tool.name)) throw new Error(`There is no tool ${call.function.name}.`);
  const decided = state.settings.allowed[keyOf(tool)];
  const decision = decided ?? (await askPerson(call, tool, signal));
  if (decision === "always" || decision === "never") permit(tool, decision);
  if (decision === "never" || decision === "no") throw new NotAllowed("The person did not allow this call.");
}

export function permit(tool, decision) {
  const permissions = { ...state.settings.allowed };
  if (decision) permissions[keyOf(tool)] = decision;
  else delete permissions[keyOf(tool)];
  change({ allowed: permissions });
}

function askPerson(call, tool, signal) {
  return new Promise((resolve, reject) => {
    const decide = (decision) => {
      asked.delete(call.id);
      resolve(decision);
    };
    asked.set(call.id, { tool, decide });
    signal.addEventListener("abort", () => (asked.delete(call.id), reject(new Error("stopped"))), { once: true });
    emit("asked", call.id);
    say(`The model asks to call ${tool.name}`);
  });
}

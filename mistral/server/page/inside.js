// "Look inside this answer": the page of scripts/look_inside.py for the text up to an answer, in a tab of its own.

import { inside } from "./api.js";
import { say } from "./dom.js";
import { emit, state } from "./state.js";
import { offered } from "./tools.js";
import { messagesOf, pathTo } from "./tree.js";

export async function lookInside(node, pressed) {
  pressed.disabled = true;
  pressed.classList.add("working");
  say("The model reads the text again and is recorded");
  try {
    const messages = messagesOf(pathTo(state.nodes, node.id), state.conversation.system);
    const address = new URL(await inside(messages, node.info.json ? [] : offered()), location);
    // No other server's page opens here.
    if (address.origin !== location.origin) throw new Error("The page about this answer is on another server.");
    window.open(address, "_blank", "noopener");
    say("The page about this answer is open");
  } catch (error) {
    emit("note", error.message);
  } finally {
    pressed.disabled = false;
    pressed.classList.remove("working");
  }
}

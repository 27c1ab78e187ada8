// The messages of a conversation are a tree: an edit or another attempt is a sibling of what it replaces.
//
// {id, conversation, parent (null: a first message), created, message: {role, content, tool_calls?, tool_call_id?, name?},
//  status: "done" | "writing" | "stopped" | "interrupted" | "failed", error?, info: {...}, writer?, beat?}

export function pathTo(nodes, head) {
  const path = [];
  for (let node = nodes.get(head); node; node = nodes.get(node.parent)) path.push(node);
  return path.reverse();
}

export function childrenOf(nodes, parent) {
  const found = [...nodes.values()].filter((node) => node.parent === parent);
  return found.sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
}

export const siblingsOf = (nodes, node) => childrenOf(nodes, node.parent);

// The last message below a node, along the newest branches.
export function leafOf(nodes, id) {
  for (;;) {
    const below = childrenOf(nodes, id);
    if (!below.length) return id;
    id = below[below.length - 1].id;
  }
}

// The messages as the model reads them: answers that never began are left out, and every call has a result.
export function messagesOf(path, system) {
  const messages = system ? [{ role: "system", content: system }] : [];
  let open = []; // calls that have no result yet
  const close = () => {
    const content = JSON.stringify({ error: "The call was interrupted." });
    for (const call of open) messages.push({ role: "tool", tool_call_id: call.id, name: call.function.name, content });
    open = [];
  };
  for (const { message } of path) {
    if (message.role === "tool") {
      open.shift();
      messages.push(message);
      continue;
    }
    close();
    if (message.role === "assistant" && !message.content && !message.tool_calls?.length) continue;
    messages.push(message);
    open = [...(message.tool_calls ?? [])];
  }
  close();
  return messages;
}

// The results of an answer's calls, in their order.
export function resultsOf(path, place) {
  const results = [];
  while (path[place + 1 + results.length]?.message.role === "tool") results.push(path[place + 1 + results.length]);
  return results;
}

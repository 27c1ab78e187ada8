"use strict";
// The record of one run, in #data: what page.py packed, unpacked. Token texts are untrusted, here and in the
// other files: they reach the page as textContent only.

const data = JSON.parse(document.getElementById("data").textContent);
const { layers, heads, window: reach } = data.model;
const T = data.tokens.length;
const text = (id) => data.texts[id];
const tokenAt = (position) => text(data.tokens[position]);
const span = (step) =>
  step.end - step.start === 1 ? `position ${step.start}` : `positions ${step.start} to ${step.end - 1}`;
let lensIds, lensProbabilities, following, norms; // tables of numbers, unpacked in `unpackTables`

// The way back from `pack` in page.py: base64, deflate, numbers of the given type.
async function unpack(packed, Numbers) {
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Numbers(await new Response(stream).arrayBuffer());
}

async function unpackTables() {
  [lensIds, lensProbabilities, following, norms] = await Promise.all([
    unpack(data.lens_ids, Uint32Array),
    unpack(data.lens_probabilities, Uint16Array),
    unpack(data.following, Uint16Array),
    unpack(data.norms, Float32Array),
  ]);
}

const unpacked = new Map(); // layer -> its attention weights; the last few, since a 7B's take 4 MB each
async function attentionOf(layer) {
  if (!unpacked.has(layer)) {
    if (unpacked.size > 8) unpacked.delete(unpacked.keys().next().value);
    unpacked.set(layer, await unpack(data.attention[layer], Uint8Array));
  }
  return unpacked.get(layer);
}

// Weights are stored row by row without the future: row t has t + 1 of them.
const weightAt = (weights, head, row, column) =>
  weights[(head * T * (T + 1)) / 2 + (row * (row + 1)) / 2 + column] / 255;
const lensAt = (layer, position, rank) => {
  const at = (layer * T + position) * data.top + rank;
  return { id: lensIds[at], p: lensProbabilities[at] / 65535 };
};
const surpriseAt = (position) => 1 - following[layers * T + position - 1] / 65535;
const stepOf = (position) => data.steps.findIndex((step) => position < step.end);
// In the order of page_data: hidden states (layers + 1), what attention adds (layers), what the MLP adds (layers).
const normAt = (row, position) => Math.max(norms[row * T + position], 1e-9);
const total = (step) => step.times.reduce((sum, ms) => sum + ms, 0);

const tables = []; // for each step the position that each slot holds behind it, -1: empty
for (const step of data.steps) {
  const table = Int32Array.from(tables.length ? tables[tables.length - 1] : new Array(data.slots).fill(-1));
  for (const [slot, position] of step.writes) table[slot] = position;
  tables.push(table);
}

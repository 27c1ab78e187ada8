// Small values in localStorage, and what tells this tab from others. A browser may refuse all of it.

export function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`mistral.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function write(name, value) {
  try {
    localStorage.setItem(`mistral.${name}`, JSON.stringify(value));
  } catch {
    // The value lasts as long as the page.
  }
}

// A name for something new; randomUUID is missing on pages that came over plain http from another machine.
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// The same after a reload, another in another tab.
export const tab = (() => {
  try {
    const known = sessionStorage.getItem("mistral.tab") ?? newId();
    sessionStorage.setItem("mistral.tab", known);
    return known;
  } catch {
    return newId();
  }
})();

let inMemory = "";
export function apiKey(given) {
  if (given !== undefined) inMemory = given;
  try {
    if (given !== undefined) sessionStorage.setItem("mistral.key", given);
    return sessionStorage.getItem("mistral.key") ?? inMemory;
  } catch {
    return inMemory;
  }
}

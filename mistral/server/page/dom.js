// Elements, icons, the clipboard. Text reaches the page as text nodes only; see markdown.js for the one exception.

export const $ = (id) => document.getElementById(id);

// An element: properties by their names, attributes that have a hyphen (aria-label) or are `role`, then its children.
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else if (name === "dataset") Object.assign(made.dataset, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

const PATHS = {
  menu: "M4 7h16M4 12h16M4 17h10",
  close: "M6 6l12 12M18 6L6 18",
  plus: "M12 5v14M5 12h14",
  search: "M11 18a7 7 0 1 0 0-14 7 7 0 0 0 0 14zM16 16l4.5 4.5",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7.5 7.5h9v9h-9z",
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  check: "M5 12.5l4.5 4.5L19 7.5",
  edit: "M4 20l1-4.5L16 4.5l3.5 3.5L8.5 19z",
  retry: "M19 12a7 7 0 1 1-2.2-5.1M19.5 3.5v4.5H15",
  left: "M14.5 6l-6 6 6 6",
  right: "M9.5 6l6 6-6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  trash: "M5 7h14M10 7V4.5h4V7M7 7l.8 12.5h8.4L17 7M10.5 11v5M13.5 11v5",
  download: "M12 4v11M7.5 11l4.5 4.5 4.5-4.5M5 20h14",
  settings: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.5v5M9 14.5v5",
  light: "M12 16a4 4 0 1 0 0-8 4 4 0 0 0 0 8zM12 3v2M12 19v2M3 12h2M19 12h2M5.6 5.6L7 7M17 17l1.4 1.4M18.4 5.6L17 7M7 17l-1.4 1.4",
  dark: "M19.5 14.5A8 8 0 1 1 9.5 4.5a6.5 6.5 0 0 0 10 10z",
  auto: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16M12 8h5.5M12 12h8M12 16h5.5",
  help: "M9 9.5a3 3 0 1 1 4.3 2.7c-.9.5-1.3 1-1.3 2.3M12 18v.1",
  run: "M4 12h3.5l2.5-7 4 14 2.5-7H20",
  tool: "M14.5 6.5a4 4 0 0 1 5-1l-2.5 2.5 1.5 2 2.5-2a4 4 0 0 1-5.5 4.5L9 19a2 2 0 0 1-3-3l6-6.5a4 4 0 0 1 2.5-3z",
  inside: "M2.5 12S6 5.5 12 5.5 21.5 12 21.5 12 18 18.5 12 18.5 2.5 12 2.5 12zM12 15a3 3 0 1 0 0-6 3 3 0 0 0 0 6z",
  warn: "M12 4l9 16H3zM12 10v4.5M12 17.2v.1",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

// A button with an icon and, if it is not to be read from the icon alone, a text.
export function button(name, label, onclick, text = null) {
  const made = el("button", { type: "button", className: text ? "with-icon" : "icon", onclick }, icon(name), text);
  if (!text) made.setAttribute("aria-label", label);
  made.title = label;
  return made;
}

export async function copy(text, pressed) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    done = copyWithoutPermission(text); // a page that did not come by https or from this machine
  }
  const before = [...pressed.childNodes];
  pressed.replaceChildren(icon(done ? "check" : "warn"), ...before.slice(1));
  say(done ? "Copied" : "Could not copy");
  setTimeout(() => pressed.replaceChildren(...before), 1500);
}

function copyWithoutPermission(text) {
  const area = el("textarea", { value: text, className: "unseen" });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

export function download(name, text, type) {
  const link = el("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// A line for screen readers.
export function say(text) {
  $("live").textContent = text;
}

// The message box has the focus again. On a phone that would open the keyboard.
export function focusBox() {
  if (!matchMedia("(pointer: coarse)").matches) $("composer-text").focus();
}

export function dialog(title, ...children) {
  const heading = el("h2", { textContent: title, tabIndex: -1, autofocus: true, id: `title-${crypto.getRandomValues(new Uint32Array(1))[0]}` });
  const close = button("close", "Close", () => made.close());
  const made = el("dialog", { "aria-labelledby": heading.id }, el("div", { className: "bar" }, heading, close), ...children);
  made.addEventListener("close", () => made.remove());
  // A click on the backdrop is one on the dialog itself, outside of its box.
  made.addEventListener("click", (event) => {
    const box = made.getBoundingClientRect();
    const inside = event.clientX >= box.left && event.clientX <= box.right && event.clientY >= box.top && event.clientY <= box.bottom;
    if (event.target === made && !inside) made.close();
  });
  document.body.append(made);
  made.showModal();
  return made;
}

// Whether the person says yes.
export function confirmed(question, yes) {
  return new Promise((resolve) => {
    let answer = false;
    const accept = el("button", { type: "button", className: "primary", textContent: yes, onclick: () => ((answer = true), asked.close()) });
    const refuse = el("button", { type: "button", textContent: "Cancel", onclick: () => asked.close() });
    const asked = dialog(question, el("div", { className: "choices" }, refuse, accept));
    asked.addEventListener("close", () => resolve(answer));
    accept.focus();
  });
}

export const kilo = (count) => count.toLocaleString("en");

// What a text of any length shows: the beginning, and how much more there is.
export function shortened(text, most, label) {
  const pre = el("pre", { className: "plain", tabIndex: 0 }, text.slice(0, most));
  if (text.length <= most) return pre;
  const rest = el("button", {
    type: "button",
    className: "quiet",
    textContent: `${label} of ${kilo(text.length)} characters; the first ${kilo(most)} are shown. Show all`,
    onclick: () => (pre.replaceChildren(text), rest.remove()),
  });
  return el("div", {}, pre, rest);
}

// A small box beside what the mouse, the keyboard or a finger is at.

import { $ } from "./dom.js";

// Over the elements in `place` that match `selector`, the box has what `content` returns.
export function attach(place, content, selector) {
  const at = (event) => event.target.closest?.(selector);
  const open = (event) => {
    const target = at(event);
    if (target && place.contains(target)) show(target, content(target));
  };
  place.addEventListener("pointerover", open);
  place.addEventListener("focusin", open);
  place.addEventListener("click", open);
  place.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  place.addEventListener("focusout", hide);
}

function show(target, content) {
  const box = $("popover");
  box.replaceChildren(...content);
  box.hidden = false;
  place(target);
}

function place(target) {
  const box = $("popover");
  const from = target.getBoundingClientRect();
  const panel = target.closest("#run")?.getBoundingClientRect().left ?? 0;
  const lowest = innerHeight - box.offsetHeight - 8;
  let left = Math.min(Math.max(8, from.left), innerWidth - box.offsetWidth - 8);
  let top = from.top - box.offsetHeight - 6;
  if (panel > 2 * box.offsetWidth) {
    left = panel - box.offsetWidth - 8; // beside the panel, which has room
    top = Math.min(from.top - 12, lowest);
  } else if (top <= 8) {
    top = Math.min(from.bottom + 6, lowest); // below the target
  }
  box.style.setProperty("left", `${left}px`);
  box.style.setProperty("top", `${Math.max(8, top)}px`);
}

// What the keyboard is at may have been scrolled into view just now: its box moves with it.
function scrolled() {
  const at = document.activeElement;
  if (!$("popover").hidden && at.closest("#run [data-at]")) place(at);
  else hide();
}

document.addEventListener("scroll", scrolled, { capture: true, passive: true });

export function hide() {
  $("popover").hidden = true;
}

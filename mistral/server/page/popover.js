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
  const from = target.getBoundingClientRect();
  const free = target.closest("#run")?.getBoundingClientRect().left ?? 0; // beside the panel, if there is room
  const isBeside = free > 2 * box.offsetWidth;
  const above = from.top - box.offsetHeight - 6;
  const lowest = innerHeight - box.offsetHeight - 8;
  const left = isBeside ? free - box.offsetWidth - 8 : Math.min(Math.max(8, from.left), innerWidth - box.offsetWidth - 8);
  const top = isBeside ? Math.min(from.top - 12, lowest) : above > 8 ? above : Math.min(from.bottom + 6, lowest);
  box.style.setProperty("left", `${left}px`);
  box.style.setProperty("top", `${Math.max(8, top)}px`);
}

document.addEventListener("scroll", hide, { capture: true, passive: true });

export function hide() {
  $("popover").hidden = true;
}

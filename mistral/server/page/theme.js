"use strict";
// The colours, before anything is drawn: those that were chosen, or those of the system.
try {
  const chosen = JSON.parse(localStorage.getItem("mistral.theme"));
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // A browser may refuse storage: then the system's colours are taken.
}

// What each forward pass cost: a bar a pass, as high as its milliseconds.

import { el, kilo } from "./dom.js";
import * as popover from "./popover.js";

const MOST = 160; // bars; the last ones are drawn
const KINDS = { prompt: "reads the prompt", step: "one token", forced: "reads forced tokens", verify: "checks drafted tokens" };

export class Passes {
  constructor() {
    this.bars = el("div", { className: "bars", role: "img", tabIndex: 0 });
    this.axis = el("p", { className: "soft" });
    this.element = el("div", {}, this.bars, this.axis);
    this.forwards = [];
    popover.attach(this.bars, (bar) => this.told(Number(bar.dataset.at)), "i[data-at]");
  }

  show(id, details) {
    const forwards = details?.forwards ?? [];
    if (id === this.id && forwards.length === this.forwards.length) return;
    this.id = id;
    this.forwards = [...forwards];
    const shown = forwards.slice(-MOST);
    const first = forwards.length - shown.length;
    // Steps are much cheaper than the prompt: a root keeps both visible.
    const most = Math.max(...shown.map(({ ms }) => ms), 1e-9);
    const bars = shown.map(({ ms, kind }, i) => {
      const bar = el("i", { className: kind, dataset: { at: first + i } });
      bar.style.setProperty("--height", Math.sqrt(ms / most));
      return bar;
    });
    this.bars.replaceChildren(...bars);
    this.axis.textContent = forwards.length ? this.summary() : "";
    this.bars.setAttribute("aria-label", this.axis.textContent || "no forward passes yet");
  }

  summary() {
    const total = this.forwards.reduce((sum, { ms }) => sum + ms, 0);
    const steps = this.forwards.filter(({ kind }) => kind === "step").map(({ ms }) => ms).sort((a, b) => a - b);
    const middle = steps.length ? `; a step takes ${steps[steps.length >> 1].toFixed(1)} ms (median)` : "";
    const left = this.forwards.length > MOST ? ` The last ${MOST} are drawn.` : "";
    return `${kilo(this.forwards.length)} passes, ${(total / 1000).toFixed(2)} s${middle}. Heights: square root of the time.${left}`;
  }

  told(at) {
    const { n, ms, kind, rows, tokens } = this.forwards[at];
    return [
      el("strong", { textContent: `Forward pass ${n}` }),
      el("p", { textContent: `${KINDS[kind] ?? kind}: ${ms.toFixed(2)} ms` }),
      el("p", { textContent: `${kilo(tokens)} ${tokens === 1 ? "token" : "tokens"}, ${rows} ${rows === 1 ? "row" : "rows"} in the batch` }),
    ];
  }

  legend() {
    return el("p", { className: "legend" }, ...Object.entries(KINDS).map(([kind, text]) => el("span", {}, el("i", { className: `key ${kind}` }), text)));
  }
}

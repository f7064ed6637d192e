// Two videos that are ticked to be compared.

import { h } from "./dom.js";

const HINT = "Tick two to compare.";

export class Picks {
  /** `hint`: the element that says what to tick. `compare` receives the places of two outputs. */
  constructor(hint, compare) {
    Object.assign(this, { hint, compare, picked: [] });
    hint.textContent = HINT;
  }

  /** A box to tick for the output at `place`. */
  box(name, place) {
    const box = h("input", { type: "checkbox", "aria-label": `Compare ${name}` });
    box.addEventListener("change", () => this.#pick(box, place));
    return h("label", { class: "pick" }, box);
  }

  clear() {
    for (const { box } of this.picked) box.checked = false;
    this.picked = [];
    this.hint.textContent = HINT;
  }

  #pick(box, place) {
    this.picked = this.picked.filter((other) => other.box !== box);
    if (box.checked) this.picked.push({ box, place });
    while (this.picked.length > 2) this.picked.shift().box.checked = false;
    this.hint.textContent = this.picked.length === 1 ? "Tick one more." : HINT;
    if (box.checked && this.picked.length === 2) this.compare(...this.picked.map((other) => other.place));
  }
}

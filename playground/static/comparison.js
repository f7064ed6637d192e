// Plays two videos in step, with their difference and the PSNR of every frame. One MP4 has the three pictures side by side.

import { ApiError, compare } from "./api.js";
import { Curve } from "./curve.js";
import { capital, h, prose, refill, say, sentence } from "./dom.js";
import { list } from "./facts.js";
import { Film, playButton } from "./film.js";
import { titleOf, twoValues } from "./words.js";

export class Comparison {
  /** `back` goes back to `what`: the video, or the sweep. */
  constructor(screen, facts, back, what) {
    Object.assign(this, { screen, facts, back, what });
  }

  async open(a, b) {
    this.screen.className = "blank";
    refill(this.screen, h("div", { class: "lead", role: "status" }, h("p", { class: "big" }, "Comparing …")));
    refill(this.facts);
    try {
      this.found = await compare(a, b);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (!this.closed) this.#fail(error.message);
      return;
    }
    if (!this.closed) this.#build();
  }

  close() {
    this.closed = true;
    this.film?.close();
    this.curve?.close();
    if (document.activeElement === this.facts) this.facts.closest("[tabindex='-1']").focus();
    this.facts.removeAttribute("tabindex");
  }

  #fail(text) {
    const back = h("button", { type: "button", onclick: this.back }, `Back to the ${this.what}`);
    this.screen.replaceChildren(h("div", { class: "lead", role: "alert" }, h("p", { class: "big" }, "The videos were not compared."), h("p", {}, prose(text)), back));
  }

  #build() {
    const { found } = this;
    const [a, b] = found.titles;
    this.canvases = [a, b, `Difference × ${found.gain}`].map((title) =>
      h("canvas", { width: found.width, height: found.height, role: "img", "aria-label": title }),
    );
    const figures = this.canvases.map((canvas) =>
      h("figure", {}, canvas, h("figcaption", {}, canvas.getAttribute("aria-label"))),
    );
    const toggle = playButton(() => this.film);
    this.readout = h("p", { class: "frame" });
    this.curve = new Curve(found.frames, (frame) => this.#seek(frame));
    this.screen.className = "comparison";
    this.divider = h("input", { type: "range", class: "divider", min: 0, max: 100, value: 50, "aria-label": `Divider: left of it ${a}, right of it ${b}` });
    this.divider.addEventListener("input", () => this.#divide());
    const panes = h("div", { class: found.width > found.height ? "panes" : "panes upright" }, figures, this.divider, this.curve.node);
    this.panes = panes;
    this.way = h("button", { type: "button", onclick: () => this.#show(!this.overlaid) });
    for (const side of ["width", "height"]) panes.style.setProperty(`--${side}`, found[side]);
    const back = h("button", { type: "button", class: "quiet", onclick: this.back }, `Back to the ${this.what}`);
    const tools = h("div", { class: "tools" }, toggle, this.way, this.readout, h("span", { class: "gap" }), back);
    this.screen.replaceChildren(panes, tools);
    this.#show(localStorage.comparison !== "side by side");
    this.#divide();
    this.curve.draw();
    this.#facts();
    this.film = new Film({ ...found, frames: found.frames.length }, (frame) => this.#draw(frame), { toggle });
    say(found.verdict.text);
  }

  /** Show A over B with a divider to move, or the two and their difference side by side. */
  #show(overlaid) {
    this.overlaid = overlaid;
    localStorage.comparison = overlaid ? "slider" : "side by side";
    this.panes.classList.toggle("overlaid", overlaid);
    this.divider.hidden = !overlaid;
    this.way.textContent = overlaid ? "Side by side" : "Slider";
  }

  #divide() {
    this.panes.style.setProperty("--divide", `${this.divider.value}%`);
  }

  #facts() {
    const { found } = this;
    const [head, ...rest] = found.verdict.text.split(": ");
    const differ = Object.entries(found.settings ?? {});
    const rows = differ.map(([name, { a, b }]) => h("li", {}, h("h4", {}, titleOf(name)), twoValues(a, b)));
    this.facts.tabIndex = 0; // so that the keyboard can scroll it; there is nothing in it to focus
    this.facts.replaceChildren(
      h("h2", {}, capital(head)),
      h("p", { class: "said" }, sentence(rest.join(": "))),
      found.verdict.advice ? h("p", { class: "said" }, sentence(found.verdict.advice)) : "",
      found.uncommon.length ? h("ul", { class: "warnings" }, found.uncommon.map((text) => h("li", {}, prose(text)))) : "",
      h("h3", {}, "All frames"),
      list({
        PSNR: found.psnr === null ? "equal" : `${found.psnr.toFixed(2)} dB`,
        SSIM: found.ssim.toFixed(4),
        "Largest difference": `${found.max_difference} of 255`,
      }),
      h("h3", {}, "Settings that differ"),
      found.settings === null
        ? h("p", { class: "soft" }, "Only one of the two has settings; a sample of the trainer has none.")
        : differ.length
          ? h("ul", { class: "differing" }, rows)
          : h("p", { class: "soft" }, "None."),
    );
  }

  #draw(frame) {
    const { width, height } = this.found;
    this.canvases.forEach((canvas, index) => {
      canvas.getContext("2d").drawImage(this.film.video, index * width, 0, width, height, 0, 0, width, height);
    });
    this.readout.textContent = this.curve.mark(frame);
  }

  #seek(frame) {
    this.film.seek(frame);
    this.readout.textContent = this.curve.mark(frame);
  }
}

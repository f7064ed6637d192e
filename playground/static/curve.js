// Draws the PSNR of every frame. The curve is a slider too: point at a frame, or use the arrow keys.

import { h, s } from "./dom.js";

const MARGIN = { left: 60, right: 16, top: 12, bottom: 40 };

export class Curve {
  /** `frames` have a `psnr` in dB, or null for equal frames. `onseek` receives the number of a frame. */
  constructor(frames, onseek) {
    this.frames = frames;
    this.onseek = onseek;
    this.frame = 0;
    this.width = this.height = 200;
    this.node = h("div", {
      class: "curve",
      role: "slider",
      tabindex: "0",
      "aria-label": "Frame",
      "aria-valuemin": 1,
      "aria-valuemax": frames.length,
      onkeydown: (event) => this.#key(event),
      onpointermove: (event) => this.#point(event),
      onpointerdown: (event) => this.#point(event),
    });
    const known = frames.map(({ psnr }) => psnr).filter((psnr) => psnr !== null);
    this.low = known.length ? Math.floor(Math.min(...known) / 5) * 5 : 0;
    this.high = known.length ? Math.max(Math.ceil(Math.max(...known) / 5) * 5, this.low + 5) : 50;
    this.anyEqual = known.length < frames.length;
    if (this.anyEqual && known.length) this.high += 5; // equal frames are drawn above all others
    this.watcher = new ResizeObserver(() => this.draw());
    this.watcher.observe(this.node);
  }

  close() {
    this.watcher.disconnect();
  }

  #x(frame) {
    const last = this.frames.length - 1;
    return MARGIN.left + (last ? frame / last : 0.5) * (this.width - MARGIN.left - MARGIN.right);
  }

  #y(psnr) {
    const share = psnr === null ? 1 : (psnr - this.low) / (this.high - this.low);
    return this.height - MARGIN.bottom - share * (this.height - MARGIN.top - MARGIN.bottom);
  }

  draw() {
    this.width = Math.max(this.node.clientWidth, 120);
    this.height = Math.max(this.node.clientHeight, 120);
    const right = this.width - MARGIN.right;
    const known = this.frames.some(({ psnr }) => psnr !== null);
    const levels = known ? this.#levels() : [];
    const rows = [...levels.filter((level) => !this.anyEqual || level !== this.high), ...(this.anyEqual ? [null] : [])].map((level) => [
      s("line", { class: "grid", x1: MARGIN.left, x2: right, y1: this.#y(level), y2: this.#y(level) }),
      s("text", { x: MARGIN.left - 8, y: this.#y(level) + 4, "text-anchor": "end" }, level === null ? "equal" : String(level)),
    ]);
    const last = this.frames.length - 1;
    const ticks = [...new Set([0, 0.25, 0.5, 0.75, 1].map((share) => Math.round(share * last)))];
    const points = this.frames.map(({ psnr }, frame) => `${this.#x(frame)},${this.#y(psnr)}`);
    this.cursor = s("line", { class: "cursor", y1: MARGIN.top, y2: this.height - MARGIN.bottom });
    this.dot = s("circle", { class: "dot", r: 4.5 });
    this.node.replaceChildren(
      s(
        "svg",
        { width: this.width, height: this.height, "aria-hidden": "true" },
        rows,
        ticks.map((frame) => s("text", { x: this.#x(frame), y: this.height - MARGIN.bottom + 17, "text-anchor": "middle" }, String(frame + 1))),
        s("text", { class: "axis", x: (MARGIN.left + right) / 2, y: this.height - 6, "text-anchor": "middle" }, "Frame"),
        s("text", { class: "axis", x: -(this.height - MARGIN.bottom + MARGIN.top) / 2, y: 13, "text-anchor": "middle", transform: "rotate(-90)" }, "PSNR, dB"),
        s("polyline", { class: "line", points: points.join(" ") }),
        this.cursor,
        this.dot,
      ),
    );
    this.mark(this.frame);
  }

  /** At most four round values for the axis. */
  #levels() {
    const step = [5, 10, 20, 50].find((step) => (this.high - this.low) / step <= 3.5) ?? 100;
    const count = Math.floor((this.high - this.low) / step);
    return Array.from({ length: count + 1 }, (_, index) => this.low + index * step);
  }

  /** Move the cursor to a frame. Returns its text. */
  mark(frame) {
    this.frame = frame;
    const { psnr } = this.frames[frame];
    for (const [element, names] of [[this.cursor, ["x1", "x2"]], [this.dot, ["cx"]]]) {
      for (const name of names) element?.setAttribute(name, this.#x(frame));
    }
    this.dot?.setAttribute("cy", this.#y(psnr));
    const text = `Frame ${frame + 1} of ${this.frames.length}, ${psnr === null ? "equal" : `${psnr.toFixed(1)} dB`}`;
    this.node.setAttribute("aria-valuenow", frame + 1);
    this.node.setAttribute("aria-valuetext", text);
    return text;
  }

  #point(event) {
    const share = (event.clientX - this.node.getBoundingClientRect().left - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right);
    const frame = Math.round(Math.min(Math.max(share, 0), 1) * (this.frames.length - 1));
    if (frame !== this.frame || event.type === "pointerdown") this.onseek(frame);
  }

  #key(event) {
    const last = this.frames.length - 1;
    const to = {
      ArrowRight: this.frame + 1,
      ArrowUp: this.frame + 1,
      ArrowLeft: this.frame - 1,
      ArrowDown: this.frame - 1,
      PageUp: this.frame + 5,
      PageDown: this.frame - 5,
      Home: 0,
      End: last,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.onseek(Math.min(Math.max(to, 0), last));
  }
}

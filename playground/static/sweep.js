// A sweep on the screen: its cells play in step, and fill as they finish. All are cut from one video; see film.js.

import { ApiError, gridOf } from "./api.js";
import { h, prose, refill, seconds, sentence, tell, twoPresses } from "./dom.js";
import { Film, playButton } from "./film.js";
import { Picks } from "./picks.js";
import { inAWord } from "./progress.js";
import { tableOf } from "./table.js";

export const cellsOf = (sweep) => sweep.cells.flat();
const OPEN = ["waiting", "queued", "running"];
const count = (cells, ...states) => cells.filter(({ status }) => states.includes(status)).length;

/** What a sweep has come to: "7 of 12 videos, 1 failed, about 3 min left." */
export function standing(sweep) {
  const cells = cellsOf(sweep);
  const [open, failed, cancelled] = [count(cells, ...OPEN), count(cells, "failed"), count(cells, "cancelled")];
  const left = open && sweep.seconds ? `about ${seconds(sweep.seconds * open)} left on one worker` : "";
  const parts = [`${count(cells, "done")} of ${cells.length} videos`, failed && `${failed} failed`, cancelled && `${cancelled} not made`, left];
  return sentence(parts.filter(Boolean).join(", "));
}

export class SweepView {
  /** `actions`: `open` a cell's run, `compare` two outputs, `cancel`, `again` for a cell's place or all, and `remove`. */
  constructor(screen, facts, actions, sweep) {
    Object.assign(this, { screen, actions, sweep, drawn: "", rests: 0, shown: new Map(), toolsShown: {} });
    this.toggle = playButton(() => this.film);
    this.position = h("input", { type: "range", min: 0, value: 0, "aria-label": "Frame", class: "position" });
    this.position.addEventListener("input", () => this.film.seek(Number(this.position.value)));
    this.readout = h("span", { class: "frame" });
    this.player = h("div", { class: "tools player-tools", hidden: true }, this.toggle, this.position, this.readout);
    this.standing = h("p", { class: "readout" });
    this.progress = h("progress", { "aria-label": "Progress of the sweep" });
    this.trouble = h("div", { class: "trouble", role: "status", hidden: true });
    this.tools = h("div", { class: "tools" });
    this.picks = new Picks(h("p", { class: "soft hint" }), actions.compare);
    this.table = tableOf(sweep, (row, column) => h("div", { class: "cell", "data-place": sweep.cells[row][column].place }));
    this.table.setAttribute("aria-label", `Videos of sweep ${sweep.number}`);
    const [width, height] = sweep.size; // so that the table keeps its shape while it fills
    if (width && height) this.table.style.setProperty("--shape", `${width} / ${height}`);
    this.table.addEventListener("keydown", (event) => this.#move(event));
    screen.className = "sweep";
    refill(facts);
    refill(screen, h("div", { class: "sweep-head" }, h("h2", {}, `Sweep ${sweep.number}`), h("p", { class: "soft one-line", title: sweep.title }, sweep.title), this.standing, this.progress), this.trouble, this.table, this.player, h("div", { class: "sweep-foot" }, this.picks.hint, this.tools));
    this.update(sweep);
  }

  close() {
    this.closed = true;
    this.film?.close();
  }

  /** Show what the sweep has come to since. */
  update(sweep) {
    this.sweep = sweep;
    const cells = cellsOf(sweep);
    this.standing.textContent = standing(sweep);
    this.progress.max = cells.length;
    this.progress.value = cells.length - count(cells, ...OPEN);
    this.progress.hidden = !sweep.is_open;
    this.picks.hint.hidden = count(cells, "done") < 2;
    const trouble = sweep.trouble || cells.map((cell) => cell.trouble).find(Boolean);
    this.trouble.hidden = !trouble;
    tell(this.trouble, trouble ? h("p", {}, prose(sentence(trouble)), " The sweep goes on when a worker answers.") : "");
    for (const cell of cells) this.#fill(cell);
    this.#fillTools(cells);
    this.#drawGrid(cells);
  }

  #fillTools(cells) {
    const { is_open, number } = this.sweep;
    const missing = is_open ? 0 : count(cells, "failed", "cancelled");
    const url = this.grid?.url;
    refill(
      this.tools,
      this.#tool("again", missing, () => missing > 0 && h("button", { type: "button", onclick: () => this.actions.again() }, missing === 1 ? "Make the missing one" : `Make the ${missing} missing`)),
      this.#tool("download", url, () => url && h("a", { class: "button quiet", href: url, download: `sweep-${number}.mp4` }, "Download the grid")),
      this.#tool("end", is_open, () => (is_open ? h("button", { type: "button", onclick: (event) => this.#stop(event.target) }, "Cancel") : twoPresses("Delete", "Really delete", () => this.actions.remove()))),
    );
  }

  /** The tool that was made last for this state, or else a new one. */
  #tool(name, state, make) {
    if (!(name in this.toolsShown) || this.toolsShown[name].state !== state) this.toolsShown[name] = { state, node: make() };
    return this.toolsShown[name].node;
  }

  #stop(button) {
    if (button.ariaDisabled) return;
    button.ariaDisabled = "true";
    button.textContent = "Stopping";
    this.actions.cancel();
  }

  // Cells

  #fill(cell) {
    const state = JSON.stringify([cell.status, cell.job, cell.code, cell.error, cell.trouble, cell.progress]);
    const before = this.shown.get(cell.place);
    if (before?.state === state) return;
    const node = this.screen.querySelector(`[data-place="${cell.place}"]`);
    node.dataset.status = cell.status;
    if (before?.button && before.job === cell.job && OPEN.includes(cell.status)) {
      before.state = state;
      this.#goesOn(cell, before); // the button stays, with the focus and what was pressed
      return;
    }
    const now = { state, job: cell.job };
    this.shown.set(cell.place, now);
    const make = { done: () => this.#done(cell, now), failed: () => this.#failed(cell), cancelled: () => this.#cancelled(cell) }[cell.status] ?? (() => this.#open(cell, now));
    const had = node.contains(document.activeElement);
    refill(node, make());
    if (had) node.querySelector("button")?.focus();
  }

  #done(cell, now) {
    now.canvas = h("canvas", { hidden: true, "aria-hidden": "true" });
    const still = cell.poster?.file ?? (cell.play.endsWith(".mp4") || cell.format === "mp4" ? null : cell.play);
    now.still = still ? h("img", { src: still, alt: "" }) : h("video", { src: cell.play, preload: "metadata" });
    for (const side of ["width", "height"]) now.still.setAttribute(side, cell[side]);
    const open = h("button", { type: "button", class: "open-cell", "aria-label": `Open ${cell.title}`, title: cell.title, onclick: () => this.actions.open(cell) }, now.still, now.canvas);
    return [open, this.picks.box(cell.title, cell.file.replace("/files/", ""))];
  }

  #open(cell, now) {
    if (!cell.job) return h("span", { class: "state soft" }, "Waiting");
    now.word = h("span");
    now.button = h("button", { type: "button", class: "state", onclick: () => this.actions.open(cell) }, now.word);
    this.#goesOn(cell, now);
    return now.button;
  }

  #goesOn(cell, { word, button }) {
    word.textContent = cell.status === "queued" ? "Queued" : inAWord({ ...cell, number: cell.job });
    const isPercent = word.textContent.endsWith("%");
    word.className = isPercent ? "big" : "soft";
    // Without the percentage, which a screen reader would read out at each step.
    button.ariaLabel = `Open ${cell.title}: ${isPercent ? "Denoising" : word.textContent}`;
  }

  #failed(cell) {
    return h(
      "div",
      { class: "state" },
      h("p", { class: "code" }, cell.code),
      h("p", { class: "why", title: cell.error }, prose(sentence(cell.error))),
      h("p", { class: "state-buttons" }, this.#again(cell), cell.job ? h("button", { type: "button", class: "link", "aria-label": `Open ${cell.title}`, onclick: () => this.actions.open(cell) }, "Open") : ""),
    );
  }

  #cancelled(cell) {
    return h("div", { class: "state" }, h("p", { class: "soft" }, "Not made"), this.#again(cell, "Make it"));
  }

  #again(cell, text = "Make again") {
    return h("button", { type: "button", class: "link", "aria-label": `${text}: ${cell.title}`, onclick: () => this.actions.again(cell.place) }, text);
  }

  /** Put the focus on the cell with this place, or on the screen if it has nothing to open. */
  focus(place) {
    (this.screen.querySelector(`[data-place="${place}"] button`) ?? this.screen.closest("[tabindex='-1']")).focus();
  }

  /** Arrow keys go from cell to cell. */
  #move(event) {
    const [down, across] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key] ?? [];
    const here = event.target.closest(".cell");
    if (down === undefined || !here || event.target.matches("[type=checkbox]")) return;
    event.preventDefault();
    const places = this.sweep.cells.map((row) => row.map(({ place }) => place));
    let row = places.findIndex((all) => all.includes(Number(here.dataset.place)));
    let column = places[row].indexOf(Number(here.dataset.place));
    while (places[(row += down)]?.[(column += across)] !== undefined) {
      const next = this.screen.querySelector(`[data-place="${places[row][column]}"] button`);
      if (next) return next.focus();
    }
  }

  // The video of all cells

  /**
   * Have the video drawn anew when more cells are done. The one before it plays on until then, and posters stand for what is
   * not in it. While the sweep goes on, this computer draws a quarter of the time at most.
   */
  async #drawGrid(cells) {
    const done = JSON.stringify(cells.filter(({ status }) => status === "done").map(({ place, job }) => [place, job]));
    if (done === this.drawn || done === "[]" || this.drawing || this.closed) return;
    if (this.sweep.is_open && performance.now() < this.rests) return;
    const began = performance.now();
    this.drawing = true;
    try {
      await this.#take(await gridOf(this.sweep.number));
      this.drawn = done;
    } catch (error) {
      if (error instanceof ApiError) this.drawn = done; // the posters stay; the next cell tries again
      else if (!(error instanceof Event)) throw error; // an Event: a newer video has replaced this one
    } finally {
      this.drawing = false;
      this.rests = performance.now() + 3 * (performance.now() - began);
    }
    this.#fillTools(cellsOf(this.sweep));
    this.#drawGrid(cellsOf(this.sweep)); // what was done meanwhile
  }

  async #take(grid) {
    if (!grid.url || this.closed) return;
    const before = this.film;
    const now = before ? { frame: before.frame, paused: before.paused } : {};
    const film = new Film(grid, (frame) => this.#draw(film, grid, frame), { toggle: this.toggle, ...now });
    await film.ready;
    before?.close();
    if (this.closed) return film.close();
    Object.assign(this, { film, grid });
    this.position.max = grid.frames - 1;
    this.player.hidden = false;
    this.#draw(film, grid, film.frame);
  }

  #draw(film, grid, frame) {
    if (film !== this.film) return;
    for (const [place, [x, y]] of Object.entries(grid.corners)) {
      const { canvas, still } = this.shown.get(Number(place)) ?? {};
      if (!canvas) continue;
      if (canvas.width !== grid.width || canvas.height !== grid.height) Object.assign(canvas, { width: grid.width, height: grid.height });
      canvas.getContext("2d").drawImage(film.video, x, y, grid.width, grid.height, 0, 0, grid.width, grid.height);
      canvas.hidden = false;
      still.hidden = true;
    }
    this.position.value = frame;
    this.readout.textContent = `Frame ${frame + 1} of ${grid.frames}`;
    this.position.setAttribute("aria-valuetext", this.readout.textContent);
  }
}

// The strip of earlier runs: open one again, or choose two to compare.

import { h, swap } from "./dom.js";
import { changesBetween } from "./words.js";
import { outputName } from "./facts.js";
import { Picks } from "./picks.js";
import { inAWord } from "./progress.js";
import { itemsOf, placeOf } from "./stage.js";

export class Strip {
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
    this.tiles = root.querySelector("ol");
    this.picks = new Picks(root.querySelector("#picking"), actions.compare);
    this.groups = new Map();
    this.requests = new Map(); // by the number of the run
    this.sweeps = new Map(); // by the number of the sweep
  }

  /** Add or update the tile of a sweep. It stands between the runs before and after it; its own runs have no tiles. */
  putSweep(sweep) {
    this.root.hidden = false;
    const cells = sweep.cells.flat();
    const done = cells.filter(({ status }) => status === "done");
    const state = `${sweep.is_open} ${done.length}`;
    const before = this.sweeps.get(sweep.number);
    if (before?.state === state) return;
    const posters = done.slice(0, 4).map(poster);
    const open = h(
      "button",
      {
        type: "button",
        class: "open",
        "data-sweep": sweep.number,
        "aria-label": `Show Sweep ${sweep.number}`,
        onclick: () => this.actions.sweep(sweep.number),
      },
      h("span", { class: posters.length === 4 && !sweep.is_open ? "poster four" : "poster" }, sweep.is_open ? h("span", { class: "big" }, `${done.length}/${cells.length}`) : posters.length === 4 ? posters : posters[0] ?? "no video"),
      h("span", { class: "caption" }, h("b", {}, `Sweep ${sweep.number}`), `${cells.length} videos`),
    );
    const tile = h("li", {}, open);
    const after = [...this.groups.keys()].filter((number) => number > sweep.after).sort((one, other) => one - other)[0];
    this.#showHint();
    if (before) swap(before.tile, tile);
    else if (after) this.groups.get(after).tiles[0].before(tile);
    else this.tiles.append(tile);
    this.sweeps.set(sweep.number, { state, tile });
    if (this.marked?.sweep === sweep.number) open.setAttribute("aria-current", "true");
    if (!before) this.tiles.scrollLeft = this.tiles.scrollWidth;
  }

  removeSweep(number) {
    this.sweeps.get(number)?.tile.remove();
    this.sweeps.delete(number);
    this.root.hidden = !this.groups.size && !this.sweeps.size;
  }

  /** Add or update the tiles of a job: one while it runs, then one per output. */
  put(job) {
    this.root.hidden = false;
    this.requests.set(job.number, job.request);
    const before = this.groups.get(job.number);
    if (before?.status === job.status) {
      before.percent?.replaceChildren(inAWord(job));
      return;
    }
    const items = itemsOf(job);
    const group = { status: job.status, percent: h("span", { class: "big" }, "…") };
    group.tiles = items.length ? items.map((item) => this.#tile(job, item)) : [this.#waiting(job, group)];
    if (before) {
      before.tiles[0].after(...group.tiles.slice(1)); // only a run that has not ended is updated, and it has one tile
      swap(before.tiles[0], group.tiles[0]);
    } else this.tiles.append(...group.tiles);
    this.groups.set(job.number, group);
    this.#showHint();
    if (this.marked?.number === job.number) this.mark(job.number, items[0]);
    if (!before) this.tiles.scrollLeft = this.tiles.scrollWidth; // scrollIntoView would scroll the whole page
  }

  #showHint() {
    this.picks.hint.hidden = this.tiles.querySelectorAll(".pick").length < 2;
  }

  #waiting(job, group) {
    const ended = ["failed", "cancelled"].includes(job.status);
    const open = h(
      "button",
      {
        type: "button",
        class: `open ${job.status}`,
        "data-run": job.number,
        "aria-label": `Show Run ${job.number}, ${job.status}`,
        onclick: () => this.actions.open(job),
      },
      h("span", { class: "poster" }, ended ? "no video" : group.percent),
      h("span", { class: "caption" }, h("b", {}, String(job.number)), job.status),
    );
    return h("li", {}, open);
  }

  #tile(job, item) {
    const name = outputName(job, item);
    const open = h(
      "button",
      {
        type: "button",
        class: "open",
        "data-run": job.number,
        "data-file": item.file,
        "aria-label": `Show ${name}`,
        onclick: () => this.actions.open(job, item),
      },
      h("span", { class: "poster" }, poster(item)),
      h("span", { class: "caption" }, h("b", {}, String(job.number)), job.request.draft ? h("b", { class: "draft" }, "draft") : "", this.#whatChanged(job, item)),
    );
    return h("li", {}, open, this.picks.box(name, placeOf(item)));
  }

  /** What tells this run from the one before it; of several videos of one run, their prompts and seeds. */
  #whatChanged(job, item) {
    const before = [...this.requests.keys()].filter((number) => number < job.number).sort((one, other) => other - one)[0];
    const several = itemsOf(job).length > 1;
    if (job.request.prompts.length > 1) return `prompt ${item.prompt_index + 1}${item.video_index === undefined ? "" : `, seed ${item.seed}`}`;
    const rest = ({ draft, ...request }) => request; // the tile says by itself whether it is a draft
    const changes = before && !several ? changesBetween(rest(this.requests.get(before)), rest(job.request)) : "";
    return changes || `seed ${item.seed}`;
  }

  /** Remove the tiles of a deleted run. */
  remove(number) {
    for (const tile of this.groups.get(number)?.tiles ?? []) tile.remove();
    this.groups.delete(number);
    this.requests.delete(number);
    this.#showHint();
    this.root.hidden = !this.groups.size && !this.sweeps.size;
    this.picks.clear();
  }

  /** What is on the screen: a run's `item`, or a sweep, or a run of one. */
  mark(number, item, sweep) {
    this.marked = { number, sweep };
    for (const button of this.tiles.querySelectorAll(".open")) {
      const { run, file } = button.dataset;
      const here = button.dataset.sweep ? Number(button.dataset.sweep) === sweep : Number(run) === number && (!item || !file || file === item.file);
      if (here) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
  }
}

/** The worker's poster, or else the first frame of the video. */
function poster(item) {
  const source = item.poster?.file ?? (item.play.endsWith(".mp4") || item.format === "mp4" ? null : item.file);
  return source ? h("img", { src: source, alt: "", loading: "lazy" }) : h("video", { src: item.play, preload: "metadata" });
}

// The strip of earlier runs: open one again, or choose two to compare.

import { h } from "./dom.js";
import { changesBetween } from "./words.js";
import { outputName } from "./facts.js";
import { inAWord } from "./progress.js";
import { itemsOf, placeOf } from "./stage.js";

const HINT = "Tick two to compare them.";

export class Strip {
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
    this.tiles = root.querySelector("ol");
    this.hint = root.querySelector("#picking");
    this.groups = new Map();
    this.requests = new Map(); // by the number of the run
    this.picked = [];
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
      before.tiles[0].before(...group.tiles);
      for (const tile of before.tiles) tile.remove();
    } else this.tiles.append(...group.tiles);
    this.groups.set(job.number, group);
    if (this.marked?.number === job.number) this.mark(job.number, items[0]);
    if (!before) this.tiles.scrollLeft = this.tiles.scrollWidth; // scrollIntoView would scroll the whole page
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
    const pick = h("input", { type: "checkbox", "aria-label": `Compare ${name}` });
    pick.addEventListener("change", () => this.#pick(pick, placeOf(item)));
    return h("li", {}, open, h("label", { class: "pick" }, pick));
  }

  /** What tells this run from the one before it; of several videos of one run, their seeds. */
  #whatChanged(job, item) {
    const before = [...this.requests.keys()].filter((number) => number < job.number).sort((one, other) => other - one)[0];
    const several = itemsOf(job).length > 1;
    const rest = ({ draft, ...request }) => request; // the tile says by itself whether it is a draft
    const changes = before && !several ? changesBetween(rest(this.requests.get(before)), rest(job.request)) : "";
    return changes || `seed ${item.seed}`;
  }

  /** Remove the tiles of a deleted run. */
  remove(number) {
    for (const tile of this.groups.get(number)?.tiles ?? []) tile.remove();
    this.groups.delete(number);
    this.requests.delete(number);
    this.root.hidden = !this.groups.size;
    this.unpick();
  }

  #pick(box, place) {
    this.picked = this.picked.filter((other) => other.box !== box);
    if (box.checked) this.picked.push({ box, place });
    while (this.picked.length > 2) this.picked.shift().box.checked = false;
    this.hint.textContent = this.picked.length === 1 ? "Tick one more." : HINT;
    if (box.checked && this.picked.length === 2) this.actions.compare(...this.picked.map((other) => other.place));
  }

  unpick() {
    for (const { box } of this.picked) box.checked = false;
    this.picked = [];
    this.hint.textContent = HINT;
  }

  mark(number, item) {
    this.marked = { number };
    for (const button of this.tiles.querySelectorAll(".open")) {
      const here = Number(button.dataset.run) === number && (!item || !button.dataset.file || button.dataset.file === item.file);
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

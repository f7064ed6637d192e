// The stage: one run with its progress, then its video and settings.

import { calm, h, prose, refill, s, say, seconds, sentence, twoPresses } from "./dom.js";
import { Facts, outputName } from "./facts.js";
import { takesDrops } from "./fields.js";
import { doing, shownPercent, stageName, stageOf, timeLeft } from "./progress.js";

const STEPS = ["Open the folder of your training, or enter the files of a LoRA.", "Take one of its samples, or write a prompt.", "Press Run."];

export const itemsOf = (job) => [...(job.result?.outputs?.videos ?? []), ...(job.result?.outputs?.images ?? [])].sort(
  (one, other) => one.prompt_index - other.prompt_index,
);

/** An output's name in the API of the playground's process: `JOB/FILE`. */
export const placeOf = (item) => item.file.replace("/files/", "");

export class Stage {
  /** `ready`: the form holds an example that can be run. */
  constructor(screen, facts, actions, ready) {
    Object.assign(this, { screen, facts: new Facts(facts), actions });
    this.#empty(ready);
    takesDrops(screen, (file) => this.item && this.actions.sample(file, placeOf(this.item)));
  }

  /** Show a job, and of a finished one the output `item`. */
  show(job, item) {
    const items = itemsOf(job);
    const chosen = items.find((other) => other.file === item?.file) ?? items[0];
    const state = `${job.number} ${job.status} ${chosen?.file}`;
    this.item = chosen;
    if (["queued", "running"].includes(job.status)) {
      if (this.state !== state) this.#begin(job);
      this.#progress(job);
    } else if (this.state !== state) {
      ({ done: () => this.#done(job, chosen), failed: () => this.#failed(job) }[job.status] ?? (() => this.#cancelled(job)))();
    }
    this.state = state;
  }

  /** The screen shows something else now; the next `show` draws everything. */
  leave() {
    this.state = undefined;
    this.banner = this.trouble = undefined;
  }

  showTrouble(text, again) {
    if (this.trouble === text && !again) return; // it is announced once, not at every try
    this.hideTrouble();
    this.trouble = text;
    const retry = again && h("button", { type: "button", onclick: () => (this.hideTrouble(), again()) }, "Try again");
    this.banner = h("div", { class: "trouble", role: "alert" }, h("p", {}, prose(sentence(text))), retry);
    this.screen.prepend(this.banner);
  }

  hideTrouble() {
    if (this.banner?.contains(document.activeElement)) this.screen.parentElement.focus();
    this.banner?.remove();
    this.banner = this.trouble = undefined;
  }

  #fill(kind, ...children) {
    this.screen.className = kind;
    refill(this.screen, ...children);
    this.facts.clear();
    this.banner = this.trouble = undefined;
  }

  #empty(ready) {
    const text = ready
      ? h("p", {}, "The form has an example. Press ", h("b", {}, "Run"), " to make its video, or change it first.")
      : h("ol", {}, STEPS.map((step) => h("li", {}, step)));
    this.#fill("blank", h("div", { class: "lead" }, frame(), h("p", { class: "big" }, "Your video plays here"), text));
  }

  // While the job runs

  #begin(job) {
    const cancel = h("button", { type: "button", onclick: () => this.#stop(job, cancel) }, "Cancel");
    this.percent = h("p", { class: "percent" }, "…");
    this.bar = h("progress", { max: 100, "aria-label": "Progress of the run" });
    this.doing = h("p", { class: "doing" });
    const canAsk = globalThis.Notification?.permission === "default";
    const notify = h("button", { type: "button", class: "quiet", onclick: () => this.#askToNotify(notify, cancel) }, "Notify me");
    this.left = h("p", { class: "left" });
    this.#fill(
      "running",
      h(
        "div",
        { class: "making" },
        h("h2", {}, `Run ${job.number}`),
        this.percent,
        this.bar,
        h("div", { class: "making-text" }, h("div", {}, this.doing, this.left), h("div", { class: "making-buttons" }, this.#toSweep(job), canAsk ? notify : "", cancel)),
        promptsOf(job),
      ),
    );
    this.facts.show(job);
  }

  async #askToNotify(button, next) {
    const answer = await Notification.requestPermission();
    next.focus(); // the button goes
    button.remove();
    say(answer === "granted" ? "You get a notification when a run ends while you look elsewhere" : "The browser allows no notifications");
  }

  #progress(job) {
    const { progress } = job;
    this.facts.update(job);
    if (job.trouble) {
      this.percent.textContent = "No answer";
      this.doing.replaceChildren(...prose(sentence(job.trouble)));
      this.left.textContent = "Asking again.";
      return;
    }
    // The percentage is that of the denoising; the stages before and after it have none.
    if (stageOf(progress) === "denoise") this.percent.replaceChildren(String(shownPercent(progress)), h("span", {}, "%"));
    else this.percent.textContent = progress ? stageName(progress) : "Queued";
    this.bar.value = progress ? shownPercent(progress) : 0;
    this.doing.textContent = doing(progress);
    this.left.textContent = [timeLeft(progress), `${seconds(job.seconds)} so far`].filter(Boolean).join(", ");
  }

  #stop(job, button) {
    if (button.ariaDisabled) return;
    button.ariaDisabled = "true"; // not `disabled`, which would take the focus away
    button.textContent = "Stopping";
    this.actions.cancel(job);
  }

  // When the job has ended

  #done(job, item) {
    if (!item) {
      this.#fill("blank", h("div", { class: "lead" }, h("p", { class: "big" }, "The result has no files.")));
      this.facts.show(job);
      return;
    }
    const what = outputName(job, item);
    const file = h("input", { type: "file", class: "unseen", tabindex: "-1", "aria-hidden": "true", accept: "image/*,video/mp4,.zip" });
    file.addEventListener("change", () => file.files[0] && this.actions.sample(file.files[0], placeOf(item)));
    this.#fill(
      "player",
      sized(picture(item, what, (text) => this.showTrouble(text, null)), item),
      h(
        "div",
        { class: "tools" },
        file,
        this.#toSweep(job),
        h("button", { type: "button", onclick: () => file.click() }, "Compare with a sample"),
        h("span", { class: "soft tip" }, "or drop the sample on the video"),
        h("span", { class: "gap" }),
        h("button", { type: "button", class: "quiet", onclick: () => this.actions.reuse(job, item) }, "Use its settings"),
        this.#deleteButton(job),
        h("a", { class: "button quiet", href: item.file, download: `run-${job.number}-${nameOf(item)}` }, "Download"),
      ),
    );
    this.facts.show(job, item);
  }

  #failed(job) {
    const item = ({ field, text }) => h("li", {}, field ? h("code", {}, field) : "", field ? " " : "", prose(text));
    this.#fill(
      "failed",
      h(
        "div",
        { class: "lead" },
        h("p", { class: "code" }, job.code),
        h("p", { class: "big" }, `Run ${job.number} failed.`),
        job.problems.length ? h("ul", { class: "problems" }, job.problems.map(item)) : h("p", {}, prose(sentence(job.error))),
        job.problems.length
          ? h("button", { type: "button", onclick: () => (this.actions.reuse(job), this.actions.correct(job)) }, "Correct the request")
          : h("button", { type: "button", onclick: () => this.actions.reuse(job) }, "Use its settings"),
        this.#deleteButton(job),
        this.#toSweep(job),
      ),
    );
    this.facts.show(job);
  }

  #cancelled(job) {
    const again = h("button", { type: "button", onclick: () => this.actions.reuse(job) }, "Use its settings");
    this.#fill("blank", h("div", { class: "lead" }, h("p", { class: "big" }, `Run ${job.number} was cancelled.`), promptsOf(job), again, this.#deleteButton(job), this.#toSweep(job)));
    this.facts.show(job);
  }

  #deleteButton(job) {
    return twoPresses("Delete", "Really delete", () => this.actions.remove(job));
  }

  /** The way back, from a run that is a cell of a sweep. */
  #toSweep(job) {
    return job.sweep ? h("button", { type: "button", onclick: () => this.actions.sweep(job) }, `Back to sweep ${job.sweep}`) : "";
  }

  /** Nothing is shown any more. */
  clear() {
    this.leave();
    this.item = undefined;
    this.#empty(true);
  }
}

/** A drawing in the place of the video. */
const frame = () =>
  s(
    "svg",
    { class: "ghost", viewBox: "0 0 320 180", "aria-hidden": "true" },
    s("rect", { x: 0.5, y: 0.5, width: 319, height: 179, rx: 8 }),
    s("path", { d: "M148 70v40l34-20z" }),
  );

const nameOf = (item) => (item.key ?? item.file).split("/").at(-1);

function picture(item, what, onerror) {
  const moves = item.play.endsWith(".mp4") || item.format === "mp4";
  const failed = async () => onerror((await (await fetch(item.play)).json().catch(() => ({}))).error ?? "the browser cannot play it");
  if (!moves) return h("img", { class: "made", src: item.play, alt: `${what}, ${item.width} × ${item.height}`, onerror: failed });
  const video = h("video", {
    class: "made",
    src: item.play,
    width: item.width,
    height: item.height,
    poster: item.poster?.file,
    loop: true,
    controls: true,
    playsinline: true,
    autoplay: !calm.matches,
    "aria-label": what,
    onerror: failed,
  });
  video.muted = true;
  return video;
}

function sized(picture, item) {
  for (const side of ["width", "height"]) picture.style.setProperty(`--${side}`, item[side]);
  return h("div", { class: "fit" }, picture);
}

/** The prompts, shown until there is a result. */
function promptsOf(job) {
  return h("ol", { class: "asked" }, job.request.prompts.map(({ prompt }) => h("li", {}, prompt)));
}

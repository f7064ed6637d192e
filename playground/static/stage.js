// The stage: one run with its progress, then its video and settings.

import { toJson } from "./api.js";
import { calm, h, prose, refill, s, seconds, sentence } from "./dom.js";
import { takesDrops } from "./fields.js";

const STAGES = {
  fetch: "Fetching",
  wait: "Waiting",
  load: "Loading",
  denoise: "Denoising",
  decode: "Decoding",
  encode: "Encoding",
  upload: "Uploading",
};
const DETAILS = {
  fetch: "LoRAs and images",
  wait: "until the GPU has finished another job",
  load: "the LoRAs into the model",
  decode: "the latents into frames",
  encode: "the frames into a file",
  upload: "the result",
};

const STEPS = ["Open the folder of your training, or enter the files of a LoRA.", "Take one of its samples, or write a prompt.", "Press Run."];

export const itemsOf = (job) => [...(job.result?.outputs?.videos ?? []), ...(job.result?.outputs?.images ?? [])].sort(
  (one, other) => one.prompt_index - other.prompt_index,
);

/** An output's name in the API of the playground's process: `JOB/FILE`. */
export const placeOf = (item) => item.file.replace("/files/", "");

/** What tells an output from the others of its run: "Run 3, prompt 2, seed 44". */
export function outputName(job, item) {
  const prompt = job.request.prompts.length > 1 ? `, prompt ${item.prompt_index + 1}` : "";
  return `Run ${job.number}${prompt}${item.video_index === undefined ? "" : `, seed ${item.seed}`}`;
}

/** After the last step the video is decoded. The worker reports that only when the first frames are decoded. */
const stageOf = (progress) =>
  progress?.stage === "denoise" && progress.step === progress.steps ? "decode" : progress?.stage;

/** The worker's percentage is that of the denoising steps. Until the file is there, the job is not done. */
const shownPercent = (progress) => Math.min(progress.percent, 99);

/** A running job's progress in one word: the percentage while it is denoised, or else the stage. */
export function inAWord(job) {
  if (job.trouble) return "No answer";
  if (job.status === "queued" || !job.progress) return "…";
  const stage = stageOf(job.progress);
  return stage === "denoise" ? `${shownPercent(job.progress)}%` : STAGES[stage] ?? stage;
}

/** A running job's progress for screen readers: it changes every 25 percent, not every step. */
export function spoken(job) {
  if (job.trouble) return `No answer for run ${job.number}`;
  if (job.status === "queued" || !job.progress) return `Run ${job.number} is waiting for a worker`;
  const stage = stageOf(job.progress);
  const quarter = Math.floor(job.progress.percent / 25) * 25;
  return `${STAGES[stage] ?? stage}${stage === "denoise" ? `, ${quarter} percent` : ""}`;
}

export class Stage {
  /** `ready`: the form holds an example that can be run. */
  constructor(screen, facts, actions, ready) {
    Object.assign(this, { screen, facts, actions });
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
    this.banner = undefined;
  }

  showTrouble(text, again) {
    this.hideTrouble();
    const retry = again && h("button", { type: "button", onclick: () => (this.hideTrouble(), again()) }, "Try again");
    this.banner = h("div", { class: "trouble", role: "alert" }, h("p", {}, prose(sentence(text))), retry);
    this.screen.prepend(this.banner);
  }

  hideTrouble() {
    if (this.banner?.contains(document.activeElement)) this.screen.parentElement.focus();
    this.banner?.remove();
    this.banner = undefined;
  }

  #fill(kind, ...children) {
    this.screen.className = kind;
    refill(this.screen, ...children);
    this.facts.replaceChildren();
    this.banner = undefined;
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
    const notify = h("button", { type: "button", class: "quiet", onclick: async () => ((await Notification.requestPermission()), notify.remove()) }, "Notify me");
    const canAsk = globalThis.Notification?.permission === "default";
    this.left = h("p", { class: "left" });
    this.#fill(
      "running",
      h(
        "div",
        { class: "making" },
        h("h2", {}, `Run ${job.number}`),
        this.percent,
        this.bar,
        h("div", { class: "making-text" }, h("div", {}, this.doing, this.left), h("div", { class: "making-buttons" }, canAsk ? notify : "", cancel)),
        promptsOf(job),
      ),
    );
  }

  #progress(job) {
    const { progress } = job;
    const name = stageOf(progress);
    if (job.trouble) {
      this.percent.textContent = "No answer";
      this.doing.replaceChildren(...prose(sentence(job.trouble)));
      this.left.textContent = "Asking again.";
      return;
    }
    // The percentage is that of the denoising; the stages before and after it have none.
    if (name === "denoise") this.percent.replaceChildren(String(shownPercent(progress)), h("span", {}, "%"));
    else this.percent.textContent = name ? STAGES[name] ?? name : "Queued";
    this.bar.value = progress ? shownPercent(progress) : 0;
    const parts = [name === "denoise" ? `Step ${progress.step} of ${progress.steps}` : name ? DETAILS[name] ?? "" : "waiting for a worker"];
    if (progress?.prompts > 1) parts.push(`video ${progress.prompt_index + 1} of ${progress.prompts}`);
    this.doing.textContent = parts.filter(Boolean).join(", ");
    const left = progress?.seconds_left;
    const known = name === "denoise" && typeof left === "number";
    this.left.textContent = `${known ? `about ${seconds(left)} left, ` : ""}${seconds(job.seconds)} so far`;
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
        h("button", { type: "button", onclick: () => file.click() }, "Compare with a sample"),
        h("span", { class: "soft tip" }, "or drop the sample on the video"),
        h("span", { class: "gap" }),
        h("button", { type: "button", class: "quiet", onclick: () => this.actions.reuse(job, item) }, "Use its settings"),
        this.#deleteButton(job),
        h("a", { class: "button quiet", href: item.file, download: `run-${job.number}-${nameOf(item)}` }, "Download"),
      ),
    );
    this.facts.replaceChildren(...factsOf(job, item));
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
      ),
    );
  }

  #cancelled(job) {
    const again = h("button", { type: "button", onclick: () => this.actions.reuse(job) }, "Use its settings");
    this.#fill("blank", h("div", { class: "lead" }, h("p", { class: "big" }, `Run ${job.number} was cancelled.`), promptsOf(job), again, this.#deleteButton(job)));
  }

  /** Two presses delete a run, so that one by mistake does not. */
  #deleteButton(job) {
    const button = h("button", { type: "button", class: "quiet", onclick: () => ("sure" in button.dataset ? this.actions.remove(job) : ask()) }, "Delete");
    const ask = () => {
      button.dataset.sure = "";
      button.textContent = "Really delete";
    };
    button.addEventListener("blur", () => {
      delete button.dataset.sure;
      button.textContent = "Delete";
    });
    return button;
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

function factsOf(job, item) {
  const { result } = job;
  const settings = result.settings ?? {};
  const prompt = settings.prompts?.find((other) => other.prompt_index === item.prompt_index && other.seed === item.seed) ?? {};
  const failed = (result.errors ?? []).map((error) => `prompts[${error.prompt_index}] failed: ${error.message}`);
  return [
    h("h2", {}, outputName(job, item)),
    h("p", { class: "said" }, prompt.prompt ?? ""),
    notes([...failed, ...(result.warnings ?? [])]),
    ...sheet(item),
    h("h3", {}, "Settings"),
    list({
      Model: result.model,
      Match: settings.match,
      Size: `${item.width} × ${item.height}`,
      Frames: item.num_frames === 1 ? "1" : `${item.num_frames} at ${item.fps} fps`,
      Seed: item.seed,
      Steps: prompt.sample_steps,
      Guidance: prompt.guidance_scale,
      Scheduler: prompt.scheduler?.replace(/Scheduler$/, ""),
      Shift: prompt.shift,
      ...Object.fromEntries((settings.loras ?? []).map((lora) => [loraName(lora), loraText(lora)])),
    }),
    h("h3", {}, "Seconds"),
    timings(result.timings ?? {}),
    cost(result.timings?.total ?? 0),
    json("Settings as JSON", { ...settings, prompts: [prompt] }),
    json("Result as JSON", withoutFiles(result)),
    json("Request as JSON", { input: job.request }),
  ];
}

const json = (title, value) =>
  h("details", { class: "fold" }, h("summary", {}, title), h("pre", { tabindex: "0" }, toJson(value, 2)));

/** The worker's answer without the addresses that this process added to it. */
const withoutFiles = (result) => JSON.parse(JSON.stringify(result, (name, value) => (["file", "play"].includes(name) ? undefined : value)));

/** What the worker's time costs, at a price per hour that is entered once. A cold start is not in it. */
function cost(total) {
  const shown = h("span", { class: "sum" });
  const price = h("input", { id: "price", type: "text", inputmode: "decimal", class: "number", autocomplete: "off", value: localStorage.price ?? "", placeholder: "0.00" });
  const tell = () => {
    const perHour = Number(price.value.replace(",", "."));
    shown.textContent = perHour > 0 ? `$${((perHour * total) / 3600).toFixed(perHour * total < 36 ? 5 : 3)}` : "";
  };
  price.addEventListener("input", () => {
    localStorage.price = price.value;
    tell();
  });
  tell();
  return h("div", { class: "cost" }, h("label", { for: "price" }, "$ per hour"), price, shown);
}

function sheet({ contact_sheet: picture }) {
  if (!picture) return [];
  const image = h("img", { src: picture.file, width: picture.width, height: picture.height, alt: "Contact sheet: frames from the first to the last" });
  return [h("h3", {}, "Contact sheet"), h("a", { class: "sheet", href: picture.file, target: "_blank" }, image)];
}

const loraName = (lora) => (lora.transformer ? `LoRA, ${lora.transformer}` : "LoRA");
const loraText = (lora) => [`× ${lora.network_multiplier}`, lora.step && `step ${lora.step}`, lora.sha256?.slice(0, 7)].filter(Boolean).join(", ");

function notes(texts) {
  if (!texts.length) return "";
  return h("ul", { class: "warnings", "aria-label": "Warnings" }, texts.map((text) => h("li", {}, prose(text))));
}

export function list(values) {
  const rows = Object.entries(values).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return h("dl", {}, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))));
}

/** The seconds of each stage, with a bar for its share of the total. */
function timings({ total, ...stages }) {
  const row = ([name, value]) => {
    const bar = h("span", { class: name === "total" ? "" : "share", "aria-hidden": "true" });
    bar.style.setProperty("--share", total ? Math.min(1, value / total) : 0);
    return h("div", {}, h("dt", {}, name), h("dd", {}, bar, value.toFixed(1)));
  };
  const shown = Object.entries(stages).filter(([, value]) => value >= 0.05);
  return h("dl", { class: "timings" }, [...shown, ["total", total ?? 0]].map(row));
}

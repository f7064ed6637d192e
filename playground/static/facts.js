// The facts beside the screen, in tabs: the details of a result, the JSON of a run, and its log.

import { toJson } from "./api.js";
import { h, prose, seconds, sentence } from "./dom.js";
import { doing, stageName, stageOf, timeLeft } from "./progress.js";

/** What tells an output from the others of its run: "Run 3, prompt 2, seed 44". */
export function outputName(job, item) {
  const prompt = job.request.prompts.length > 1 ? `, prompt ${item.prompt_index + 1}` : "";
  return `Run ${job.number}${prompt}${item.video_index === undefined ? "" : `, seed ${item.seed}`}`;
}

export class Facts {
  constructor(root) {
    this.root = root;
  }

  clear() {
    this.hadFocus = this.root.contains(document.activeElement);
    this.root.replaceChildren();
  }

  /** A run and, of a finished one, the output `item`. */
  show(job, item) {
    this.log = h("ol", { class: "log" });
    const panels = { ...(item && { Details: details(job, item) }), JSON: json(job), Log: [this.log] };
    const tabs = Object.keys(panels).map((name) => h("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `panel-${name}`, onclick: () => choose(name, true) }, name));
    const nodes = Object.entries(panels).map(([name, nodes]) => h("div", { role: "tabpanel", id: `panel-${name}`, "aria-labelledby": `tab-${name}` }, nodes));
    const choose = (name, byHand) => {
      if (byHand) this.chosen = name;
      tabs.forEach((tab, index) => {
        const here = tab.textContent === name;
        tab.setAttribute("aria-selected", String(here));
        tab.tabIndex = here ? 0 : -1;
        nodes[index].hidden = !here;
      });
    };
    const list = h("div", { class: "tabs", role: "tablist", "aria-label": "About this run" }, tabs);
    list.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
      choose(next.textContent, true);
      next.focus();
    });
    choose(this.chosen in panels ? this.chosen : item ? "Details" : "Log", false);
    const word = job.request.draft ? h("span", { class: "draft" }, "draft") : "";
    this.root.replaceChildren(h("h2", {}, item ? outputName(job, item) : `Run ${job.number}`, word), job.title ? h("p", { class: "cell-title" }, job.title) : "", list, ...nodes);
    if (this.hadFocus) tabs.find((tab) => tab.tabIndex === 0).focus();
    this.hadFocus = false;
    this.update(job);
  }

  /** The log grows while the run goes on. */
  update(job) {
    const lines = job.log.slice(this.log.children.length);
    this.log.append(...lines.map((entry) => h("li", { class: entry.kind }, h("span", { class: "soft" }, `${entry.seconds.toFixed(1)} s`), h("span", {}, prose(line(entry))))));
  }
}

/** An entry of the log in words. */
function line({ kind, progress, text }) {
  if (kind !== "progress") return sentence(text);
  const name = stageName(progress);
  if (stageOf(progress) !== "denoise") return sentence(`${name} ${doing(progress)}`);
  return sentence([`${name}, ${doing(progress).toLowerCase()}`, timeLeft(progress)].filter(Boolean).join(", "));
}

function details(job, item) {
  const { result } = job;
  const settings = result.settings ?? {};
  const prompt = settings.prompts?.find((other) => other.prompt_index === item.prompt_index && other.seed === item.seed) ?? {};
  const failed = (result.errors ?? []).map((error) => `prompts[${error.prompt_index}] failed: ${error.message}`);
  return [
    h("p", { class: "said" }, prompt.prompt ?? ""),
    draftNote(result),
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
      "Guidance, low noise": prompt.guidance_scale_2,
      ...Object.fromEntries([...(settings.loras ?? []), ...(settings.extra_loras ?? [])].map((lora) => [loraName(lora), loraText(lora)])),
    }),
    h("h3", {}, "Seconds"),
    timings(result.timings ?? {}),
    cost(secondsOf(result)),
  ];
}

function json(job) {
  const shown = { ...(job.result && { Result: withoutFiles(job.result) }), Request: { input: job.request } };
  return Object.entries(shown).map(([title, value]) => [h("h3", {}, title), h("pre", { tabindex: "0", "aria-label": title }, toJson(value, 2))]);
}

/** The worker's answer without the addresses that this process added to it. */
const withoutFiles = (result) => JSON.parse(JSON.stringify(result, (name, value) => (["file", "play"].includes(name) ? undefined : value)));

/** The seconds of the worker that a result took: without those in which it waited for another job. */
const secondsOf = ({ timings: { total = 0, wait = 0 } = {} }) => total - wait;

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

const loraName = ({ transformer, extra_lora: extra }) => (extra === undefined ? "LoRA" : `Extra LoRA ${extra + 1}`) + (transformer ? `, ${transformer}` : "");
const loraText = (lora) => [`× ${lora.network_multiplier}`, lora.step && `step ${lora.step}`, lora.sha256?.slice(0, 7)].filter(Boolean).join(", ");

function notes(texts) {
  if (!texts.length) return "";
  return h("ul", { class: "warnings", "aria-label": "Warnings" }, texts.map((text) => h("li", {}, prose(text))));
}

export function list(values) {
  const rows = Object.entries(values).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return h("dl", {}, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))));
}

/** Of a draft: how long the video takes without it. */
function draftNote({ timings: { full_run_estimate: full, generate } = {} }) {
  if (!full) return "";
  return h("p", { class: "soft" }, `A draft. The full run would take about ${seconds(full)} instead of ${seconds(generate)}.`);
}

/** The seconds of each stage, with a bar for its share of the total. */
function timings({ total, full_run_estimate: _, ...stages }) {
  const row = ([name, value]) => {
    const bar = h("span", { class: name === "total" ? "" : "share", "aria-hidden": "true" });
    bar.style.setProperty("--share", total ? Math.min(1, value / total) : 0);
    return h("div", {}, h("dt", {}, name), h("dd", {}, bar, value.toFixed(1)));
  };
  const shown = Object.entries(stages).filter(([, value]) => value >= 0.05);
  return h("dl", { class: "timings" }, [...shown, ["total", total ?? 0]].map(row));
}

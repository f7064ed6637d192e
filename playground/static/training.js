// A training's folder, dropped or chosen: the form takes its samples, and the trainer's own videos wait to be compared.

import { ApiError, readTraining } from "./api.js";
import { h, keepFocus, prose, say, sentence } from "./dom.js";

const CONFIGS = ["config.yaml", "config.yml", ".job_config.json", "config.json"];
const MAX_IMAGES = 64 * 1024 ** 2; // bytes of control images

export class Training {
  /** `onrequest` receives a request for the form. */
  constructor(root, onrequest) {
    Object.assign(this, { root, onrequest });
    this.input = h("input", { type: "file", webkitdirectory: true, multiple: true, class: "unseen", tabindex: "-1", "aria-hidden": "true" });
    this.input.addEventListener("change", () => this.take([...this.input.files].map((file) => [file.webkitRelativePath.split("/").slice(1).join("/"), file])));
    this.#offer();
  }

  #offer(error) {
    this.root.className = "training";
    const choose = h("button", { type: "button", class: "choose", onclick: () => this.input.click() }, "Open a training folder");
    this.hint = h("p", { class: "soft", title: "config.yaml, the LoRAs and samples, as ai\u2011toolkit leaves them" }, "or drop it; it stays local");
    this.#fillRoot(choose, [this.input, choose, this.hint, error ? h("p", { class: "error", role: "alert" }, prose(sentence(error))) : ""]);
  }

  /** If the focus was in the section, `next` gets it. */
  #fillRoot(next, nodes) {
    keepFocus(this.root, () => this.root.replaceChildren(...nodes), () => next);
  }

  /** `files`: [path in the folder, File]. */
  async take(files) {
    const config = CONFIGS.map((name) => files.find(([path]) => path === name)).find(Boolean);
    if (!config) return this.#offer("this folder has no config.yaml; choose the folder that ai-toolkit wrote, usually output/NAME");
    this.hint.textContent = "Reading the folder …";
    say(this.hint.textContent);
    this.files = new Map(files);
    try {
      const text = await config[1].text();
      const images = await imagesIn(files, text);
      this.found = await readTraining({ config: { name: config[0], text }, names: files.map(([path]) => path), images });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      return this.#offer(error.message);
    }
    this.#show();
    this.#fill();
    say(`The form has the samples of ${this.found.name}`);
  }

  #show() {
    const { found } = this;
    const option = (value, text) => h("option", { value }, text);
    const stepOf = ({ step, is_final }) => `${step === null ? "the last" : `step ${step}`}${is_final && step !== null ? ", the last" : ""}`;
    const short = (text) => (text.length > 60 ? `${text.slice(0, 59)}…` : text);
    this.step = h("select", { id: "training-step" }, found.checkpoints.map((one, index) => option(index, stepOf(one))).reverse());
    this.sample = h("select", { id: "training-sample" }, found.requests.map(({ prompts: [prompt] }, index) => option(index, `${index + 1}: ${short(prompt.prompt)}`)));
    for (const control of [this.step, this.sample]) control.addEventListener("input", () => this.#fill());
    this.own = h("p", { class: "readout" });
    this.root.className = "training found";
    this.#fillRoot(this.step, [
      this.input,
      h("div", { class: "section-head" }, h("h2", {}, found.name), h("button", { type: "button", class: "quiet", onclick: () => this.#close() }, "Close")),
      h("p", { class: "readout" }, sentence(`${found.trigger_word ? `trigger word ${found.trigger_word}, ` : ""}trained ${found.how_trained}`)),
      h("div", { class: "field" }, h("label", { for: "training-step" }, "LoRA of"), this.step),
      h("div", { class: "field" }, h("label", { for: "training-sample" }, "Sample"), this.sample),
      this.own,
      found.warnings.length ? h("details", { class: "fold" }, h("summary", {}, found.warnings.length === 1 ? "One note" : `${found.warnings.length} notes`), h("ul", { class: "warnings" }, found.warnings.map((text) => h("li", {}, prose(sentence(text)))))) : "",
    ]);
  }

  #close() {
    this.found = undefined;
    this.input.value = "";
    this.#offer();
  }

  /** Fill the form with the chosen sample, from the LoRA of the chosen step. */
  #fill() {
    const request = structuredClone(this.found.requests[Number(this.sample.value)]);
    const { loras } = this.found.checkpoints[Number(this.step.value)];
    request.loras = loras.map((lora, index) => ({ ...lora, network_multiplier: request.loras[index]?.network_multiplier ?? 1 }));
    if (this.found.trigger_word) request.trigger_word = this.found.trigger_word;
    const shown = this.ownSample(request);
    this.own.textContent = shown ? "After the run, the video is compared with the trainer\u2019s own sample." : "The folder has no sample of this step and prompt.";
    this.onrequest(request);
  }

  /** The LoRA of each step, for a sweep; undefined without a folder. Of two with one step, the last counts. */
  get checkpoints() {
    return this.found && [...new Map(this.found.checkpoints.map((one) => [one.title, one])).values()];
  }

  /** The trainer's own video of a request that is still one of the folder's; otherwise undefined. */
  ownSample(request) {
    if (!this.found) return undefined;
    const { step } = this.found.checkpoints[Number(this.step.value)];
    const number = Number(this.sample.value);
    const [wanted] = this.found.requests[number].prompts;
    const [prompt] = request.prompts;
    if (request.prompts.length !== 1 || prompt.prompt !== wanted.prompt || String(prompt.seed) !== String(wanted.seed)) return undefined;
    const sample = this.found.samples.find((one) => one.step === step && one.number === number);
    return sample && this.files.get(sample.name);
  }
}

/** The images of the folder that the config names, as base64. */
async function imagesIn(files, text) {
  const images = {};
  let size = 0;
  for (const [path, file] of files) {
    const name = path.split("/").at(-1);
    if (!/\.(png|jpe?g|webp|bmp)$/i.test(name) || !text.includes(name) || (size += file.size) > MAX_IMAGES) continue;
    const bytes = new Uint8Array(await file.arrayBuffer());
    images[name] = btoa(bytes.reduce((all, byte) => all + String.fromCharCode(byte), ""));
  }
  return images;
}

/** The files of a dropped folder, as [path in it, File]; null if something else was dropped. */
export async function droppedFolder(transfer) {
  const entry = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).find((one) => one?.isDirectory);
  return entry ? walk(entry, "") : null;
}

async function walk(folder, prefix) {
  const reader = folder.createReader();
  const found = [];
  for (let more; (more = await new Promise((resolve, reject) => reader.readEntries(resolve, reject))).length; ) {
    for (const entry of more) {
      const path = prefix + entry.name;
      if (entry.isDirectory) found.push(...(await walk(entry, `${path}/`)));
      else found.push([path, await new Promise((resolve, reject) => entry.file(resolve, reject))]);
    }
  }
  return found;
}

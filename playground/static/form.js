// The form: the fields of the JSON Schema, arranged for the chosen model. It does not know about jobs.

import { check, toJson } from "./api.js";
import { h, keepFocus, prose, say } from "./dom.js";
import { Choice, Field, Group, ImageField, takesDrops } from "./fields.js";
import { Loras } from "./loras.js";
import { Training, droppedFolder } from "./training.js";

const ALIASES = ["ctrl_img_1"]; // another name of `ctrl_img`
const IMAGES = { ctrl_img: "First image", last_img: "Last image" };
const FITS = { stretch: "Stretch", crop: "Crop", pad: "Pad" };
const NUMBERS = ["width", "height", "num_frames", "fps", "sample_steps", "guidance_scale", "seed", "num_videos"];
const SHOWN = ["prompt", ...Object.keys(IMAGES), "image_fit", ...NUMBERS];
const MATCHES = { documented: "Recommended: as the model page says", preview: "Like my training samples" };
const LABELS = {
  draft: "Draft: a quick look in 4 steps",
  neg: "Negative prompt",
  sample_steps: "Steps",
  guidance_scale: "Guidance",
  num_frames: "Frames",
  fps: "Frames per second",
  seed: "Seed",
  num_videos: "Videos",
  guidance_scale_2: "Guidance, low noise",
  output_format: "Format",
  hf_token: "Hugging Face token",
  quantize: "Quantized",
  quantize_te: "Text encoder quantized",
  qtype: "Format, qtype",
  low_vram: "Low VRAM",
  vae_tiling: "VAE tiling",
  dtype: "Trained in, dtype",
  save_dtype: "Saved in, dtype",
  multipliers: "Scales of the samples",
};
const DEFAULTS = { sampler: "as the look says", guidance_scale_2: "as Guidance", shift: "the scheduler\u2019s" };
const UNKNOWN = "not known";
const LARGEST_KEPT = 500_000; // characters of an image that the browser's storage takes

export class Form {
  constructor(config, root) {
    this.models = config.models;
    this.schema = config.schema;
    this.defaultSeed = config.default_seed;
    this.root = root;
    this.prompts = [];
    this.summary = h("div", { class: "summary", role: "alert", hidden: true });
    this.storage = `form of ${config.target.url}`;
    this.#build(config.loras);
    this.write(this.#kept() ?? config.example ?? { model: config.models[0].id, loras: [], prompts: [{}] });
    root.addEventListener("input", () => this.#changed());
    addEventListener("pagehide", () => this.#keep()); // what was typed a moment before
    document.addEventListener("paste", (event) => this.#pasted(event));
    this.#takesFoldersAndRequests();
    this.#showNotes();
  }

  get model() {
    return this.models.find((model) => model.id === this.modelField.value) ?? this.models[0];
  }

  #build(loras) {
    const { properties } = this.schema;
    this.modelField = new Field("model", { ...properties.model, enum: this.models.map((model) => model.id) }, { required: true });
    [...this.modelField.control.options].forEach((option, index) => {
      option.textContent = this.models[index].title;
    });
    this.modelField.control.addEventListener("input", () => {
      this.#applyModel();
      this.showProblems([], { focus: false }); // they were those of the model before
    });
    this.needs = h("p", { class: "readout" });
    this.loras = new Loras(this.schema, loras, () => this.#changed());
    this.promptList = h("div", { class: "prompts" });
    this.morePrompts = h("div");
    this.set = h("span", { class: "soft" });
    this.request = Object.entries(properties)
      .filter(([name]) => !["model", "loras", "extra_loras", "prompts"].includes(name))
      .map(([name, schema]) => (name === "trained_with" ? this.#training(schema) : fieldOf(name, schema)));
    const trigger = this.request.find((field) => field.name === "trigger_word");
    const match = this.request.find((field) => field.name === "match");
    for (const option of match.control.options) option.textContent = MATCHES[option.value] ?? "The worker\u2019s default";
    match.node.querySelector("label").textContent = "Look";
    this.draft = this.request.find((field) => field.name === "draft");
    this.rest = this.request.filter((field) => ![trigger, match, this.draft].includes(field));
    const folder = h("section", { "aria-label": "Training folder" });
    this.training = new Training(folder, (request) => this.write(request));
    this.root.replaceChildren(
      this.summary,
      folder,
      h("section", {}, this.modelField.node, this.needs, match.node, this.draft.node),
      h("section", {}, h("h2", {}, "LoRAs"), this.loras.nodes, trigger.node),
      this.promptList,
      h("button", { type: "button", class: "quiet add", onclick: () => this.#addPrompt(this.#inherited(), true) }, "Add a prompt"),
      h("details", { class: "fold" }, h("summary", {}, "More", this.set), this.morePrompts, h("div", { class: "numbers" }, this.rest.map((field) => field.node))),
    );
  }

  #training(schema) {
    const fields = Object.entries(this.schema.$defs.TrainingSettings.properties).map(([name, one]) => fieldOf(name, one, { short: true }));
    for (const { control } of fields) {
      if (control.localName === "select") control.options[0].textContent = UNKNOWN;
      else control.placeholder = UNKNOWN;
    }
    return new Group("trained_with", { ...schema, default: null }, "How the training ran", fields);
  }

  // Model and LoRAs

  #applyModel() {
    const { model } = this;
    const image = { none: "takes no image", optional: "image optional", required: "image required" };
    this.needs.replaceChildren(
      ...prose(`\`${model.id}\`, ${image[model.control_image]}${model.needs_toolkit ? ", needs ai\u2011toolkit" : ""}`),
    );
    // Locked while it is the worker's model. A request that was pasted can name another one, and can be changed then.
    const served = this.models.find(({ id }) => id === this.served);
    this.modelField.control.disabled = served === model;
    if (served === model) this.needs.append(". The worker\u2019s only model.");
    else if (served) {
      const use = h("button", { type: "button", class: "link", onclick: () => this.serve(served.id) }, `Use ${served.id}`);
      this.needs.append(". The worker serves another: ", use);
    }
    this.loras.shape(model.moe);
    this.draft.node.hidden = !model.draft;
    if (!model.draft) this.draft.value = false;
    for (const prompt of this.prompts) this.#shapePrompt(prompt);
  }

  /** The worker serves the model with this id, and no other: choose it. */
  serve(id) {
    const take = () => {
      this.served = id;
      this.modelField.value = id;
      this.#applyModel();
      this.showProblems([], { focus: false });
    };
    keepFocus(this.root, take, () => this.request.find(({ name }) => name === "match").control);
    this.#changed();
  }

  // Prompts

  /** The values of the last prompt, for a new one: all but its text. */
  #inherited() {
    const { prompt, ...values } = this.read().request.prompts.at(-1);
    return values;
  }

  #addPrompt(values, byHand = false) {
    const { properties } = this.schema.$defs.Prompt;
    const make = (name) => {
      const schema = properties[name];
      if (name in IMAGES) return new ImageField(name, schema, IMAGES[name]);
      if (name === "image_fit") return new Choice(name, schema, "Fit of the image", FITS);
      return fieldOf(name, schema, { required: name === "prompt", short: NUMBERS.includes(name) });
    };
    const names = ["neg", ...Object.keys(properties).filter((name) => !["neg", ...ALIASES].includes(name))];
    const fields = Object.fromEntries(names.map((name) => [name, make(name)]));
    const rest = names.filter((name) => !SHOWN.includes(name));
    const nodesOf = (some) => some.map((name) => fields[name].node);
    const prompt = { fields, rest, title: h("h2"), moreTitle: h("h3"), readout: h("p", { class: "readout", id: `${fields.width.control.id}-makes` }) };
    prompt.chips = h("div", { class: "chips", role: "group", "aria-label": "Sizes" });
    const dice = h("button", { type: "button", class: "quiet", title: "Another seed", "aria-label": "Another seed", onclick: () => this.#roll(prompt) }, "\u2684");
    prompt.lock = h("button", { type: "button", class: "quiet lock", "aria-pressed": "true", title: "Keep the seed for the next run", onclick: () => this.#lock(prompt) }, "Keep");
    const seed = h("div", { class: "seed" });
    fields.seed.control.replaceWith(seed);
    seed.append(fields.seed.control, dice, prompt.lock);
    fields.ctrl_img.picture.addEventListener("load", () => this.#shapePrompt(prompt));
    prompt.remove = h("button", { type: "button", class: "quiet", onclick: () => this.#removePrompt(prompt) }, "Remove");
    prompt.node = h(
      "section",
      { class: "prompt" },
      h("div", { class: "section-head" }, prompt.title, prompt.remove),
      fields.prompt.node,
      h("div", { class: "images" }, nodesOf(Object.keys(IMAGES))),
      fields.image_fit.node,
      prompt.chips,
      h("div", { class: "numbers" }, nodesOf(NUMBERS)),
      prompt.readout,
    );
    prompt.more = h("div", { class: "numbers" }, prompt.moreTitle, nodesOf(rest));
    fields.prompt.node.querySelector("label").classList.add("unseen"); // the title of the section names it
    fields.trigger_word.control.placeholder = "as above";
    const given = { ...values, ctrl_img: values.ctrl_img ?? values.ctrl_img_1 };
    for (const name of names) fields[name].value = given[name];
    this.prompts.push(prompt);
    this.promptList.append(prompt.node);
    this.morePrompts.append(prompt.more);
    this.#shapePrompt(prompt);
    this.#countPrompts();
    if (byHand) {
      fields.prompt.focus();
      this.#changed();
    }
  }

  #shapePrompt(prompt) {
    const { model } = this;
    const { fields } = prompt;
    fields.ctrl_img.need = model.control_image;
    fields.last_img.need = model.takes_last_image ? "optional" : "none";
    fields.image_fit.shown = Object.keys(IMAGES).some((name) => fields[name].value);
    fields.guidance_scale_2.shown = model.moe;
    const match = this.request.find((field) => field.name === "match")?.value ?? "documented";
    for (const name of ["width", "height"]) fields[name].step = model.size_divisor[match];
    fields.num_frames.step = 4;
    this.#showChips(prompt, model.size_divisor[match] ?? 16);
  }

  /** The model's sizes to choose from, and that of the control image at the area of the present size. */
  #showChips(prompt, divisor) {
    const { width, height, ctrl_img: image } = prompt.fields;
    const sizes = this.model.sizes.map(([across, down]) => [across, down, `${across} × ${down}`]);
    const { naturalWidth, naturalHeight } = image.picture;
    if (image.value && !image.picture.hidden && naturalWidth) {
      const [across, down] = [width.value, height.value].map((value) => (typeof value === "number" ? value : 1024));
      const scale = Math.sqrt((across * down) / (naturalWidth * naturalHeight));
      const fitted = [naturalWidth, naturalHeight].map((side) => Math.max(64, Math.round((side * scale) / divisor) * divisor));
      sizes.push([...fitted, "Match image"]);
    }
    const now = `${sizes} ${width.value} ${height.value}`;
    if (prompt.shownSizes === now) return; // so that a chip with the focus keeps it
    prompt.shownSizes = now;
    const focused = [...prompt.chips.children].indexOf(document.activeElement);
    const chip = ([across, down, text]) =>
      h("button", { type: "button", "aria-pressed": String(width.value === across && height.value === down), onclick: () => this.#resize(prompt, across, down) }, text);
    prompt.chips.replaceChildren(...sizes.map(chip));
    prompt.chips.children[focused]?.focus();
  }

  #resize(prompt, width, height) {
    Object.assign(prompt.fields.width, { value: width });
    Object.assign(prompt.fields.height, { value: height });
    this.#shapePrompt(prompt);
    this.#changed();
  }

  #roll(prompt) {
    prompt.fields.seed.value = Math.floor(Math.random() * 2 ** 32);
    this.#changed();
  }

  #lock(prompt) {
    const keeps = prompt.lock.getAttribute("aria-pressed") !== "true";
    prompt.lock.setAttribute("aria-pressed", String(keeps));
    prompt.lock.title = keeps ? "Keep the seed for the next run" : "Every run draws another seed";
    say(keeps ? "The seed is kept" : "Every run draws another seed");
  }

  /** The request of the next run: seeds that are not kept are drawn. With `copies`, so many videos of each prompt. */
  next(copies = 1) {
    for (const prompt of this.prompts) if (prompt.lock.getAttribute("aria-pressed") === "false") this.#roll(prompt);
    const { request } = this.read();
    if (copies > 1) for (const prompt of request.prompts) prompt.num_videos = copies;
    return request;
  }

  #removePrompt(prompt) {
    this.prompts = this.prompts.filter((other) => other !== prompt);
    prompt.node.remove();
    prompt.more.remove();
    this.#countPrompts();
    this.prompts.at(-1).fields.prompt.focus();
    this.#changed();
  }

  #countPrompts() {
    const several = this.prompts.length > 1;
    this.prompts.forEach((prompt, index) => {
      for (const title of [prompt.title, prompt.moreTitle]) title.textContent = several ? `Prompt ${index + 1}` : "Prompt";
      prompt.moreTitle.hidden = !several;
      prompt.remove.hidden = !several;
      prompt.remove.setAttribute("aria-label", `Remove prompt ${index + 1}`);
      prompt.fields.seed.control.placeholder = String(this.defaultSeed + index);
    });
  }

  // The request

  /**
   * The `request`, and `places`: the form's field for each path in it, such as `prompts[0].width`. Without images, an address
   * stands for each, so that they are not sent for a mere question.
   */
  read({ withImages = true } = {}) {
    const places = new Map();
    const collect = (fields, prefix) => {
      const values = {};
      for (const field of fields) {
        places.set(prefix + field.name, field);
        for (const part of field.fields ?? []) places.set(`${prefix}${field.name}.${part.name}`, part);
        const { value } = field;
        if (value !== undefined) values[field.name] = value;
      }
      return values;
    };
    const loras = this.loras.read();
    const request = { ...collect([this.modelField], ""), ...loras.values };
    for (const [path, field] of loras.places) places.set(path, field);
    request.prompts = this.prompts.map((prompt, index) => collect(Object.values(prompt.fields), `prompts[${index}].`));
    Object.assign(request, collect(this.request, ""));
    if (!withImages) for (const prompt of request.prompts) for (const name in IMAGES) if (prompt[name]) prompt[name] = "https://example.com/";
    return { request, places };
  }

  write(request) {
    this.modelField.value = request.model;
    for (const field of this.request) field.value = request[field.name];
    const fill = () => {
      this.prompts = [];
      for (const list of [this.promptList, this.morePrompts]) list.replaceChildren();
      for (const prompt of request.prompts ?? [{}]) this.#addPrompt(prompt);
      this.#applyModel();
      this.loras.write(request);
      this.showProblems([], { focus: false });
    };
    keepFocus(this.root, fill, () => this.prompts[0].fields.prompt.control);
    this.#changed();
  }

  /** Show each problem at its field and in a summary. */
  showProblems(problems, { focus = true } = {}) {
    const { places } = this.read();
    const all = new Set([...places.values(), ...this.loras.fields]);
    for (const field of all) field.showError([]);
    const at = new Map();
    for (const problem of problems) {
      const field = places.get(problem.field) ?? places.get(problem.field.replace(/ctrl_img_1$/, "ctrl_img"));
      if (field) at.set(field, [...(at.get(field) ?? []), problem.text]);
    }
    for (const [field, texts] of at) field.showError(texts);
    keepFocus(this.summary, () => this.#summarise(problems, places), () => this.prompts[0].fields.prompt.control);
    const first = [...places.values()].sort(inOrder).find((field) => at.has(field));
    if (!focus || !problems.length) return;
    if (first) first.focus();
    else this.summary.scrollIntoView({ block: "nearest" });
  }

  #summarise(problems, places) {
    this.summary.hidden = !problems.length;
    const count = problems.length === 1 ? "One problem" : `${problems.length} problems`;
    const item = (problem) => {
      const field = places.get(problem.field);
      const go = field && h("button", { type: "button", class: "link", onclick: () => field.focus() }, problem.field);
      return h("li", {}, go ?? (problem.field ? h("code", {}, problem.field) : ""), problem.field ? " " : "", prose(problem.text));
    };
    this.summary.replaceChildren(h("h2", {}, `${count} to correct`), h("ul", {}, problems.map(item)));
  }

  // The effective size and frame count

  #changed() {
    if (!this.root.querySelector("[aria-invalid]")) this.summary.hidden = true;
    this.#showTraining();
    this.#countSet();
    clearTimeout(this.pending);
    this.pending = setTimeout(() => {
      this.#keep();
      this.#showEffective();
      this.onchange?.();
    }, 100);
  }

  // What was typed, for when the page is loaded again. A token is not kept, nor an image that is too large for the storage.

  #keep() {
    const { hf_token, ...request } = this.read().request;
    for (const prompt of request.prompts) for (const name in IMAGES) if (prompt[name]?.length > LARGEST_KEPT) delete prompt[name];
    try {
      localStorage[this.storage] = toJson(request);
    } catch {
      // the storage is full or forbidden
    }
  }

  #kept() {
    try {
      return asRequest(localStorage[this.storage] ?? "");
    } catch {
      return null;
    }
  }

  /** Ask how the training ran only where it matters, or has been said. */
  #showTraining() {
    const { match, trained_with: training } = Object.fromEntries(this.request.map((field) => [field.name, field]));
    training.shown = match.value === "preview" || training.value !== undefined || training.node.contains(document.activeElement);
  }

  /** Say beside "More" how many of its fields have been set, so that none works unseen. */
  #countSet() {
    const fields = [...this.rest, ...this.prompts.flatMap((prompt) => prompt.rest.map((name) => prompt.fields[name]))];
    const count = fields.filter((field) => ![undefined, field.schema.default, null].includes(field.value)).length;
    this.set.textContent = count ? `${count} set` : "";
  }

  /** Show sizes and frame counts by the worker's rules; see playground/check.py. */
  async #showEffective() {
    const { request } = this.read({ withImages: false });
    for (const prompt of this.prompts) this.#shapePrompt(prompt);
    const mine = (this.latest = Symbol());
    const { prompts } = await check(request).catch(() => ({ prompts: [] }));
    if (mine !== this.latest) return;
    this.prompts.forEach((prompt, index) => prompt.readout.replaceChildren(...effective(prompts[index], request.prompts[index])));
  }

  // Notes and pasting

  /** Show the description of the field in one line below the form, so that the form stays short. */
  #showNotes() {
    const line = document.getElementById("notes");
    const rest = "Point at a field to read its description.";
    const show = (event) => {
      const field = event.target.closest?.("[data-field]");
      line.replaceChildren(...(field ? prose(field.querySelector("[id$=-note]").textContent) : [rest]));
    };
    for (const event of ["focusin", "mouseover"]) this.root.addEventListener(event, show);
    this.root.addEventListener("mouseleave", () => show({ target: document.activeElement }));
    this.root.addEventListener("focusout", (event) => show({ target: event.relatedTarget ?? document.body }));
    line.textContent = rest;
  }

  /** A request, or a job with it as `input`, as JSON text. Returns whether it was one. */
  #takeText(text) {
    const request = asRequest(text);
    if (!request) return false;
    this.write(request);
    say("The form has the request");
    return true;
  }

  /** A folder of a training or a file with a request can be dropped anywhere on the form. */
  #takesFoldersAndRequests() {
    const form = this.root.closest("form");
    takesDrops(form, async (file, event) => {
      const folder = droppedFolder(event.dataTransfer); // before the first await: then it is empty
      const files = await folder;
      if (files) return this.training.take(files);
      if (file && !this.#takeText(await file.text())) say(`${file.name} is neither a training\u2019s folder nor a request`);
    });
  }

  #pasted(event) {
    const typing = document.activeElement?.matches("input, textarea");
    const text = event.clipboardData?.getData("text/plain") ?? "";
    if ((!typing || text.trimStart().startsWith("{")) && this.#takeText(text)) return event.preventDefault();
    const file = [...(event.clipboardData?.files ?? [])].find((file) => file.type.startsWith("image/"));
    const takers = this.prompts.flatMap((prompt) => Object.keys(IMAGES).map((name) => prompt.fields[name])).filter((field) => !field.node.hidden);
    if (!file || !takers.length) return;
    event.preventDefault();
    const focused = takers.find((field) => field.node.contains(document.activeElement));
    const ofPrompt = takers.find((field) => field.node.closest(".prompt").contains(document.activeElement));
    (focused ?? ofPrompt ?? takers[0]).take(file);
  }
}

/** The request in a JSON text; null if it is none. A seed beyond 2^53 stays a text, as JSON.parse would round it. */
function asRequest(text) {
  if (!text.trimStart().startsWith("{")) return null;
  try {
    const exact = text.replace(/("seed"\s*:\s*)(\d{16,})/g, '$1"$2"');
    const found = JSON.parse(exact);
    const request = found.input ?? found;
    return Array.isArray(request.prompts) && typeof request.model === "string" ? request : null;
  } catch {
    return null;
  }
}

function effective(found, asked) {
  if (!found) return ["The video\u2019s size is shown here."];
  const changed = (name, text) => (found[name] === asked[name] ? text : h("mark", {}, text));
  const still = found.num_frames === 1;
  return [
    asked.num_videos > 1 ? `Makes ${asked.num_videos} times ` : "Makes ",
    changed("width", `${found.width}`),
    " × ",
    changed("height", `${found.height}`),
    ", ",
    changed("num_frames", still ? "one image" : `${found.num_frames} frames`),
    still ? "." : `, ${found.seconds} s.`,
    asked.num_videos > 1 ? " Each has the next seed." : "",
  ];
}

const inOrder = (one, other) => (one.node.compareDocumentPosition(other.node) & Node.DOCUMENT_POSITION_FOLLOWING ? -1 : 1);

function fieldOf(name, schema, options = {}) {
  const words = (schema.title ?? name).toLowerCase();
  const field = new Field(name, schema, { label: LABELS[name] ?? words[0].toUpperCase() + words.slice(1), ...options });
  const none = field.control.querySelector("option[value='']");
  if (none) none.textContent = DEFAULTS[name] ?? none.textContent;
  else if (name in DEFAULTS) field.control.placeholder = DEFAULTS[name];
  return field;
}

// The form: the fields of the JSON Schema, arranged for the chosen model. It does not know about jobs.

import { check } from "./api.js";
import { h, prose } from "./dom.js";
import { Field, ImageField } from "./fields.js";

const ALIASES = ["ctrl_img_1"]; // another name of `ctrl_img`
const SHOWN = ["prompt", "ctrl_img", "width", "height", "num_frames", "fps", "sample_steps", "guidance_scale", "seed"];
const LABELS = {
  neg: "Negative prompt",
  sample_steps: "Steps",
  guidance_scale: "Guidance",
  num_frames: "Frames",
  fps: "Frames per second",
  hf_token: "Hugging Face token",
  network_multiplier: "Scale",
};
const SIDES = { high: "High noise", low: "Low noise" };

export class Form {
  constructor(config, root) {
    this.models = config.models;
    this.schema = config.schema;
    this.defaultSeed = config.default_seed;
    this.root = root;
    this.prompts = [];
    this.loras = [];
    this.summary = h("div", { class: "summary", role: "alert", hidden: true });
    this.#build(config.loras);
    this.write(config.example ?? { model: config.models[0].id, loras: [], prompts: [{}] });
    root.addEventListener("input", () => this.#changed());
    document.addEventListener("paste", (event) => this.#pasted(event));
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
    this.loraList = h("div");
    this.suggestions = h("datalist", { id: "lora-files" }, loras.map((path) => h("option", { value: path })));
    this.promptList = h("div", { class: "prompts" });
    this.request = Object.entries(properties)
      .filter(([name]) => !["model", "loras", "prompts"].includes(name))
      .map(([name, schema]) => new Field(name, schema, { label: labelOf(name, schema) }));
    const trigger = this.request.find((field) => field.name === "trigger_word");
    const rest = this.request.filter((field) => field !== trigger);
    this.root.replaceChildren(
      this.summary,
      h("section", {}, this.modelField.node, this.needs),
      h("section", {}, h("h2", {}, "LoRAs"), this.loraList, this.suggestions, trigger.node),
      this.promptList,
      h("button", { type: "button", class: "quiet add", onclick: () => this.#addPrompt({}, true) }, "Add a prompt"),
      h("details", { class: "fold" }, h("summary", {}, "More for the whole request"), rest.map((field) => field.node)),
    );
  }

  // Model and LoRAs

  #applyModel() {
    const { model } = this;
    const image = { none: "no control image", optional: "control image optional", required: "control image required" };
    this.needs.replaceChildren(
      ...prose(`\`${model.id}\`, ${image[model.control_image]}${model.needs_toolkit ? ", needs ai\u2011toolkit" : ""}`),
    );
    // Locked while it is the worker's model. A request that was pasted can name another one, and can be changed then.
    const served = this.models.find(({ id }) => id === this.served);
    this.modelField.control.disabled = served === model;
    if (served === model) this.needs.append(". The worker serves this model alone.");
    else if (served) {
      const use = h("button", { type: "button", class: "link", onclick: () => this.serve(served.id) }, `Use ${served.id}`);
      this.needs.append(". The worker serves another: ", use);
    }
    const sides = model.moe ? ["high", "low"] : [null];
    const kept = this.loras.length === sides.length ? this.loras.map((row) => row.path.value) : [];
    if (this.loras.map((row) => row.side).join() !== sides.join() || !this.loras.length) {
      this.loras = sides.map((side) => this.#loraRow(side));
      this.loras.forEach((row, index) => (row.path.value = kept[index]));
      this.loraList.replaceChildren(...this.loras.map((row) => row.node));
    }
    for (const prompt of this.prompts) this.#shapePrompt(prompt);
  }

  /** The worker serves the model with this id, and no other: choose it. */
  serve(id) {
    this.served = id;
    this.modelField.value = id;
    this.#applyModel();
    this.showProblems([], { focus: false });
    this.#changed();
  }

  #loraRow(side) {
    const { properties } = this.schema.$defs.Lora;
    const path = new Field("path", properties.path, {
      label: side ? SIDES[side] : "File",
      required: !side,
      list: "lora-files",
    });
    const scale = new Field("network_multiplier", properties.network_multiplier, { label: "Scale", short: true });
    path.control.placeholder = side ? "none: this side uses the base model" : "job/name.safetensors";
    path.control.addEventListener("blur", () => showEnd(path.control));
    scale.value = undefined;
    return { side, path, scale, node: h("div", { class: "lora" }, path.node, scale.node) };
  }

  // Prompts

  #addPrompt(values, byHand = false) {
    const { properties } = this.schema.$defs.Prompt;
    const make = (name) =>
      name === "ctrl_img"
        ? new ImageField(properties[name])
        : new Field(name, properties[name], {
            label: labelOf(name, properties[name]),
            required: name === "prompt",
            short: SHOWN.includes(name) && name !== "prompt",
          });
    const names = Object.keys(properties).filter((name) => !ALIASES.includes(name));
    const fields = Object.fromEntries(names.map((name) => [name, make(name)]));
    const rest = names.filter((name) => !SHOWN.includes(name));
    const prompt = { fields, title: h("h2"), readout: h("p", { class: "readout", id: `${fields.width.control.id}-makes` }) };
    prompt.remove = h("button", { type: "button", class: "quiet", onclick: () => this.#removePrompt(prompt) }, "Remove");
    prompt.node = h(
      "section",
      { class: "prompt" },
      h("div", { class: "section-head" }, prompt.title, prompt.remove),
      fields.prompt.node,
      fields.ctrl_img.node,
      h("div", { class: "numbers" }, SHOWN.slice(2).map((name) => fields[name].node), prompt.readout),
      h("details", { class: "fold" }, h("summary", {}, "More for this prompt"), rest.map((name) => fields[name].node)),
    );
    fields.prompt.node.querySelector("label").classList.add("unseen"); // the title of the section names it
    const given = { ...values, ctrl_img: values.ctrl_img ?? values.ctrl_img_1 };
    for (const name of names) fields[name].value = given[name];
    this.prompts.push(prompt);
    this.promptList.append(prompt.node);
    this.#shapePrompt(prompt);
    this.#countPrompts();
    if (byHand) {
      fields.prompt.focus();
      this.#changed();
    }
  }

  #shapePrompt(prompt) {
    const { model } = this;
    prompt.fields.ctrl_img.need = model.control_image;
    const match = this.request.find((field) => field.name === "match")?.value ?? "documented";
    for (const name of ["width", "height"]) prompt.fields[name].step = model.size_divisor[match];
    prompt.fields.num_frames.step = 4;
  }

  #removePrompt(prompt) {
    this.prompts = this.prompts.filter((other) => other !== prompt);
    prompt.node.remove();
    this.#countPrompts();
    this.prompts.at(-1).fields.prompt.focus();
    this.#changed();
  }

  #countPrompts() {
    const several = this.prompts.length > 1;
    this.prompts.forEach((prompt, index) => {
      prompt.title.textContent = several ? `Prompt ${index + 1}` : "Prompt";
      prompt.remove.hidden = !several;
      prompt.remove.setAttribute("aria-label", `Remove prompt ${index + 1}`);
      prompt.fields.seed.control.placeholder = String(this.defaultSeed + index);
    });
  }

  // The request

  /** The `request`, and `places`: the form's field for each path in it, such as `prompts[0].width`. */
  read() {
    const places = new Map();
    const collect = (fields, prefix) => {
      const values = {};
      for (const field of fields) {
        places.set(prefix + field.name, field);
        const { value } = field;
        if (value !== undefined) values[field.name] = value;
      }
      return values;
    };
    const request = collect([this.modelField], "");
    request.loras = [];
    for (const row of this.loras.filter((row) => row.path.value !== undefined)) {
      const values = collect([row.path, row.scale], `loras[${request.loras.length}].`);
      request.loras.push(row.side ? { path: values.path, transformer: row.side, ...values } : values);
    }
    places.set("loras", this.loras[0].path);
    request.prompts = this.prompts.map((prompt, index) => collect(Object.values(prompt.fields), `prompts[${index}].`));
    Object.assign(request, collect(this.request, ""));
    return { request, places };
  }

  write(request) {
    this.modelField.value = request.model;
    for (const field of this.request) field.value = request[field.name];
    this.prompts = [];
    this.promptList.replaceChildren();
    for (const prompt of request.prompts) this.#addPrompt(prompt);
    this.loras = [];
    this.#applyModel();
    for (const lora of request.loras) {
      const row = this.loras.find((row) => row.side === (lora.transformer ?? null));
      if (!row) continue;
      row.path.value = lora.path;
      showEnd(row.path.control);
      row.scale.value = lora.network_multiplier;
    }
    this.showProblems([], { focus: false });
    this.#changed();
  }

  /** Show each problem at its field and in a summary. */
  showProblems(problems, { focus = true } = {}) {
    const { places } = this.read();
    const all = new Set([...places.values(), ...this.loras.flatMap((row) => [row.path, row.scale])]);
    for (const field of all) field.showError([]);
    const at = new Map();
    for (const problem of problems) {
      const field = places.get(problem.field) ?? places.get(problem.field.replace(/ctrl_img_1$/, "ctrl_img"));
      if (field) at.set(field, [...(at.get(field) ?? []), problem.text]);
    }
    for (const [field, texts] of at) field.showError(texts);
    this.#summarise(problems, places);
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
    clearTimeout(this.pending);
    this.pending = setTimeout(() => this.#showEffective(), 100);
  }

  /** Show sizes and frame counts by the worker's rules; see playground/check.py. */
  async #showEffective() {
    const { request } = this.read();
    for (const prompt of this.prompts) this.#shapePrompt(prompt);
    for (const prompt of request.prompts) if (prompt.ctrl_img) prompt.ctrl_img = "https://example.com/";
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

  #pasted(event) {
    const file = [...(event.clipboardData?.files ?? [])].find((file) => file.type.startsWith("image/"));
    const takers = this.prompts.filter((prompt) => !prompt.fields.ctrl_img.node.hidden);
    if (!file || !takers.length) return;
    event.preventDefault();
    (takers.find((prompt) => prompt.node.contains(document.activeElement)) ?? takers[0]).fields.ctrl_img.take(file);
  }
}

function effective(found, asked) {
  if (!found) return ["The video's size is shown here."];
  const changed = (name, text) => (found[name] === asked[name] ? text : h("mark", {}, text));
  return [
    "Makes ",
    changed("width", `${found.width}`),
    " × ",
    changed("height", `${found.height}`),
    h("br"),
    changed("num_frames", found.num_frames === 1 ? "one image" : `${found.num_frames} frames`),
    found.num_frames === 1 ? "" : `, ${found.seconds} s`,
  ];
}

/** Scroll to the end of a path, where the files of one training job differ: in step and side. */
const showEnd = (control) => (control.scrollLeft = control.scrollWidth);

const inOrder = (one, other) => (one.node.compareDocumentPosition(other.node) & Node.DOCUMENT_POSITION_FOLLOWING ? -1 : 1);

function labelOf(name, schema) {
  const words = (schema.title ?? name).toLowerCase();
  return LABELS[name] ?? words[0].toUpperCase() + words.slice(1);
}

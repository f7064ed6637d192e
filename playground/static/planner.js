// Plans a sweep: its LoRAs, scales and seeds beside the form, and the table of what would be made. The server decides the cells.

import { ApiError, planSweep } from "./api.js";
import { h, prose, refill, seconds, sentence, tell } from "./dom.js";
import { tableOf } from "./table.js";

const MOST_STEPS = 8; // of a training are chosen at first
const FIELDS = { "--lora": "loras", "--scale": "scales", "--seed": "seeds" };
const NAMES = { loras: "LoRAs", scales: "Scales", seeds: "Seeds" };

export class Planner {
  /** `actions`: `start` a sweep, and `close`. `files`: the LoRAs that the worker has, if they are known. */
  constructor(screen, facts, form, files, actions) {
    Object.assign(this, { screen, form, files, actions, back: actions.close, errors: {} });
    const { request } = form.read();
    this.checkpoints = form.training.checkpoints;
    this.inputs = {
      loras: this.checkpoints ? this.#chips() : h("textarea", { id: "sweep-loras", rows: 2, spellcheck: "false" }, this.#own(request)),
      scales: h("input", { id: "sweep-scales", type: "text", autocomplete: "off", inputmode: "text", placeholder: "as in the form" }),
      seeds: h("input", { id: "sweep-seeds", type: "text", autocomplete: "off", inputmode: "text", placeholder: "as in the form" }),
    };
    if (!this.checkpoints) this.inputs.scales.value = "0.6, 0.8, 1";
    const notes = {
      loras: this.checkpoints ? "The steps that the training saved." : "One on each line. `NAME` is both files of a Wan 2.2 14B LoRA.",
      scales: "Such as 0.6, 0.8, 1.",
      seeds: "Such as 42, 43.",
    };
    this.says = h("p", { class: "plan-says", role: "status" });
    this.problems = h("div", { role: "alert" });
    this.preview = h("div", { class: "preview" });
    this.button = h("button", { type: "button", class: "primary", onclick: () => this.start() }, "Start");
    screen.className = "sweep planner";
    refill(facts);
    refill(
      screen,
      h("div", { class: "section-head" }, h("h2", { tabindex: "-1" }, "Plan a sweep"), h("button", { type: "button", class: "quiet", onclick: () => actions.close() }, "Close")),
      h("p", { class: "soft" }, "One video for each LoRA, scale and seed, beside each other. All else is as in the form."),
      h("div", { class: "axes" }, Object.keys(NAMES).map((name) => this.#field(name, notes[name]))),
      this.problems,
      h("div", { class: "plan-start" }, this.button, this.says),
      this.preview,
    );
    screen.addEventListener("input", (this.typed = () => this.look()));
    this.look();
  }

  close() {
    this.closed = true;
    this.screen.removeEventListener("input", this.typed);
  }

  /** The form or an axis has changed: plan again. */
  look() {
    clearTimeout(this.pending);
    this.pending = setTimeout(() => this.#plan(), 150);
  }

  focus() {
    this.screen.querySelector("h2").focus();
  }

  #field(name, text) {
    const input = this.inputs[name];
    const note = h("p", { class: "soft note", id: `sweep-${name}-note` }, prose(text));
    const error = (this.errors[name] = h("p", { class: "error", id: `sweep-${name}-error`, role: "status", hidden: true }));
    if (input.localName === "div") {
      input.setAttribute("aria-labelledby", `sweep-${name}-label`);
      return h("div", { class: "field" }, h("span", { class: "label", id: `sweep-${name}-label` }, NAMES[name]), input, note, error);
    }
    input.setAttribute("aria-describedby", `${error.id} ${note.id}`);
    return h("div", { class: "field" }, h("label", { for: input.id }, NAMES[name]), input, note, error);
  }

  /** A button for each step; of many, some at equal distances are chosen. */
  #chips() {
    const last = this.checkpoints.length - 1;
    const some = new Set(Array.from({ length: MOST_STEPS }, (_, number) => Math.round((number * last) / (MOST_STEPS - 1))));
    const press = ({ currentTarget: chip }) => {
      chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
      this.look();
    };
    const chip = ({ title }, index) => h("button", { type: "button", "aria-pressed": String(some.has(index)), onclick: press }, title.replace(/^step /, ""));
    return h("div", { class: "chips", role: "group" }, this.checkpoints.map(chip));
  }

  /** The form's LoRA, and the other steps of its training that the worker has, one on each line. */
  #own({ loras }) {
    const family = (path) => path.replace(/(_\d{9})?(_(high|low)_noise)?\.safetensors$/, "");
    const name = (path) => path.replace(/(_(high|low)_noise)?\.safetensors$/, "");
    if (!loras.length) return "";
    const steps = new Set(this.files.filter((path) => family(path) === family(loras[0].path)).map(name));
    if (steps.size > 1) return [...steps].join("\n");
    const sides = loras.map(({ path, transformer }) => (transformer ? `${transformer}=${path}` : path)).join(",");
    return loras.every(({ path }) => name(path) === name(loras[0].path)) && (loras.length > 1 || !loras[0].transformer) ? name(loras[0].path) : sides;
  }

  /** The sweep as the server takes it. */
  #asked(request) {
    const { loras, scales, seeds } = this.inputs;
    const chosen = this.checkpoints
      ? this.checkpoints.filter((_, index) => loras.children[index].getAttribute("aria-pressed") === "true")
      : loras.value.split("\n").map((line) => line.trim()).filter(Boolean);
    return { request, loras: chosen, scales: scales.value, seeds: seeds.value };
  }

  async #plan() {
    if (this.closed) return;
    const asked = this.#asked(this.form.read({ withImages: false }).request);
    const mine = (this.latest = Symbol());
    let plan;
    try {
      plan = await planSweep(asked);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      plan = { problems: [{ field: "", text: error.message }] };
    }
    if (mine === this.latest && !this.closed) this.#show(plan);
  }

  #show(plan) {
    this.#showProblems(plan.problems);
    const several = plan.count > 1;
    this.button.ariaDisabled = several ? null : "true";
    this.button.textContent = several ? `Make ${plan.count} videos` : "Make the videos";
    tell(this.says, several ? prose(howLong(plan)) : plan.problems.length ? "" : "Name two LoRAs, scales or seeds.");
    this.preview.replaceChildren(...(several ? [tableOf(plan, () => h("div", { class: "cell" }))] : []));
  }

  /** Show each problem at its axis, and those of the form in a list. */
  #showProblems(problems) {
    const axisOf = ({ field }) => FIELDS[field] ?? (/^loras\b/.test(field) ? "loras" : undefined);
    for (const [name, error] of Object.entries(this.errors)) {
      const texts = problems.filter((problem) => axisOf(problem) === name).map(({ text }) => sentence(text));
      error.hidden = !texts.length;
      tell(error, prose(texts.join(" ")));
      if (this.inputs[name].localName !== "div") this.inputs[name].ariaInvalid = texts.length ? "true" : null;
    }
    const rest = problems.filter((problem) => !axisOf(problem));
    const item = ({ field, text }) => h("li", {}, field ? h("code", {}, field) : "", field ? " " : "", prose(field ? text : sentence(text)));
    tell(this.problems, rest.length ? h("div", { class: "summary" }, h("ul", {}, rest.map(item))) : "");
  }

  start() {
    if (this.button.ariaDisabled) return;
    this.actions.start(this.#asked(this.form.read().request));
  }
}

/** How long the videos take, and what they cost at the price that was entered beside a result. */
function howLong({ count, known }) {
  if (!known) return "How long one takes is known after the first run.";
  const total = count * known.seconds;
  const price = (Number((localStorage.price ?? "").replace(",", ".")) * total) / 3600;
  const cost = price > 0 ? `, for $${price.toFixed(price < 0.1 ? 4 : 2)}` : "";
  const by = known.is_same ? `as run ${known.run} took` : `estimated from run ${known.run} by size, frames and steps`;
  return `About ${seconds(total)} on one worker${cost}: ${seconds(known.seconds)} each, ${by}.`;
}

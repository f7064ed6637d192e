// One field of the form: a label, a control chosen by its JSON Schema, and a place for errors.

import { h, keepFocus, prose } from "./dom.js";

let count = 0;

/** The schema of a field, without the alternative that it may be null. */
export function plain(schema) {
  return { ...schema, ...(schema.anyOf?.find((kind) => kind.type !== "null") ?? {}) };
}

/** What every field has: a name, a description and a place for errors. Its subclass makes the `node` and the `control`. */
class Described {
  constructor(name, schema) {
    this.name = name;
    this.schema = plain(schema);
    this.id = `field-${++count}`;
    this.note = h("span", { class: "unseen", id: `${this.id}-note` }, schema.description ?? "");
    this.error = h("p", { class: "error", id: `${this.id}-error`, hidden: true });
  }

  /** Whether the chosen model has this field. Without it, the value is not in the request. */
  set shown(on) {
    this.node.hidden = !on;
  }

  /** Show error texts; an empty list removes them. */
  showError(texts) {
    showErrorAt(this.control, this.error, texts, this.note.id);
  }

  focus() {
    for (let fold = this.node.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
    this.control.focus();
  }
}

/** A field. Its `value` goes into the request; undefined leaves the field out. */
export class Field extends Described {
  /** With `slider`, a number also has one. */
  constructor(name, schema, { label, required = false, short = false, list = null, step = 1, slider = false } = {}) {
    super(name, schema);
    this.step = step;
    this.control = this.#control(this.id, { required, list });
    this.control.setAttribute("aria-describedby", this.note.id);
    this.node = h(
      "div",
      { class: this.control.type === "checkbox" ? "field tick" : "field", "data-field": name },
      h("label", { for: this.id }, label ?? this.schema.title, required ? null : h("span", { class: "optional" }, " optional")),
      slider ? this.#withSlider() : this.control,
      this.note,
      this.error,
    );
    if (short || schema.default !== undefined && schema.default !== null) this.node.querySelector(".optional")?.remove();
    this.control.addEventListener("input", () => this.showError([]));
  }

  #control(id, { required, list }) {
    const { schema } = this;
    const common = { id, name: this.name, "aria-required": required ? "true" : null };
    if (schema.enum || this.isYesOrNo) {
      const none = schema.default === null ? [h("option", { value: "" }, "the worker's default")] : [];
      const options = this.isYesOrNo ? { true: "yes", false: "no" } : Object.fromEntries(schema.enum.map((value) => [value, value]));
      return h("select", common, none, Object.entries(options).map(([value, text]) => h("option", { value }, text)));
    }
    if (schema.type === "boolean") return h("input", { ...common, type: "checkbox" });
    if (this.isNumber) {
      const mode = schema.type === "integer" && schema.minimum >= 0 ? "numeric" : "text";
      const input = h("input", { ...common, type: "text", inputmode: mode, autocomplete: "off", class: "number" });
      input.addEventListener("keydown", (event) => this.#stepped(event));
      return input;
    }
    if (schema.maxLength >= 10000) return h("textarea", { ...common, rows: 3, spellcheck: "true" });
    const type = this.name.endsWith("token") ? "password" : "text";
    return h("input", { ...common, type, list, autocomplete: type === "password" ? "new-password" : "off", spellcheck: "false" });
  }

  /** A boolean that may be left open. */
  get isYesOrNo() {
    return this.schema.type === "boolean" && this.schema.default === null;
  }

  get isNumber() {
    return ["integer", "number"].includes(this.schema.type);
  }

  /** Sliders go from 0 to twice the usual 1; a number below 0 can be typed. The keyboard and screen readers use the number alone. */
  #withSlider() {
    this.slider = h("input", { type: "range", min: 0, max: 2, step: 0.05, tabindex: "-1", "aria-hidden": "true" });
    this.slider.addEventListener("input", () => {
      this.control.value = String(Number(this.slider.value));
      this.showError([]);
    });
    this.control.addEventListener("input", () => (this.slider.value = this.control.value));
    return h("div", { class: "slider" }, this.slider, this.control);
  }

  get value() {
    if (this.node.hidden) return undefined;
    if (this.control.type === "checkbox") return this.control.checked;
    const text = this.control.value;
    if (text.trim() === "") return undefined;
    if (this.isYesOrNo) return text === "true";
    return this.isNumber ? numberOf(text) : text;
  }

  set value(value) {
    const shown = value ?? this.schema.default;
    if (this.control.type === "checkbox") this.control.checked = Boolean(shown);
    else this.control.value = String(shown ?? "");
    if (this.slider) this.slider.value = this.control.value;
    this.showError([]);
  }

  /** Arrow keys change the number, as in a number input. Unlike there, the mouse wheel cannot change it by accident. */
  #stepped(event) {
    const direction = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    const now = Number(this.control.value || this.schema.default || 0);
    if (!direction || !Number.isFinite(now)) return;
    event.preventDefault();
    const step = this.schema.type === "number" ? 0.1 : this.step;
    const next = Math.min(Math.max(now + direction * step, this.schema.minimum ?? -Infinity), this.schema.maximum ?? Infinity);
    this.control.value = String(Number(next.toFixed(3)));
    this.control.dispatchEvent(new Event("input", { bubbles: true }));
  }
}

/** One of a few values, as buttons. `titles`: their texts. */
export class Choice extends Described {
  constructor(name, schema, label, titles) {
    super(name, schema);
    this.buttons = new Map(this.schema.enum.map((value) => [value, this.#button(value, titles[value])]));
    this.control = this.buttons.get(this.schema.default);
    const title = h("span", { class: "label", id: `${this.id}-label` }, label);
    const chips = h("div", { class: "chips" }, ...this.buttons.values());
    this.node = h("div", { class: "field", role: "group", "aria-labelledby": title.id, "data-field": name }, title, chips, this.note, this.error);
    this.value = undefined;
  }

  #button(value, title) {
    const choose = () => {
      this.value = value;
      this.node.dispatchEvent(new Event("input", { bubbles: true }));
    };
    return h("button", { type: "button", name: this.name, "aria-describedby": this.note.id, onclick: choose }, title);
  }

  get value() {
    return this.node.hidden ? undefined : this.chosen;
  }

  set value(value) {
    this.chosen = value ?? this.schema.default;
    for (const [name, button] of this.buttons) button.setAttribute("aria-pressed", String(name === this.chosen));
  }
}

/** The fields of an object in the request, such as `trained_with`. Where none is set, the object is left out. */
export class Group extends Described {
  constructor(name, schema, label, fields) {
    super(name, schema);
    this.fields = fields;
    this.control = h("fieldset", { name, "aria-describedby": this.note.id }, h("legend", {}, label), h("div", { class: "numbers" }, fields.map((field) => field.node)));
    this.node = h("div", { class: "group", "data-field": name }, this.note, this.control, this.error);
  }

  get value() {
    const given = Object.fromEntries(this.fields.map(({ name, value }) => [name, value]).filter(([, value]) => value !== undefined));
    return Object.keys(given).length ? given : undefined;
  }

  set value(value) {
    for (const field of this.fields) field.value = value?.[field.name];
  }

  showError(texts) {
    showErrorAt(this.control, this.error, texts, this.note.id);
    this.control.removeAttribute("aria-invalid"); // groups do not have this state
  }

  focus() {
    this.fields[0].focus();
  }
}

/** A list whose items the form shows as rows of their own; this is the button that adds one. */
export class AddButton extends Described {
  constructor(name, schema, text, onclick) {
    super(name, schema);
    this.control = h("button", { type: "button", class: "quiet add", name, "aria-describedby": this.note.id, onclick }, text);
    this.node = h("div", { "data-field": name }, this.control, this.note, this.error);
  }
}

function showErrorAt(control, error, texts, noteId) {
  error.hidden = !texts.length;
  error.replaceChildren(...texts.flatMap((text, index) => [index ? h("br") : null, ...prose(text)]).filter(Boolean));
  control.setAttribute("aria-describedby", texts.length ? `${error.id} ${noteId}` : noteId);
  if (texts.length && control.localName !== "button") control.setAttribute("aria-invalid", "true"); // buttons do not have this state
  else control.removeAttribute("aria-invalid");
}

/** The number in a text. Any other text is sent to the worker's check unchanged, which says what is allowed. */
function numberOf(text) {
  const trimmed = text.trim();
  if (/^[+-]?\d+$/.test(trimmed)) {
    const number = Number(trimmed);
    return Number.isSafeInteger(number) ? number : BigInt(trimmed);
  }
  return /^[+-]?(\d+\.?\d*|\.\d+)$/.test(trimmed) ? Number(trimmed) : text;
}

/** An image: dropped, pasted, chosen, or given by its URL. */
export class ImageField extends Described {
  constructor(name, schema, title) {
    super(name, schema);
    this.title = title;
    this.data = "";
    this.file = h("input", { type: "file", accept: "image/*", class: "unseen", tabindex: "-1", "aria-hidden": "true" });
    this.choose = h("button", { type: "button", class: "choose", onclick: () => this.file.click() });
    this.text = h("span", { class: "soft" });
    this.picture = h("img", { alt: "" });
    this.remove = h("button", { type: "button", class: "quiet", "aria-label": `Remove the ${title.toLowerCase()}`, onclick: () => this.clear() }, "Remove");
    this.zone = h("div", { class: "zone" }, this.picture, h("div", { class: "zone-text" }, this.choose, this.text, this.remove));
    this.control = h("input", { id: this.id, name, type: "text", placeholder: "or its URL, https://…", autocomplete: "off", spellcheck: "false" });
    this.label = h("label", { for: this.id });
    this.node = h("div", { class: "field image", "data-field": name }, this.label, this.file, this.zone, this.control, this.note, this.error);
    this.control.setAttribute("aria-describedby", this.note.id);
    this.control.addEventListener("input", () => this.showError([]));
    this.file.addEventListener("change", () => this.file.files[0] && this.take(this.file.files[0]));
    takesDrops(this.node, (file) => this.take(file));
    this.clear();
  }

  /** "none", "optional" or "required", from the model table. */
  set need(need) {
    this.shown = need !== "none";
    this.label.replaceChildren(this.title, need === "optional" ? h("span", { class: "optional" }, " optional") : "");
    this.control.setAttribute("aria-required", String(need === "required"));
  }

  get value() {
    if (this.node.hidden) return undefined;
    return this.data || this.control.value.trim() || undefined;
  }

  set value(value) {
    if (value?.startsWith("data:")) this.#show(value);
    else {
      this.clear();
      this.control.value = value ?? "";
    }
  }

  take(file) {
    if (!file.type.startsWith("image/")) {
      this.showError([`${file.name} is not an image; choose a PNG, JPEG or WebP`]);
      return;
    }
    const reader = new FileReader();
    reader.addEventListener("load", () => this.#show(reader.result, file.name));
    reader.readAsDataURL(file);
  }

  #show(data, name = "from the request") {
    this.picture.src = data;
    this.#fill(data, name, "Choose another");
  }

  clear() {
    this.file.value = "";
    this.picture.removeAttribute("src");
    this.#fill("", "or drop or paste one", "Choose an image");
  }

  #fill(data, text, choose) {
    this.data = data;
    this.text.textContent = text;
    this.choose.textContent = choose;
    const show = () => {
      for (const element of [this.picture, this.remove]) element.hidden = !data;
      this.control.hidden = Boolean(data);
    };
    keepFocus(this.node, show, () => this.choose);
    this.showError([]);
    this.node.dispatchEvent(new Event("input", { bubbles: true }));
  }

  showError(texts) {
    for (const control of [this.control, this.choose]) showErrorAt(control, this.error, texts, this.note.id);
  }

  focus() {
    (this.control.hidden ? this.choose : this.control).focus();
  }
}

/** Call `take` with a file that is dropped on `element`, and the event. The innermost element gets it. */
export function takesDrops(element, take) {
  const mark = (on) => element.classList.toggle("over", on);
  element.addEventListener("dragover", (event) => {
    if (event.defaultPrevented || ![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    mark(true);
  });
  element.addEventListener("dragleave", (event) => {
    if (!element.contains(event.relatedTarget)) mark(false);
  });
  element.addEventListener("drop", (event) => {
    mark(false);
    if (event.defaultPrevented || !event.dataTransfer.files[0]) return;
    event.preventDefault();
    take(event.dataTransfer.files[0], event);
  });
}

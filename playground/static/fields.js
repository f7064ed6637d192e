// One field of the form: a label, a control chosen by its JSON Schema, and a place for errors.

import { h, prose } from "./dom.js";

let count = 0;

/** The schema of a field, without the alternative that it may be null. */
export function plain(schema) {
  return { ...schema, ...(schema.anyOf?.find((kind) => kind.type !== "null") ?? {}) };
}

/** A field. Its `value` goes into the request; undefined leaves the field out. */
export class Field {
  constructor(name, schema, { label, required = false, short = false, list = null, step = 1 } = {}) {
    this.name = name;
    this.schema = plain(schema);
    this.step = step;
    const id = `field-${++count}`;
    this.control = this.#control(id, { required, list });
    this.note = h("span", { class: "unseen", id: `${id}-note` }, schema.description ?? "");
    this.error = h("p", { class: "error", id: `${id}-error`, hidden: true });
    this.control.setAttribute("aria-describedby", this.note.id);
    this.node = h(
      "div",
      { class: `field ${this.schema.type === "boolean" ? "tick" : ""}`, "data-field": name },
      h("label", { for: id }, label ?? this.schema.title, required ? null : h("span", { class: "optional" }, " optional")),
      this.control,
      this.note,
      this.error,
    );
    if (short || schema.default !== undefined && schema.default !== null) this.node.querySelector(".optional")?.remove();
    this.control.addEventListener("input", () => this.showError([]));
  }

  #control(id, { required, list }) {
    const { schema } = this;
    const common = { id, name: this.name, "aria-required": required ? "true" : null };
    if (schema.enum) {
      const none = schema.default === null ? [h("option", { value: "" }, "the worker's default")] : [];
      return h("select", common, none, schema.enum.map((value) => h("option", { value }, value)));
    }
    if (schema.type === "boolean") return h("input", { ...common, type: "checkbox" });
    if (this.isNumber) {
      const mode = schema.type === "integer" && schema.minimum >= 0 ? "numeric" : "text";
      const input = h("input", { ...common, type: "text", inputmode: mode, autocomplete: "off", class: "number" });
      input.addEventListener("keydown", (event) => this.#stepped(event));
      return input;
    }
    if (this.isObject) return h("textarea", { ...common, rows: 2, spellcheck: "false", class: "code-text", placeholder: "{}" });
    if (schema.maxLength >= 10000) return h("textarea", { ...common, rows: 3, spellcheck: "true" });
    const type = this.name.endsWith("token") ? "password" : "text";
    return h("input", { ...common, type, list, autocomplete: type === "password" ? "new-password" : "off", spellcheck: "false" });
  }

  /** Such as `trained_with`: written as JSON. */
  get isObject() {
    return "$ref" in this.schema || ["object", "array"].includes(this.schema.type);
  }

  get isNumber() {
    return ["integer", "number"].includes(this.schema.type);
  }

  get value() {
    if (this.control.type === "checkbox") return this.control.checked;
    const text = this.control.value;
    if (text.trim() === "") return undefined;
    if (this.isObject) return parsed(text);
    return this.isNumber ? numberOf(text) : text;
  }

  set value(value) {
    const shown = value ?? this.schema.default;
    if (this.control.type === "checkbox") this.control.checked = Boolean(shown);
    else this.control.value = typeof shown === "object" && shown ? JSON.stringify(shown) : shown ?? "";
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

  /** Show error texts; an empty list removes them. */
  showError(texts) {
    showErrorAt(this.control, this.error, texts, this.note.id);
  }

  focus() {
    for (let fold = this.node.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
    this.control.focus();
  }
}

export function showErrorAt(control, error, texts, noteId) {
  error.hidden = !texts.length;
  error.replaceChildren(...texts.flatMap((text, index) => [index ? h("br") : null, ...prose(text)]).filter(Boolean));
  control.setAttribute("aria-describedby", texts.length ? `${error.id} ${noteId}` : noteId);
  if (texts.length) control.setAttribute("aria-invalid", "true");
  else control.removeAttribute("aria-invalid");
}

/** The object in a text; the text itself if it is not JSON, for the worker's check to say so. */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
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

/** A control image: dropped, pasted, chosen, or given by its URL. */
export class ImageField {
  constructor(schema) {
    this.name = "ctrl_img";
    this.data = "";
    const id = `field-${++count}`;
    this.file = h("input", { type: "file", accept: "image/*", class: "unseen", tabindex: "-1", "aria-hidden": "true" });
    this.choose = h("button", { type: "button", class: "choose", onclick: () => this.file.click() }, "Choose an image");
    this.text = h("span", { class: "soft" }, "or drop or paste one");
    this.picture = h("img", { alt: "", hidden: true });
    this.remove = h("button", { type: "button", class: "quiet", hidden: true, onclick: () => this.clear() }, "Remove");
    this.zone = h("div", { class: "zone" }, this.picture, h("div", { class: "zone-text" }, this.choose, this.text, this.remove));
    this.control = h("input", {
      id,
      name: this.name,
      type: "text",
      placeholder: "or its URL, https://…",
      autocomplete: "off",
      spellcheck: "false",
    });
    this.note = h("span", { class: "unseen", id: `${id}-note` }, schema.description ?? "");
    this.error = h("p", { class: "error", id: `${id}-error`, hidden: true });
    this.label = h("label", { for: id });
    this.node = h("div", { class: "field image", "data-field": this.name }, this.label, this.file, this.zone, this.control);
    this.node.append(this.note, this.error);
    this.control.setAttribute("aria-describedby", this.note.id);
    this.control.addEventListener("input", () => this.showError([]));
    this.file.addEventListener("change", () => this.file.files[0] && this.take(this.file.files[0]));
    takesDrops(this.node, (file) => this.take(file));
  }

  /** "none", "optional" or "required", from the model table. */
  set need(need) {
    this.node.hidden = need === "none";
    this.label.replaceChildren("Control image", need === "optional" ? h("span", { class: "optional" }, " optional") : "");
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
    this.data = data;
    this.picture.src = data;
    this.text.textContent = name;
    this.choose.textContent = "Choose another";
    for (const element of [this.picture, this.remove]) element.hidden = false;
    this.control.hidden = true;
    this.showError([]);
    this.node.dispatchEvent(new Event("input", { bubbles: true }));
  }

  clear() {
    this.data = "";
    this.file.value = "";
    this.picture.removeAttribute("src");
    this.text.textContent = "or drop or paste one";
    this.choose.textContent = "Choose an image";
    for (const element of [this.picture, this.remove]) element.hidden = true;
    this.control.hidden = false;
    this.showError([]);
    this.node.dispatchEvent(new Event("input", { bubbles: true }));
  }

  showError(texts) {
    for (const control of [this.control, this.choose]) showErrorAt(control, this.error, texts, this.note.id);
    this.choose.removeAttribute("aria-invalid"); // buttons do not have this state
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

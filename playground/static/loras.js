// The LoRAs of the form: the one of the model or those of its two sides, and more on top of them.

import { AddButton, Field, plain } from "./fields.js";
import { h } from "./dom.js";

const SIDES = { high: "High noise", low: "Low noise", both: "Both sides" };
const EXTRA = "Extra LoRA";

export class Loras {
  /** `files`: suggestions for the paths. `onchange` is called when a row comes or goes. */
  constructor({ properties, $defs }, files, onchange) {
    Object.assign(this, { own: $defs.Lora.properties, extra: $defs.ExtraLora.properties, onchange });
    this.shapes = new Map(); // the rows by the shape of the model, so that another model and back loses nothing
    this.extras = [];
    this.list = h("div");
    this.extraList = h("div");
    this.add = new AddButton("extra_loras", properties.extra_loras, "Add a LoRA", () => this.#addByHand());
    const suggestions = h("datalist", { id: "lora-files" }, files.map((path) => h("option", { value: path })));
    this.nodes = [this.list, this.extraList, this.add.node, suggestions];
  }

  /** Take the shape of a model with one transformer or, with `moe`, of one with a high and a low side. */
  shape(moe) {
    this.moe = moe;
    if (!this.shapes.has(moe)) this.shapes.set(moe, (moe ? ["high", "low"] : [null]).map((side) => new Row(this.own, side)));
    if (this.rows !== this.shapes.get(moe)) {
      this.rows = this.shapes.get(moe);
      this.list.replaceChildren(...this.rows.map((row) => row.node));
    }
    for (const row of this.extras) row.shape(moe);
  }

  /** The fields of all rows, with their path in the request, and `loras` and `extra_loras` of the request. */
  read() {
    const places = new Map([["loras", this.rows[0].path], ["extra_loras", this.add]]);
    const valuesOf = (name, rows) =>
      rows
        .filter((row) => row.path.value !== undefined)
        .map((row, index) => {
          for (const field of row.fields) places.set(`${name}[${index}].${field.name}`, field);
          return row.value;
        });
    const loras = valuesOf("loras", this.rows);
    const extras = valuesOf("extra_loras", this.extras);
    return { values: { loras, ...(extras.length && { extra_loras: extras }) }, places };
  }

  write({ loras = [], extra_loras = [] }) {
    this.shapes.clear();
    this.shape(this.moe);
    for (const lora of loras) {
      const row = this.rows.find((row) => row.side === (lora.transformer ?? null));
      if (row) row.value = lora;
    }
    this.extras = [];
    this.extraList.replaceChildren();
    for (const lora of extra_loras) this.#addRow().value = lora;
  }

  get fields() {
    return [this.add, ...this.rows.flatMap((row) => row.fields), ...this.extras.flatMap((row) => row.fields)];
  }

  #addRow() {
    const row = new Row(this.extra, undefined, () => this.#remove(row));
    row.shape(this.moe);
    this.extras.push(row);
    this.extraList.append(row.node);
    return row;
  }

  #addByHand() {
    this.#addRow().path.focus();
    this.onchange();
  }

  #remove(row) {
    this.extras = this.extras.filter((other) => other !== row);
    row.node.remove();
    this.add.focus();
    this.onchange();
  }
}

class Row {
  /** `side`: high, low, or null for a model without sides; undefined: it is chosen in the row, which can be removed. */
  constructor(schema, side, onremove) {
    this.side = side;
    const label = side === undefined ? EXTRA : side ? SIDES[side] : "File";
    this.path = new Field("path", schema.path, { label, required: side === null, short: side === undefined, list: "lora-files" });
    this.path.control.placeholder = side ? "none: this side uses the base model" : "job/name.safetensors";
    this.path.control.addEventListener("blur", () => showEnd(this.path.control));
    this.scale = new Field("network_multiplier", schema.network_multiplier, { label: `Scale, ${label}`, short: true, slider: true });
    this.scale.value = undefined;
    this.scale.node.querySelector("label").classList.add("unseen");
    this.fields = [this.path, this.scale];
    this.node = h("div", { class: "lora", role: "group", "aria-label": label === "File" ? "LoRA" : label }, this.path.node, this.scale.node);
    if (side === undefined) this.#addChoices(schema.transformer, onremove);
  }

  #addChoices(schema, onremove) {
    this.chosen = new Field("transformer", { ...plain(schema), default: "both" }, { label: "Side" });
    for (const option of this.chosen.control.options) option.textContent = SIDES[option.value];
    this.chosen.value = undefined;
    this.chosen.node.querySelector("label").classList.add("unseen");
    this.fields.push(this.chosen);
    this.node.classList.add("extra");
    this.node.append(this.chosen.node, h("button", { type: "button", class: "quiet remove", "aria-label": "Remove this LoRA", title: "Remove", onclick: onremove }, "×"));
  }

  shape(moe) {
    this.chosen.shown = moe;
    this.path.node.querySelector("label").classList.toggle("unseen", moe); // the choice of the side stands in its place
  }

  get value() {
    const side = this.side ?? this.chosen?.value;
    return { path: this.path.value, ...(side && { transformer: side }), network_multiplier: this.scale.value };
  }

  set value(lora) {
    this.path.value = lora.path;
    showEnd(this.path.control);
    this.scale.value = lora.network_multiplier;
    if (this.chosen) this.chosen.value = lora.transformer;
  }
}

/** Scroll to the end of a path, where the files of one training job differ: in step and side. */
const showEnd = (control) => (control.scrollLeft = control.scrollWidth);

// The cells of a sweep under their headings.

import { h } from "./dom.js";

/** `cellAt(row, column)` makes the content of a cell. One row alone becomes a list that wraps, each cell below its heading. */
export function tableOf({ rows, columns }, cellAt) {
  if (rows.length === 1) {
    return h("ol", { class: "cells" }, columns.map((column, index) => h("li", {}, h("p", { class: "heading" }, column), cellAt(0, index))));
  }
  const heading = (scope, text) => h("th", { scope, class: "heading" }, text.split("\n").map((line) => h("span", { title: line }, line)));
  const table = h(
    "div",
    { class: "table", role: "group" },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, h("td"), columns.map((text) => heading("col", text)))),
      h("tbody", {}, rows.map((text, row) => h("tr", {}, heading("row", text), columns.map((_, column) => h("td", {}, cellAt(row, column)))))),
    ),
  );
  table.style.setProperty("--columns", columns.length);
  table.style.setProperty("--rows", rows.length);
  return table;
}

// Says in words what differs between two settings or requests.

import { h } from "./dom.js";

const NAMES = {
  sample_steps: "Steps",
  guidance_scale: "Guidance",
  num_frames: "Frames",
  fps: "Frames per second",
  neg: "Negative prompt",
  guidance_scale_2: "Guidance, low noise",
  num_videos: "Videos",
  network_multiplier: "Scale",
  path: "LoRA file",
  transformer: "Side",
  sha256: "File",
  ctrl_img: "First image",
  control_image_sha256: "First image",
  last_img: "Last image",
  last_image_sha256: "Last image",
  match: "Match",
};

/** The path of a setting as a title: `loras[0].network_multiplier` becomes "LoRA 1, scale". */
export function titleOf(path) {
  const parts = path.split(".").map((part) => {
    const [, name, index] = part.match(/^([^[]*)(?:\[(\d+)\])?/);
    const words = { loras: "LoRA", extra_loras: "Extra LoRA", prompts: "Prompt" }[name] ?? NAMES[name] ?? name.replaceAll("_", " ");
    return index === undefined ? words : `${words} ${Number(index) + 1}`;
  });
  const text = parts.map((part, index) => (index ? part.charAt(0).toLowerCase() + part.slice(1) : part)).join(", ");
  return text.charAt(0).toUpperCase() + text.slice(1);
}

const shown = (value) => (value === null || value === undefined ? "none" : typeof value === "string" ? value || "empty" : JSON.stringify(value));

/** Two values one below the other. In texts of several words, those that differ are marked, whole words only. */
export function twoValues(a, b) {
  const [left, right] = [shown(a), shown(b)];
  const [wordsA, wordsB] = [left.split(/\s+/), right.split(/\s+/)];
  const marked = Math.max(wordsA.length, wordsB.length) > 2 ? marks(wordsA, wordsB) : [[left], [right]];
  const line = (name, parts) => h("p", {}, h("span", { class: "side" }, name), h("span", { class: "value" }, parts));
  return [line("A", marked[0]), line("B", marked[1])];
}

/** Both texts as nodes, with the words outside the longest common subsequence in <mark>. */
function marks(a, b) {
  const length = Array.from({ length: a.length + 1 }, () => new Array(b.length + 1).fill(0));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      length[i][j] = a[i] === b[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    }
  }
  const [left, right] = [[], []];
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      left.push(a[i++], " ");
      right.push(b[j++], " ");
    } else if (j === b.length || (i < a.length && length[i + 1][j] >= length[i][j + 1])) left.push(h("mark", {}, a[i++]), " ");
    else right.push(h("mark", {}, b[j++]), " ");
  }
  return [left, right];
}

/** What changed from one request to the next, in a few words: "steps 30, and 2 more". Empty if nothing did. */
export function changesBetween(before, after) {
  const [old, now] = [flat(before), flat(after)];
  const paths = [...new Set([...now.keys(), ...old.keys()])].filter((path) => old.get(path) !== now.get(path));
  if (!paths.length) return "";
  const word = (path) => {
    const name = titleOf(path.split(".").at(-1)).toLowerCase();
    const value = now.get(path);
    const isShort = value !== undefined && String(value).length <= 12;
    return isShort ? `${name} ${value}` : value === undefined ? `no ${name}` : name;
  };
  return paths.length === 1 ? word(paths[0]) : `${word(paths[0])}, +${paths.length - 1}`;
}

/** The values of an object by their paths. */
function flat(value, path = "", found = new Map()) {
  if (Array.isArray(value)) value.forEach((item, index) => flat(item, `${path}[${index}]`, found));
  else if (value && typeof value === "object") for (const [name, item] of Object.entries(value)) flat(item, path ? `${path}.${name}` : name, found);
  else found.set(path, value);
  return found;
}

// Makes elements from data. Text from the worker stays text and never becomes markup.

/** `h("p", {class: "x", onclick: f}, "text", node, …)`; attributes that are null, undefined or false are left out. */
export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** `h` for SVG elements. */
export function s(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...shown(children));
  return element;
}

const shown = (children) => children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);

/** Text with `code` between backticks, as nodes. */
export function prose(text) {
  return String(text)
    .split(/`([^`]+)`/)
    .map((part, index) => (index % 2 ? h("code", {}, part) : part));
}

export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** A worker's message as a sentence: they begin in lower case and have no full stop. */
export const sentence = (text) => (text ? capital(text).replace(/\.?$/, ".") : "");

/**
 * Replace the content. Children that stay are not touched, so that they keep the focus and what was pressed. If the focus was in
 * a child that goes, the nearest focusable parent gets it, so that it does not jump to the top.
 */
export function refill(element, ...children) {
  const had = element.contains(document.activeElement);
  const nodes = shown(children).map((child) => (child instanceof Node ? child : document.createTextNode(child)));
  for (const node of [...element.childNodes]) if (!nodes.includes(node)) node.remove();
  nodes.forEach((node, place) => node === element.childNodes[place] || element.insertBefore(node, element.childNodes[place] ?? null));
  if (had && !element.contains(document.activeElement)) element.closest("[tabindex='-1']")?.focus();
}

/** Put an element in the place of another. The first button has the focus if a part of the other one had it. */
export function swap(before, now) {
  const had = before.contains(document.activeElement);
  before.replaceWith(now);
  if (had) now.querySelector("button")?.focus();
}

/** Make a change that can hide or remove what has the focus in `element`. The control that `next` returns has it then. */
export function keepFocus(element, change, next) {
  const before = document.activeElement;
  const had = element.contains(before);
  change();
  if (had && (!element.contains(before) || before.disabled || !before.checkVisibility())) next().focus();
}

/** Replace the content of a live region if its text is another one, so that screen readers announce it once. */
export function tell(element, ...children) {
  const now = h("div", {}, ...children);
  if (now.textContent !== element.textContent) element.replaceChildren(...now.childNodes);
}

export function seconds(value) {
  if (value < 10) return `${Number(value.toFixed(1))} s`;
  if (value < 60) return `${Math.round(value)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

/** A button that needs two presses, so that one by mistake does nothing. */
export function twoPresses(text, again, act) {
  const button = h("button", { type: "button", class: "quiet", onclick: () => ("sure" in button.dataset ? act() : ask()) }, text);
  const ask = () => {
    button.dataset.sure = "";
    button.textContent = again;
    say(`${again}? Press again, or Escape`);
  };
  const forget = () => {
    delete button.dataset.sure;
    button.textContent = text;
  };
  button.addEventListener("blur", forget);
  button.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !("sure" in button.dataset)) return;
    event.preventDefault(); // no step back as well
    forget();
  });
  return button;
}

/** Announce a text to screen readers. */
export function say(text) {
  const line = document.getElementById("said");
  if (line.textContent !== text) line.textContent = text;
}

export const calm = matchMedia("(prefers-reduced-motion: reduce)");

// The line in the header: which worker it is, what it serves, and whether it is ready.

import { askWorker } from "./api.js";
import { h, prose, say, sentence } from "./dom.js";

const SECONDS_BETWEEN_LOOKS = { local: 4, endpoint: 15 };
const WORDS = { ready: "Ready", busy: "Busy", cold: "Cold", gone: "No answer" };

export class WorkerLine {
  /**
   * `events.model` receives the id of the model that the worker serves, when it is known first and when it changes.
   * `events.answers` is called when a worker answers that did not answer before.
   */
  constructor(node, config, events) {
    Object.assign(this, { node, config, events });
    this.pause = 1000 * SECONDS_BETWEEN_LOOKS[config.target.is_local ? "local" : "endpoint"];
    document.addEventListener("visibilitychange", () => document.hidden || this.look());
  }

  async follow() {
    await this.look();
    this.interval ??= setInterval(() => document.hidden || this.look(), this.pause);
  }

  /** Ask for the worker's state now. */
  async look() {
    const { name, is_local } = this.config.target;
    // The playground's own process may be gone too; a run says so, with what to do.
    const worker = await askWorker().catch((error) => ({ state: "gone", text: error.message, model: this.model }));
    if (worker.model && worker.model !== this.model) this.events.model((this.model = worker.model));
    const model = this.config.models.find(({ id }) => id === worker.model);
    // Ready and busy follow from the runs, which are announced themselves.
    if (this.state && this.state !== worker.state && [this.state, worker.state].includes("gone")) say(`Worker: ${WORDS[worker.state]}`);
    if (this.state === "gone" && worker.state !== "gone") this.events.answers();
    this.state = worker.state;
    this.node.dataset.state = worker.state;
    this.node.title = sentence(worker.text);
    this.node.replaceChildren(
      h("span", { class: "dot", "aria-hidden": "true" }),
      h("b", {}, WORDS[worker.state]),
      " ",
      h("span", { class: "means" }, worker.state === "gone" ? "" : prose(worker.text), worker.state === "gone" || !worker.text ? "" : ". "),
      h("span", { class: "where" }, model ? `${model.title} at ` : is_local ? "Worker at " : "RunPod ", h("code", {}, name)),
    );
  }
}

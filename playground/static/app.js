// The page: connects the form, the stage and the strip to the jobs of the playground's process.

import { ApiError, allJobs, cancelJob, check, deleteJob, getConfig, refreshJob, startJob } from "./api.js";
import { Comparison } from "./comparison.js";
import { copyAs } from "./copy.js";
import { h, prose, s, say, sentence } from "./dom.js";
import { Form } from "./form.js";
import { inAWord, spoken } from "./progress.js";
import { Stage, itemsOf, placeOf } from "./stage.js";
import { Strip } from "./strip.js";
import { WorkerLine } from "./worker.js";

const byId = (id) => document.getElementById(id);
const SECONDS_BETWEEN_POLLS = { local: 0.4, endpoint: 1.5 };
const SECONDS_UNTIL_RETRY = 4;
const narrow = matchMedia("(max-width: 760px)");

class App {
  constructor(config) {
    this.config = config;
    this.jobs = new Map();
    this.samples = new Map(); // the trainer's own video of a job
    this.stage = new Stage(byId("screen"), byId("facts"), {
      cancel: (job) => this.#cancel(job),
      remove: (job) => this.#remove(job),
      reuse: (job, item) => this.#reuse(job, item),
      sample: (file, place) => this.#compare(file, place),
      correct: (job) => this.#correct(job),
    }, Boolean(config.example));
    this.strip = new Strip(byId("strip"), {
      open: (job, item) => (this.#show(job, item), this.#toStage()),
      compare: (a, b) => this.#compare(a, b),
    });
    this.form = new Form(config, byId("fields"));
    this.worker = new WorkerLine(byId("target"), config, {
      model: (id) => this.form.serve(id),
      answers: () => byId("not-sent").replaceChildren(),
    });
    byId("request").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#run();
    });
    byId("vary").addEventListener("click", () => this.#run(4));
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.#run();
    });
    for (const button of document.querySelectorAll("[data-copy]")) {
      button.addEventListener("click", () => this.#copy(button));
    }
  }

  async restore() {
    const { jobs } = await allJobs();
    for (const job of jobs) this.#take(job);
    if (jobs.length) this.#show(jobs.at(-1));
    for (const job of jobs) if (isOpen(job)) this.#watch(job.number);
  }

  // Runs

  /** `copies`: videos for each prompt. */
  async #run(copies = 1) {
    if (this.starting) return;
    this.starting = true;
    this.#sending(true);
    byId("not-sent").replaceChildren(); // so that the same words are announced, and seen, as new
    try {
      const request = this.form.next(copies);
      const { problems } = await check(request);
      this.form.showProblems(problems);
      if (problems.length) {
        say(`Not sent: ${problems.length === 1 ? "one problem" : `${problems.length} problems`} to correct`);
        return;
      }
      const sample = this.form.training.ownSample(request);
      const job = await startJob(request);
      if (sample) this.samples.set(job.number, sample);
      this.#take(job);
      this.#show(job);
      this.#toStage();
      this.#watch(job.number);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      byId("not-sent").replaceChildren(h("p", {}, h("b", {}, "Not sent. "), prose(sentence(error.message))));
      this.worker.look();
    } finally {
      this.#sending(false);
    }
  }

  #sending(on) {
    this.starting = on;
    byId("run").ariaDisabled = on ? "true" : null;
    byId("run-text").textContent = on ? "Sending" : "Run";
  }

  /** Poll a job until it ends. Failures are shown; those that can pass are retried. */
  async #watch(number) {
    const pause = SECONDS_BETWEEN_POLLS[this.config.target.is_local ? "local" : "endpoint"];
    for (;;) {
      try {
        const job = await refreshJob(number);
        this.stage.hideTrouble();
        this.#take(job);
        if (!isOpen(job)) return this.#ended(job);
        await sleep(pause);
      } catch (error) {
        this.#showTrouble(error, null);
        if (!(error instanceof ApiError && error.again)) return undefined;
        await sleep(SECONDS_UNTIL_RETRY);
      }
    }
  }

  #take(job) {
    this.jobs.set(job.number, job);
    this.strip.put(job);
    this.#title();
    if (this.shown === job.number) {
      this.stage.show(job);
      if (isOpen(job)) say(spoken(job));
    }
  }

  /** The tab's title tells how far the newest open run is. */
  #title() {
    const open = [...this.jobs.values()].filter(isOpen).at(-1);
    document.title = open ? `${inAWord(open)} · Playground` : this.unseen ? `● ${this.unseen} · Playground` : "Playground";
  }

  /** Tell of a run that ended while the page was not looked at. */
  #notify(text) {
    if (!document.hidden) return;
    this.unseen = text;
    this.#title();
    document.addEventListener("visibilitychange", () => ((this.unseen = ""), this.#title()), { once: true });
    if (globalThis.Notification?.permission === "granted") new Notification(text, { tag: "playground" });
  }

  async #ended(job) {
    const text = { done: `Run ${job.number} is ready`, failed: `Run ${job.number} failed`, cancelled: "Cancelled" }[job.status];
    say(text);
    this.#notify(text);
    if (job.status === "failed" && this.shown === job.number) this.#correct(job);
    this.worker.look(); // what it serves may be known only now; the form then takes that model
    const sample = job.status === "done" && this.shown === job.number && this.samples.get(job.number);
    if (sample) await this.#compare(sample, placeOf(itemsOf(job)[0]));
  }

  /** Show the worker's problems at the fields of the form. */
  #correct(job) {
    this.form.showProblems(job.problems);
  }

  #show(job, item) {
    if (this.comparison) this.strip.unpick();
    this.comparison?.close();
    this.comparison = undefined;
    this.shown = job.number;
    this.stage.show(this.jobs.get(job.number), item);
    this.strip.mark(job.number, this.stage.item);
  }

  /** Scroll to the stage in the one-column layout, where the form fills the screen. */
  #toStage() {
    if (narrow.matches) byId("stage").scrollIntoView();
  }

  async #remove(job) {
    try {
      await deleteJob(job.number);
    } catch (error) {
      this.#showTrouble(error, () => this.#remove(job));
      return;
    }
    this.jobs.delete(job.number);
    this.samples.delete(job.number);
    this.strip.remove(job.number);
    say(`Run ${job.number} was deleted`);
    const next = [...this.jobs.values()].at(-1);
    if (next) this.#show(next);
    else {
      this.shown = undefined;
      this.stage.clear();
    }
    byId("stage").focus();
  }

  async #cancel(job) {
    try {
      this.#take(await cancelJob(job.number));
    } catch (error) {
      this.#showTrouble(error, () => this.#cancel(job));
    }
  }

  #reuse(job, item) {
    const request = structuredClone(job.request);
    if (item) Object.assign(request.prompts[item.prompt_index], { seed: /^\d+$/.test(item.seed) ? BigInt(item.seed) : item.seed, num_videos: 1 });
    this.form.write(request);
    say(`The form has the settings of run ${job.number}`);
    byId("request").scrollIntoView({ block: "nearest" });
  }

  // Comparison

  async #compare(a, b) {
    const back = this.jobs.get(Number(b.split("/")[0]));
    this.comparison?.close();
    this.comparison = new Comparison(byId("screen"), byId("facts"), () => this.#show(back));
    this.stage.leave();
    this.shown = undefined;
    this.strip.mark(undefined);
    this.#toStage();
    await this.comparison.open(a, b);
  }

  // Errors and copying

  #showTrouble(error, again) {
    if (!(error instanceof ApiError)) throw error;
    this.stage.showTrouble(error.message, error.again ? again : null);
    this.#toStage();
  }

  async #copy(button) {
    const { request } = this.form.read();
    const kind = button.dataset.copy;
    const secret = request.hf_token ? "; your Hugging Face token is in it" : "";
    try {
      await navigator.clipboard.writeText(copyAs(kind, request, this.config.target));
      say(`Copied as ${kind}${secret}`);
      button.textContent = "Copied";
    } catch {
      say("The browser does not allow this page to copy");
      button.textContent = "Not allowed";
    }
    setTimeout(() => (button.textContent = kind), 1500);
  }
}

const isOpen = (job) => ["queued", "running"].includes(job.status);
const sleep = (count) => new Promise((resolve) => setTimeout(resolve, 1000 * count));

/** An icon, half light and half dark. */
const half = () =>
  s(
    "svg",
    { width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" },
    s("circle", { cx: 7, cy: 7, r: 6, fill: "none", stroke: "currentColor", "stroke-width": 1.5 }),
    s("path", { d: "M7 1a6 6 0 0 1 0 12z", fill: "currentColor" }),
  );

/** Switches the colours between the system's, light and dark. */
function themes(button) {
  const names = ["auto", "light", "dark"];
  const apply = (name) => {
    document.documentElement.dataset.theme = name;
    button.replaceChildren(half(), h("span", {}, { auto: "Auto", light: "Light", dark: "Dark" }[name]));
    button.setAttribute("aria-label", `Colours: ${name}`);
  };
  apply(names.includes(localStorage.theme) ? localStorage.theme : "auto");
  button.addEventListener("click", () => {
    localStorage.theme = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % 3];
    apply(localStorage.theme);
  });
}

async function start() {
  themes(byId("theme"));
  byId("shortcut").textContent = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵";
  try {
    const config = await getConfig();
    const app = new App(config);
    await Promise.all([app.worker.follow(), app.restore()]);
    document.body.dataset.ready = "";
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    const retry = h("button", { type: "button", onclick: start }, "Try again");
    byId("screen").replaceChildren(h("div", { class: "trouble", role: "alert" }, h("p", {}, error.message), retry));
  }
}

start();

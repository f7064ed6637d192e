// The page: connects the form, the stage and the strip to the jobs of the playground's process.

import {
  ApiError,
  allJobs,
  allSweeps,
  cancelJob,
  cancelSweep,
  check,
  deleteJob,
  deleteSweep,
  getConfig,
  progressOfJob,
  refreshJob,
  refreshSweep,
  startJob,
  startSweep,
  sweepAgain,
} from "./api.js";
import { Comparison } from "./comparison.js";
import { copyAs } from "./copy.js";
import { h, prose, refill, s, say, sentence } from "./dom.js";
import { Form } from "./form.js";
import { Planner } from "./planner.js";
import { inAWord, spoken } from "./progress.js";
import { Stage, itemsOf, placeOf } from "./stage.js";
import { Strip } from "./strip.js";
import { SweepView, cellsOf, standing } from "./sweep.js";
import { WorkerLine } from "./worker.js";

const byId = (id) => document.getElementById(id);
const SECONDS_BETWEEN_POLLS = { local: 0.4, endpoint: 1.5 };
const SECONDS_UNTIL_RETRY = 4;
const narrow = matchMedia("(max-width: 760px)");

class App {
  constructor(config) {
    this.config = config;
    this.jobs = new Map();
    this.sweeps = new Map();
    this.watched = new Set(); // numbers of the open sweeps that are polled
    this.samples = new Map(); // the trainer's own video of a job
    this.stage = new Stage(byId("screen"), byId("facts"), {
      cancel: (job) => this.#cancel(job),
      remove: (job) => this.#remove(job),
      reuse: (job, item) => this.#reuse(job, item),
      sample: (file, place) => this.#compare(file, place),
      correct: (job) => this.#correct(job),
      sweep: (job) => (this.#showSweep(job.sweep), this.view.focus(job.cell)),
    }, Boolean(config.example));
    this.strip = new Strip(byId("strip"), {
      open: (job, item) => (this.#show(job, item), this.#toStage()),
      compare: (a, b) => this.#compare(a, b),
      sweep: (number) => (this.#showSweep(number), this.#toStage()),
    });
    this.form = new Form(config, byId("fields"));
    this.form.onchange = () => this.view?.look?.();
    this.worker = new WorkerLine(byId("target"), config, {
      model: (id) => this.form.serve(id),
      answers: () => byId("not-sent").replaceChildren(),
    });
    byId("request").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#run();
    });
    byId("request").addEventListener("input", () => (this.sentFrom = undefined)); // who types on keeps the focus
    byId("vary").addEventListener("click", () => this.#run(4));
    byId("sweep").addEventListener("click", () => this.#plan());
    byId("stage").addEventListener("keydown", (event) => event.key === "Escape" && !event.defaultPrevented && this.#back());
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      if (this.view instanceof Planner && byId("screen").contains(event.target)) this.view.start();
      else this.#run();
    });
    for (const button of document.querySelectorAll("[data-copy]")) {
      button.addEventListener("click", () => this.#copy(button));
    }
  }

  async restore() {
    const [{ jobs }, { sweeps }] = await Promise.all([allJobs(), allSweeps()]);
    for (const sweep of sweeps) this.sweeps.set(sweep.number, sweep); // their runs have their titles
    for (const job of jobs) this.#take(job);
    for (const sweep of sweeps) this.#takeSweep(sweep);
    const [job, sweep] = [jobs.at(-1), sweeps.at(-1)];
    if (sweep && sweep.after >= (jobs.findLast((other) => !other.sweep)?.number ?? 0)) this.#showSweep(sweep.number);
    else if (job) this.#show(job);
    for (const job of jobs) if (isOpen(job) && !job.sweep) this.#watch(job.number);
    for (const sweep of sweeps) this.#watchSweep(sweep.number);
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
      if (problems.length) return;
      const sample = this.form.training.ownSample(request);
      const job = await startJob(request);
      if (sample) this.samples.set(job.number, sample);
      this.sentFrom = document.activeElement;
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
        const job = { ...this.jobs.get(number), ...(await progressOfJob(number)) };
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
    if (job.sweep) job.title = cellsOf(this.sweeps.get(job.sweep) ?? { cells: [] }).find(({ place }) => place === job.cell)?.title;
    else this.strip.put(job);
    this.#title();
    if (this.shown === job.number) {
      this.stage.show(job);
      if (isOpen(job)) this.#tell(job);
    }
  }

  /** Announce the progress of a run where it has changed. Until then, what else was announced stays. */
  #tell(job) {
    const text = spoken(job);
    const now = `${job.number} ${text}`;
    if (now !== this.told) say(text);
    this.told = now;
  }

  /** The tab's title tells how far the newest open run is, or else the newest open sweep. */
  #title() {
    const run = [...this.jobs.values()].filter((job) => isOpen(job) && !job.sweep).at(-1);
    const sweep = [...this.sweeps.values()].filter(({ is_open }) => is_open).at(-1);
    const cells = sweep ? cellsOf(sweep) : [];
    const open = run ? inAWord(run) : sweep && `${cells.filter(({ status }) => status === "done").length} of ${cells.length}`;
    document.title = open ? `${open} · Playground` : this.unseen ? `● ${this.unseen} · Playground` : "Playground";
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
    if (job.status === "failed" && this.shown === job.number) this.#correct(job, { focus: document.activeElement === this.sentFrom });
    this.worker.look(); // what it serves may be known only now; the form then takes that model
    const sample = job.status === "done" && this.shown === job.number && this.samples.get(job.number);
    if (sample) await this.#compare(sample, placeOf(itemsOf(job)[0]));
  }

  /** Show the worker's problems at the fields of the form. Without `focus`, the focus stays where it is. */
  #correct(job, { focus = true } = {}) {
    this.form.showProblems(job.problems, { focus });
  }

  #show(job, item) {
    this.#closeView();
    this.strip.picks.clear();
    this.shown = job.number;
    this.stage.show(this.jobs.get(job.number), item);
    this.strip.mark(job.number, this.stage.item, job.sweep);
  }

  #closeView() {
    this.view?.close();
    this.view = undefined;
  }

  /** Show something else than a run: `make` builds the view. */
  #open(make, sweep) {
    this.#closeView();
    this.stage.leave();
    this.shown = undefined;
    this.strip.mark(undefined, undefined, sweep);
    this.view = make(byId("screen"), byId("facts"));
  }

  /** Escape: from a plan or a comparison to what was shown before it, and from a cell's run to its sweep. */
  #back() {
    const { sweep, cell } = this.jobs.get(this.shown) ?? {};
    if (this.view?.back) this.view.back();
    else if (sweep) {
      this.#showSweep(sweep);
      this.view.focus(cell);
    }
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
    say(`Run ${job.number} was deleted`);
    if (job.sweep) {
      this.#takeSweep(await refreshSweep(job.sweep));
      return this.#showSweep(job.sweep);
    }
    this.strip.remove(job.number);
    this.#showLast();
    byId("stage").focus();
  }

  #showLast() {
    const runs = [...this.jobs.values()].filter((job) => !job.sweep);
    const sweep = [...this.sweeps.keys()].at(-1);
    if (runs.length) this.#show(runs.at(-1));
    else if (sweep) this.#showSweep(sweep);
    else {
      this.#closeView();
      this.shown = undefined;
      this.stage.clear();
    }
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

  /** `sweep`: the number of the one whose cells they are. */
  async #compare(a, b, sweep) {
    const { item } = this.stage;
    const back = () => (sweep ? this.#showSweep(sweep) : this.#show(this.jobs.get(Number(b.split("/")[0]))));
    this.#open((screen, facts) => new Comparison(screen, facts, back, sweep ? "sweep" : "video"), sweep);
    this.stage.item = item; // of which another sample can be dropped on the screen
    this.#toStage();
    await this.view.open(a, b);
  }

  // Sweeps

  #plan() {
    const [run, sweep] = [this.jobs.get(this.shown), this.view instanceof SweepView && this.view.sweep.number];
    const close = () => {
      if (sweep && this.sweeps.has(sweep)) this.#showSweep(sweep);
      else if (run) this.#show(run);
      else this.#showLast();
      byId("sweep").focus();
    };
    this.#open((screen, facts) => new Planner(screen, facts, this.form, this.config.loras, { start: (sweep) => this.#startSweep(sweep), close }));
    this.#toStage();
    this.view.focus();
  }

  async #startSweep(asked) {
    if (this.starting) return;
    this.starting = true;
    try {
      const sweep = await startSweep(asked);
      this.#takeSweep(sweep);
      this.#showSweep(sweep.number);
      byId("stage").focus();
      this.#watchSweep(sweep.number);
    } catch (error) {
      this.#showTrouble(error, () => this.#startSweep(asked));
    } finally {
      this.starting = false;
    }
  }

  /** Poll a sweep until it ends. */
  async #watchSweep(number) {
    if (this.watched.has(number)) return;
    this.watched.add(number);
    const pause = SECONDS_BETWEEN_POLLS[this.config.target.is_local ? "local" : "endpoint"];
    while (this.sweeps.get(number)?.is_open) {
      try {
        await sleep(pause);
        const sweep = await refreshSweep(number);
        this.stage.hideTrouble();
        if (this.sweeps.has(number)) this.#takeSweep(sweep);
        if (!sweep.is_open) this.#sweepEnded(sweep);
      } catch (error) {
        if (!this.sweeps.has(number)) break; // it was deleted meanwhile
        this.#showTrouble(error, null);
        if (!error.again) break;
        await sleep(SECONDS_UNTIL_RETRY);
      }
    }
    this.watched.delete(number);
  }

  #takeSweep(sweep) {
    this.sweeps.set(sweep.number, sweep);
    this.strip.putSweep(sweep);
    this.#title();
    if (this.view instanceof SweepView && this.view.sweep.number === sweep.number) this.view.update(sweep);
  }

  #sweepEnded(sweep) {
    const text = `Sweep ${sweep.number} has ended: ${standing(sweep)}`;
    say(text);
    this.#notify(text);
    this.worker.look();
  }

  #showSweep(number) {
    const act = async (ask) => {
      try {
        const sweep = await ask();
        this.#takeSweep(sweep);
        this.#watchSweep(number);
      } catch (error) {
        this.#showTrouble(error, () => act(ask));
      }
    };
    const actions = {
      open: (cell) => this.#openCell(cell),
      compare: (a, b) => this.#compare(a, b, number),
      cancel: () => act(() => cancelSweep(number)),
      again: (place) => act(() => sweepAgain(number, { place, hf_token: this.form.read().request.hf_token })),
      remove: () => this.#removeSweep(number),
    };
    this.#open((screen, facts) => new SweepView(screen, facts, actions, this.sweeps.get(number)), number);
    this.strip.picks.clear();
    this.stage.item = undefined;
  }

  /** Show the run of a cell as any other. */
  async #openCell(cell) {
    try {
      const job = await refreshJob(cell.job);
      this.#take(job);
      this.#show(job);
      byId("stage").focus();
      this.#toStage();
      if (isOpen(job)) this.#watch(job.number);
    } catch (error) {
      this.#showTrouble(error, () => this.#openCell(cell));
    }
  }

  async #removeSweep(number) {
    try {
      await deleteSweep(number);
    } catch (error) {
      this.#showTrouble(error, () => this.#removeSweep(number));
      return;
    }
    this.sweeps.delete(number);
    for (const job of [...this.jobs.values()]) if (job.sweep === number) this.jobs.delete(job.number);
    this.strip.removeSweep(number);
    say(`Sweep ${number} was deleted`);
    this.#showLast();
    byId("stage").focus();
  }

  // Errors and copying

  #showTrouble(error, again) {
    if (!(error instanceof ApiError)) throw error;
    this.stage.showTrouble(error.message, error.again ? again : null);
    if (again) this.#toStage(); // not at every try of a poll
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

let app, starting;

/** A press on "Try again" while the page still tries changes nothing. */
const start = () => (starting ??= begin().finally(() => (starting = undefined)));

async function begin() {
  try {
    app ??= new App(await getConfig());
    await Promise.all([app.worker.follow(), app.restore()]);
    document.body.dataset.ready = "";
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    const retry = h("button", { type: "button", onclick: start }, "Try again");
    refill(byId("screen"), h("div", { class: "trouble", role: "alert" }, h("p", {}, prose(sentence(error.message))), retry));
  }
}

themes(byId("theme"));
byId("shortcut").textContent = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵";
start();

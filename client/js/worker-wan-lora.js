// A client for this worker, for Node 18 and newer and for browsers: no package, one file. Types: worker-wan-lora.d.ts.
//
//   import { Client } from "./worker-wan-lora.js";
//   const client = Client.endpoint("ENDPOINT_ID", process.env.RUNPOD_API_KEY);   // or Client.local()
//   const result = await client.run(request, { onProgress: (progress) => console.log(progress.stage, progress.percent) });
//   console.log(result.outputs.videos[0].url);
//
// A key does not belong into a page that others open: there, call a server of your own that has the key.

const RUNPOD = "https://api.runpod.ai/v2";
const LOCAL = "http://localhost:8000";
const RUNNING = ["IN_QUEUE", "IN_PROGRESS"];
const NOT_STARTED = [429, 503]; // statuses of a server that has not begun to handle the request
const LONGEST_PAUSE = 30;

/** `code` is one word, such as LORA_NOT_FOUND or UNREACHABLE; `message` says what happened; `jobId` is the job's, if there is one. */
export class ClientError extends Error {
  constructor(code, message, jobId) {
    super(message);
    Object.assign(this, { name: "ClientError", code, jobId });
  }
}

export class Client {
  #url;
  #key;
  #patience;
  #pause;

  /** `patience`: seconds without an answer until the client gives up. `pause`: seconds between two looks at a job. */
  constructor(url, key, { patience = key ? 1800 : 60, pause = 1 } = {}) {
    this.#url = url.replace(/\/+$/, "");
    this.#key = key;
    this.#patience = patience;
    this.#pause = pause;
  }

  /** A RunPod Serverless endpoint. */
  static endpoint(id, key, { baseUrl = RUNPOD, ...options } = {}) {
    if (!key) throw new ClientError("NOT_AUTHORIZED", "there is no API key; take one from the settings of RunPod's console");
    if (!/^[\w-]+$/.test(id)) throw new ClientError("REFUSED", "an endpoint's id has only letters, digits and hyphens");
    return new Client(`${baseUrl}/${id}`, key, options);
  }

  /** A worker's local API: `python handler.py --rp_serve_api`. */
  static local(url = LOCAL, options = {}) {
    return new Client(url, undefined, options);
  }

  /** Start a job with this `input` and wait for its result. */
  async run(input, options = {}) {
    return this.wait(await this.submit(input, options), options);
  }

  /** Start a job; returns its id. A request whose answer is lost is not sent again, since it would be made, and paid, twice. */
  async submit(input, { signal } = {}) {
    return (await this.#call("POST", "/run", { body: JSON.stringify({ input }), once: true, signal })).id;
  }

  /** Wait for a job's end, through lost connections. An aborted `signal` ends the waiting, not the job. */
  async wait(jobId, { onProgress, signal } = {}) {
    for (;;) {
      const answer = await this.#call("GET", `/status/${encodeURIComponent(jobId)}`, { jobId, signal });
      if (!RUNNING.includes(answer.status)) return resultOf(jobId, answer);
      onProgress?.({ status: answer.status, ...(answer.status === "IN_PROGRESS" && answer.output?.stage ? answer.output : {}) });
      await sleep(this.#pause, signal);
    }
  }

  /** `{ id, status, output?, error? }`, as RunPod answers. */
  status(jobId) {
    return this.#call("GET", `/status/${encodeURIComponent(jobId)}`, { jobId });
  }

  /** Stop a job; returns its status. */
  async cancel(jobId) {
    return (await this.#call("POST", `/cancel/${encodeURIComponent(jobId)}`, { jobId })).status;
  }

  /** The workers and their jobs; at a local API also the `model` that is served. */
  health() {
    return this.#call("GET", "/health", {});
  }

  async #call(method, path, { body, once = false, jobId, signal }) {
    const headers = { ...(body && { "Content-Type": "application/json" }), ...(this.#key && { Authorization: `Bearer ${this.#key}` }) };
    const started = Date.now();
    for (let pause = 0.5; ; pause = Math.min(2 * pause, LONGEST_PAUSE)) {
      let failure, arrived;
      try {
        const response = await fetch(this.#url + path, { method, headers, body, signal, redirect: "error" });
        if (response.ok) return await response.json();
        await response.body?.cancel();
        refuse(response.status, jobId);
        failure = response.status === 429 ? "too many requests" : `status ${response.status}`;
        arrived = !NOT_STARTED.includes(response.status);
      } catch (error) {
        if (error instanceof ClientError || signal?.aborted) throw error;
        failure = "no connection, or it broke";
        arrived = error.cause?.code !== "ECONNREFUSED";
      }
      if (once && arrived) throw new ClientError("SUBMISSION_UNKNOWN", `the request was sent, but its answer was lost (${failure}): the job may run, or it may not`);
      if ((Date.now() - started) / 1000 + pause > this.#patience) throw new ClientError("UNREACHABLE", `${this.#url}: ${failure}`, jobId);
      await sleep(pause, signal);
    }
  }
}

/** Throw for a status that a repetition would not change. */
function refuse(status, jobId) {
  if (status === 401 || status === 403) throw new ClientError("NOT_AUTHORIZED", `the key is not accepted (status ${status})`, jobId);
  if (status === 404) throw new ClientError("NOT_FOUND", jobId ? `there is no job ${jobId}` : "there is no such endpoint or local API", jobId);
  if (status >= 400 && status < 500 && ![408, 425, 429].includes(status)) throw new ClientError("REFUSED", `the request is refused (status ${status})`, jobId);
}

function resultOf(jobId, { status, output, error }) {
  if (status === "COMPLETED" && output?.outputs) return output;
  if (status === "CANCELLED") throw new ClientError("CANCELLED", "the job was cancelled", jobId);
  if (status === "TIMED_OUT") throw new ClientError("TIMEOUT", "RunPod stopped the job at its time limit", jobId);
  const text = typeof error === "string" ? error : status === "COMPLETED" ? "the job completed without a result of this worker" : "RunPod gives no reason; look at the worker's log";
  throw new ClientError(/^([A-Z]+(?:_[A-Z]+)*): /.exec(text)?.[1] ?? "JOB_FAILED", text, jobId);
}

const sleep = (seconds, signal) =>
  new Promise((resolve, reject) => {
    const stop = () => (clearTimeout(timer), reject(signal.reason));
    const timer = setTimeout(() => (signal?.removeEventListener("abort", stop), resolve()), 1000 * seconds);
    if (signal?.aborted) stop();
    else signal?.addEventListener("abort", stop, { once: true });
  });

// The calls to the playground's own process. An answer that is not a success is thrown as an ApiError with its text.

export class ApiError extends Error {
  constructor(text, again) {
    super(text);
    this.again = again;
  }
}

const GONE = "the playground's process does not answer; restart it, then try again";

export const getConfig = () => ask("GET", "/api/config");
export const askWorker = () => ask("GET", "/api/worker");
export const readTraining = (folder) => ask("POST", "/api/training", json(folder));
export const check = (request) => ask("POST", "/api/check", json(request));
export const allJobs = () => ask("GET", "/api/jobs");
export const startJob = (request) => ask("POST", "/api/jobs", json(request));
export const refreshJob = (job) => ask("GET", `/api/jobs/${job}`);
/** As `refreshJob`, without the request. */
export const progressOfJob = (job) => ask("GET", `/api/jobs/${job}/progress`);
export const deleteJob = (job) => ask("POST", `/api/jobs/${job}/delete`);
export const cancelJob = (job) => ask("POST", `/api/jobs/${job}/cancel`);

export const planSweep = (sweep) => ask("POST", "/api/sweeps/plan", json(sweep));
export const allSweeps = () => ask("GET", "/api/sweeps");
export const startSweep = (sweep) => ask("POST", "/api/sweeps", json(sweep));
export const refreshSweep = (sweep) => ask("GET", `/api/sweeps/${sweep}`);
export const cancelSweep = (sweep) => ask("POST", `/api/sweeps/${sweep}/cancel`);
export const deleteSweep = (sweep) => ask("POST", `/api/sweeps/${sweep}/delete`);
/** `place`: of one cell; undefined makes all again that were not made. */
export const sweepAgain = (sweep, again) => ask("POST", `/api/sweeps/${sweep}/again`, json(again));
/** The video in which all finished cells play. */
export const gridOf = (sweep) => ask("POST", `/api/sweeps/${sweep}/grid`);

/** `a` and `b` are `JOB/FILE`, or `a` is a File. */
export function compare(a, b) {
  const query = new URLSearchParams(a instanceof File ? { name: a.name, b } : { a, b });
  return ask("POST", `/api/compare?${query}`, a instanceof File ? { body: a } : {});
}

async function ask(method, path, more = {}) {
  let response;
  try {
    response = await fetch(path, { method, ...more });
  } catch {
    throw new ApiError(GONE, true);
  }
  const answer = await response.json().catch(() => ({ error: GONE, again: true }));
  if (!response.ok) throw new ApiError(answer.error, answer.again);
  return answer;
}

const json = (value) => ({ body: toJson(value), headers: { "Content-Type": "application/json" } });

/** JSON with exact integers beyond 2^53, such as seeds. They are BigInts in JavaScript. */
export function toJson(value, indent) {
  const marked = JSON.stringify(value, (_, item) => (typeof item === "bigint" ? `\u0001${item}` : item), indent);
  return marked.replace(/"\\u0001(-?\d+)"/g, "$1");
}

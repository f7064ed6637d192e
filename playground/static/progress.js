// The progress of a run in words. `progress` is the worker's: stage, step, steps, percent, seconds_left and so on.

import { seconds } from "./dom.js";

const STAGES = {
  fetch: "Fetching",
  wait: "Waiting",
  load: "Loading",
  denoise: "Denoising",
  decode: "Decoding",
  encode: "Encoding",
  upload: "Uploading",
};
const OF_ONE_VIDEO = ["denoise", "decode", "encode"];
const DETAILS = {
  fetch: "LoRAs and images",
  wait: "until the GPU has finished another job",
  load: "the LoRAs into the model",
  decode: "the latents into frames",
  encode: "the frames into a file",
  upload: "the result",
};

/** After the last step the video is decoded. The worker reports that only when the first frames are decoded. */
export const stageOf = (progress) =>
  progress?.stage === "denoise" && progress.step === progress.steps ? "decode" : progress?.stage;

/** The worker's percentage is that of the denoising steps. Until the file is there, the job is not done. */
export const shownPercent = (progress) => Math.min(progress.percent, 99);

/** A running job's progress in one word: the percentage while it is denoised, or else the stage. */
export function inAWord(job) {
  if (job.trouble) return "No answer";
  if (job.status === "queued" || !job.progress) return "…";
  const stage = stageOf(job.progress);
  return stage === "denoise" ? `${shownPercent(job.progress)}%` : STAGES[stage] ?? stage;
}

/** A running job's progress for screen readers: it changes every 25 percent, not every step. */
export function spoken(job) {
  if (job.trouble) return `No answer for run ${job.number}`;
  if (job.status === "queued" || !job.progress) return `Run ${job.number} is waiting for a worker`;
  const stage = stageOf(job.progress);
  const quarter = Math.floor(job.progress.percent / 25) * 25;
  return `${STAGES[stage] ?? stage}${stage === "denoise" ? `, ${quarter} percent` : ""}`;
}

/** What is being done: "Step 3 of 20, video 2 of 4". */
export function doing(progress) {
  const stage = stageOf(progress);
  const parts = [stage === "denoise" ? `Step ${progress.step} of ${progress.steps}` : stage ? DETAILS[stage] ?? "" : "waiting for a worker"];
  if (progress?.prompts > 1 && OF_ONE_VIDEO.includes(stage)) parts.push(`video ${progress.prompt_index + 1} of ${progress.prompts}`);
  return parts.filter(Boolean).join(", ");
}

/** The name of the stage: "Denoising". */
export const stageName = (progress) => STAGES[stageOf(progress)] ?? stageOf(progress);

/** The time that the denoising still takes: "about 40 s left"; empty where it is not known. */
export function timeLeft(progress) {
  const known = stageOf(progress) === "denoise" && typeof progress.seconds_left === "number";
  return known ? `about ${seconds(progress.seconds_left)} left` : "";
}


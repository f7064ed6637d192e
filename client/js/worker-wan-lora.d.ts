// Written by `python -m docs.generate` from the worker's schema.

export interface Request {
  /** Model id; the one this worker serves. */
  model: string;
  /** One item without `transformer`; for Wan 2.2 14B one or two with `transformer` high or low. */
  loras: Array<Lora>;
  /** More LoRAs on top of `loras`, applied in their order. */
  extra_loras?: Array<ExtraLora>;
  /** A quick look: 4 steps without guidance, with a distilled LoRA on top; for `wan22_14b_i2v`, `wan22_14b_t2v`, `wan21_i2v_14b`, `wan21_i2v_14b480p`, `wan21_14b`. */
  draft?: boolean;
  /** Replaces `[trigger]` in every prompt. */
  trigger_word?: string | null;
  /** Bearer token for LoRAs on the Hugging Face Hub. */
  hf_token?: string | null;
  /** One video each. */
  prompts: Array<Prompt>;
  /** `documented` (default): as the model page says. `preview`: as the trainer made its samples for this LoRA. */
  match?: "documented" | "preview" | null;
  /** How the training ran, for `match` preview. Default: what the config.yaml beside a LoRA below LORA_DIR says. */
  trained_with?: TrainingSettings | null;
  /** `png` gives a zip of lossless frames. */
  output_format?: "mp4" | "webp" | "gif" | "png";
  /** Also a JPEG for each video with up to 16 of its frames. */
  contact_sheet?: boolean;
}

export interface ExtraLora {
  /** File below LORA_DIR (`job/name.safetensors`), or an http(s) URL; a Hugging Face `/blob/` URL is taken as `/resolve/`. */
  path: string;
  /** Side of a Wan 2.2 14B model that the LoRA is for; only these models take it. */
  transformer?: "high" | "low" | "both" | null;
  /** LoRA scale. */
  network_multiplier?: number;
}

export interface Lora {
  /** File below LORA_DIR (`job/name.safetensors`), or an http(s) URL; a Hugging Face `/blob/` URL is taken as `/resolve/`. */
  path: string;
  /** Side of a Wan 2.2 14B LoRA; only these models take it. */
  transformer?: "high" | "low" | null;
  /** LoRA scale. */
  network_multiplier?: number;
}

export interface Prompt {
  /** What to show; `[trigger]` is replaced by the trigger word. */
  prompt: string;
  /** Overrides the request's. */
  trigger_word?: string | null;
  /** Negative prompt. */
  neg?: string;
  /** Pixels; floored to a multiple of the model's. */
  width?: number;
  /** Pixels; floored to a multiple of the model's. */
  height?: number;
  /** Denoising steps. */
  sample_steps?: number;
  /** Above 1: classifier-free guidance. */
  guidance_scale?: number;
  /** Wan 2.2 14B: the guidance of the low-noise transformer. Default: `guidance_scale`. */
  guidance_scale_2?: number | null;
  /** Shift of the noise schedule; more of it gives more steps to high noise. Default: the scheduler's own. */
  shift?: number | null;
  /** -1: random, the drawn seed is in the result. Default: 42 plus the prompt's index. */
  seed?: number | null;
  /** How many videos of this prompt, with the seeds `seed`, `seed` + 1, … */
  num_videos?: number;
  /** Frames; rounded to 4n+1. 1 gives a PNG image. */
  num_frames?: number;
  /** Frames per second of the file. */
  fps?: number;
  /** Control image (first frame): http(s) URL, base64 or data URL. */
  ctrl_img?: string | null;
  /** The same as `ctrl_img`. */
  ctrl_img_1?: string | null;
  /** Last frame, where `ctrl_img` is the first; only for `wan22_14b_i2v`. */
  last_img?: string | null;
  /** How `ctrl_img` and `last_img` are brought to the video's size: `stretch` as the model page says, `crop` to the middle, `pad` with black. */
  image_fit?: "stretch" | "crop" | "pad";
  /** `unipc`: UniPC, the documented scheduler. `flowmatch`: FlowMatch Euler with the trainer's shift. Default: as `match` says. */
  sampler?: "unipc" | "flowmatch" | null;
}

export interface TrainingSettings {
  /** `model.quantize`. */
  quantize?: boolean | null;
  /** `model.quantize_te`. Default: as `quantize`. */
  quantize_te?: boolean | null;
  /** `model.qtype`: qfloat8, float8, int8, uint2, uint3, uint4, uint5, uint6, uint7, uint8; with an accuracy recovery adapter `uint4|ORG/REPO/FILE`, or a file below LORA_DIR or a URL after the bar. Default: qfloat8. */
  qtype?: string | null;
  /** `model.low_vram`. */
  low_vram?: boolean | null;
  /** `model.model_kwargs.vae_tiling`. */
  vae_tiling?: boolean | null;
  /** `train.dtype`. */
  dtype?: string | null;
  /** `save.dtype`. */
  save_dtype?: string | null;
  /** `mixed`: the training's samples have different network_multipliers, so the trainer did not merge. */
  multipliers?: "equal" | "mixed" | null;
}

export interface Job {
  input: Request;
}

export interface Status {
  id: string;
  status: JobStatus;
  /** While it runs, its progress; when it is done, the result. */
  output?: Progress | Result;
  /** `CODE: …`, with one of MODEL_NOT_FOUND, MODEL_NOT_SERVED, INVALID_INPUT, LORA_FILE_REQUIRED, SINGLE_LORA_ONLY, MOE_FORMAT_REQUIRED, MOE_FORMAT_NOT_SUPPORTED, SINGLE_MOE_CONFIG_ONLY, LORA_NOT_FOUND, LORA_DOWNLOAD_FAILED, LORA_INVALID, LORA_INCOMPATIBLE, CONTROL_IMAGE_REQUIRED, CONTROL_IMAGE_INVALID, AI_TOOLKIT_REQUIRED, CHECKPOINT_NOT_FOUND, STORAGE_NOT_CONFIGURED, UPLOAD_FAILED, OUT_OF_MEMORY, TIMEOUT, CANCELLED, INTERNAL. */
  error?: string;
}

export type JobStatus = "IN_QUEUE" | "IN_PROGRESS" | "COMPLETED" | "FAILED" | "CANCELLED" | "TIMED_OUT";

export interface Progress {
  stage: "fetch" | "wait" | "load" | "denoise" | "encode" | "upload";
  prompt_index: number;
  prompts: number;
  step: number;
  steps: number;
  /** Of the denoising. */
  percent: number;
  /** Until the denoising ends. */
  seconds_left: number | null;
}

export interface Result {
  model: string;
  outputs: { images: Array<Video>; videos: Array<Video> };
  warnings: Array<string>;
  /** All that decided the frames. */
  settings: Record<string, unknown>;
  /** Seconds by stage, `total`, and of a draft `full_run_estimate`. */
  timings: Record<string, number>;
  errors?: Array<{ prompt_index: number; code: string; message: string; video_index?: number }>;
}

export interface Video {
  prompt_index: number;
  url: string;
  expires_at: string | null;
  key: string;
  width: number;
  height: number;
  bytes: number;
  format: "mp4" | "webp" | "gif" | "png";
  num_frames: number;
  fps: number;
  seed: number;
  /** Among the videos of a prompt with several. */
  video_index?: number;
  poster?: Picture | null;
  contact_sheet?: Picture | null;
}

export interface Picture {
  url: string;
  expires_at: string | null;
  key: string;
  width: number;
  height: number;
  bytes: number;
}

export interface Health {
  workers: { running?: number; idle?: number; ready?: number; initializing?: number; throttled?: number; unhealthy?: number };
  jobs: Record<string, number>;
  /** The model that is served; a local API alone tells it. */
  model?: string;
}

export interface Update extends Partial<Progress> {
  status: JobStatus;
}

export interface Options {
  /** Seconds without an answer until the client gives up; 1800 at an endpoint, 60 at a local API. */
  patience?: number;
  /** Seconds between two looks at a job; 1. */
  pause?: number;
}

export interface Waiting {
  onProgress?: (update: Update) => void;
  /** Ends the waiting, not the job. */
  signal?: AbortSignal;
}

export class ClientError extends Error {
  /** One word: the code of the worker, or of this client, such as UNREACHABLE or SUBMISSION_UNKNOWN. */
  code: string;
  jobId?: string;
}

export class Client {
  static endpoint(id: string, key: string, options?: Options & { baseUrl?: string }): Client;
  static local(url?: string, options?: Options): Client;
  run(input: Request, options?: Waiting): Promise<Result>;
  submit(input: Request, options?: { signal?: AbortSignal }): Promise<string>;
  wait(jobId: string, options?: Waiting): Promise<Result>;
  status(jobId: string): Promise<Status>;
  cancel(jobId: string): Promise<JobStatus>;
  health(): Promise<Health>;
}

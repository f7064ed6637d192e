// A video that the page draws by hand. Pictures that are cut from one file stay in step even if the browser drops frames.

import { calm, h } from "./dom.js";

/** The button for a film that may be replaced by another one. */
export const playButton = (film) => h("button", { type: "button", class: "play", onclick: () => film()?.playOrPause() }, "Play");

export class Film {
  /**
   * `draw` receives the number of each frame that the video shows. `toggle`: its `playButton`. `frame`: where to begin. It
   * plays at once, unless `paused`.
   */
  constructor({ url, fps, frames }, draw, { toggle, frame = 0, paused = calm.matches }) {
    Object.assign(this, { fps, last: frames - 1, draw, frame, sought: paused });
    this.video = h("video", { src: url, loop: true, playsinline: true, preload: "auto" });
    this.video.muted = true;
    for (const event of ["play", "pause"]) {
      this.video.addEventListener(event, () => this.closed || (toggle.textContent = this.video.paused ? "Play" : "Pause"));
    }
    this.video.addEventListener("seeked", () => this.#show(this.frame));
    this.ready = new Promise((resolve, reject) => {
      this.video.addEventListener("loadeddata", resolve, { once: true });
      this.video.addEventListener("error", reject, { once: true });
    });
    this.ready.then(() => this.#begin(), () => {});
    this.#follow();
  }

  get paused() {
    return this.video.paused;
  }

  /** Show a frame and stay there. */
  seek(frame) {
    this.sought = true;
    this.video.pause();
    this.#go(frame);
  }

  playOrPause() {
    if (this.video.paused) this.video.play();
    else this.video.pause();
  }

  close() {
    this.closed = true;
    this.video.pause();
    this.video.removeAttribute("src");
  }

  #begin() {
    if (this.closed) return;
    if (this.sought) return this.seek(this.frame);
    if (this.frame) this.#go(this.frame);
    this.video.play();
  }

  #go(frame) {
    this.frame = Math.min(Math.max(frame, 0), this.last);
    this.video.currentTime = (this.frame + 0.5) / this.fps; // the middle of the frame
  }

  /** Draw every frame that the video shows. */
  #follow() {
    if (this.closed) return;
    this.video.requestVideoFrameCallback((_, { mediaTime }) => {
      if (!this.video.paused) this.#show(Math.round(mediaTime * this.fps));
      this.#follow();
    });
  }

  #show(frame) {
    if (this.closed) return;
    this.frame = Math.min(Math.max(frame, 0), this.last);
    this.draw(this.frame);
  }
}

// One question and its answer on the page: the growing text, what went wrong, and the measures below it.

import { render } from "./prose.js";

const STAGES = ["tokenize", "queue", "prefill", "decode"];
const ENDINGS = { length: "cut at max tokens", cancelled: "stopped" };
const ADVICE = { stream_lost: "The rest of this answer was lost and cannot be rebuilt." };

export class Answer {
  text = "";
  #root;
  #onPaint;
  #started = performance.now();
  #first = 0;
  #last = 0;
  #frames = 0;
  #painting = 0;

  constructor(question, { onPaint, onRetry }) {
    this.#root = document.querySelector("#turn-template").content.firstElementChild.cloneNode(true);
    this.#onPaint = onPaint;
    this.#find(".question").textContent = question;
    this.#find(".answer").classList.add("running");
    this.#find(".problem button").addEventListener("click", onRetry);
  }

  get element() {
    return this.#root;
  }

  push(text) {
    this.#last = performance.now();
    this.#first ||= this.#last;
    this.#frames += 1;
    this.text += text;
    // One paint per frame of the screen, however fast the tokens come.
    this.#painting ||= requestAnimationFrame(() => this.#paint());
  }

  finish({ finish_reasons = [], usage, timings }) {
    this.#settle();
    this.#figure("ending", ENDINGS[finish_reasons[0]] ?? "");
    if (usage) this.#measure(usage.completion_tokens, timings);
    if (timings) this.#showStages(timings);
  }

  fail({ code, message }) {
    this.#settle();
    const problem = this.#find(".problem");
    problem.hidden = false;
    problem.dataset.code = code;
    problem.firstElementChild.textContent = ADVICE[code] ?? message ?? code;
    this.#onPaint();
  }

  #find(selector) {
    return this.#root.querySelector(selector);
  }

  #paint() {
    this.#painting = 0;
    render(this.#find(".prose"), this.text);
    if (this.#first) this.#measure(this.#frames);
    this.#onPaint();
  }

  #settle() {
    cancelAnimationFrame(this.#painting);
    this.#paint();
    this.#find(".answer").classList.remove("running");
    this.#find(".prose").setAttribute("aria-busy", "false");
  }

  #measure(tokens, timings) {
    this.#find(".measures").hidden = false;
    this.#figure("tokens", tokens);
    if (!this.#first) return;
    this.#figure("ttft", Math.round(this.#first - this.#started));
    const seconds = (this.#last - this.#first || timings?.decode_ms || 0) / 1000;
    if (tokens > 1 && seconds) this.#figure("rate", round((tokens - 1) / seconds));
  }

  #figure(name, value) {
    this.#find(`[data-figure=${name}]`).textContent = value;
  }

  #showStages(timings) {
    const known = STAGES.filter((stage) => Number.isFinite(timings[`${stage}_ms`]));
    this.#find(".stages").hidden = !known.length;
    this.#find(".split").replaceChildren(...known.map((stage) => splitPart(stage, timings[`${stage}_ms`])));
    this.#find(".stages").append(...known.map((stage) => stageWords(stage, timings[`${stage}_ms`])));
    this.#onPaint();
  }
}

// A part of the bar is as wide as its stage was long.
function splitPart(stage, ms) {
  const part = document.createElement("i");
  part.dataset.stage = stage;
  part.style.flexGrow = ms;
  return part;
}

function stageWords(stage, ms) {
  const words = document.createElement("span");
  words.dataset.stage = stage;
  words.textContent = `${stage} ${round(ms)} ms`;
  return words;
}

function round(value) {
  return value < 10 ? value.toFixed(1) : Math.round(value).toString();
}

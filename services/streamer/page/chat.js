// The conversation: which turns there are, what the model is told of them, and the one answer that is running.

import { Answer } from "./answer.js";

// The reader who has scrolled up to read is left there; at the end, the page follows the text.
const FOLLOW_PX = 80;

export class Chat {
  #wire;
  #settings;
  #onBusy;
  #turns = [];
  #running = null;
  #log = document.querySelector("#log");
  #list = document.querySelector("#turns");

  constructor(wire, settings, onBusy) {
    this.#wire = wire;
    this.#settings = settings;
    this.#onBusy = onBusy;
  }

  get busy() {
    return this.#running !== null;
  }

  ask(question) {
    const turn = { question, answer: null };
    this.#turns.push(turn);
    this.#run(turn);
  }

  stop() {
    this.#running?.cancel();
  }

  clear() {
    const running = this.#running;
    this.#turns = [];
    this.#list.replaceChildren();
    this.#rest();
    running?.cancel();
  }

  #run(turn) {
    const messages = this.#messages(turn);
    const answer = new Answer(turn.question, {
      onPaint: () => this.#follow(),
      onRetry: () => this.#retry(turn),
    });
    turn.answer?.element.remove();
    turn.answer = answer;
    this.#list.append(answer.element);
    this.#log.scrollTop = this.#log.scrollHeight;
    this.#start({ messages, ...this.#settings.sampling() }, answer);
  }

  #start(body, answer) {
    const running = { cancel() {} };
    this.#running = running;
    this.#onBusy(true);
    running.cancel = this.#wire.generate(body, {
      token: (frame) => answer.push(frame.text),
      done: (frame) => this.#ended(running, () => answer.finish(frame)),
      error: (frame) => this.#ended(running, () => answer.fail(frame)),
    });
  }

  #ended(running, show) {
    show();
    if (this.#running === running) this.#rest();
  }

  #rest() {
    this.#running = null;
    this.#onBusy(false);
  }

  // A failed turn is asked again as the newest, so that the page and the model agree on the order.
  #retry(turn) {
    if (this.busy) return;
    this.#turns = [...this.#turns.filter((other) => other !== turn), turn];
    this.#run(turn);
  }

  // Turns that brought no text are left out: many chat templates refuse two questions in a row.
  #messages(turn) {
    const earlier = this.#turns.filter((other) => other !== turn && other.answer.text);
    return [
      ...this.#settings.system(),
      ...earlier.flatMap((other) => [said("user", other.question), said("assistant", other.answer.text)]),
      said("user", turn.question),
    ];
  }

  #follow() {
    const { scrollTop, scrollHeight, clientHeight } = this.#log;
    if (scrollHeight - scrollTop - clientHeight < FOLLOW_PX) this.#log.scrollTop = scrollHeight;
  }
}

function said(role, content) {
  return { role, content };
}

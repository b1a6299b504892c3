// The protocol client: one WebSocket, many requests, and no token lost or doubled when the socket drops.
//
// A request is remembered until its terminal event. Whenever a socket opens, every remembered request is attached
// to it: with `resume` after its last cursor once the server has accepted it, otherwise by sending it again, which
// is safe because nothing of it has been shown. Each attachment has its own id, and only the current socket is heard.

const BACKOFF_MS = { first: 200, most: 5000 };
const CONNECT_MS = 8000;
const SILENCE_MS = { first: 15000, most: 120000, afterCancel: 2000 };
// A server that always closes on a request must not be fed it for ever.
const MOST_SENDS = 4;

const CANCELLED = { finish_reasons: ["cancelled"] };
const NOBODY = { token() {}, done() {}, error() {} };

export class Wire {
  #url;
  #onState;
  #onNotice;
  #socket = null;
  #pending = new Map();
  #serial = 0;
  #failures = 0;
  #silence = SILENCE_MS.first;
  #watchdog = 0;
  #retry = 0;

  constructor(url, { onState, onNotice }) {
    this.#url = url;
    this.#onState = onState;
    this.#onNotice = onNotice;
    this.#connect();
  }

  // Starts a request; `listener` hears token(frame), then once done(frame) or error(frame). Returns its cancel.
  generate(body, listener) {
    const request = { id: "", body, listener, name: null, cursor: undefined, sends: 0, cancelled: false };
    this.#attach(request);
    return () => this.#cancel(request);
  }

  cancelAll() {
    for (const request of [...this.#pending.values()]) this.#cancel(request);
  }

  // Leaves the socket, whatever its state, and comes back on a new one.
  drop() {
    const socket = this.#socket;
    this.#socket = null;
    socket?.close();
    clearTimeout(this.#watchdog);
    clearTimeout(this.#retry);
    for (const request of [...this.#pending.values()]) if (request.cancelled) this.#stopUnconnected(request);
    this.#onState("reconnecting");
    this.#retry = setTimeout(() => this.#connect(), this.#backoff());
  }

  // Skips what is left of the backoff: the caller has news that the network is back.
  hurry() {
    if (this.#socket) return;
    clearTimeout(this.#retry);
    this.#connect();
  }

  get #open() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  #backoff() {
    const delay = Math.min(BACKOFF_MS.most, BACKOFF_MS.first * 2 ** this.#failures++);
    return delay * (0.5 + Math.random() / 2);
  }

  #connect() {
    const socket = new WebSocket(this.#url);
    const heard = (react) => (event) => {
      if (socket === this.#socket) react(event);
    };
    this.#socket = socket;
    socket.onopen = heard(() => this.#opened());
    socket.onmessage = heard((event) => this.#receive(JSON.parse(event.data)));
    socket.onclose = heard(() => this.drop());
    this.#watch(CONNECT_MS);
  }

  #opened() {
    clearTimeout(this.#watchdog);
    this.#onState("open");
    for (const request of [...this.#pending.values()]) this.#attach(request);
  }

  #attach(request) {
    this.#pending.delete(request.id);
    request.id = `r${++this.#serial}`;
    this.#pending.set(request.id, request);
    if (!this.#open) return;
    if (request.name) this.#resume(request);
    else this.#submit(request);
    this.#watch(this.#silence);
  }

  #submit(request) {
    if (request.sends++ < MOST_SENDS) return this.#send({ type: "generate", id: request.id, ...request.body });
    const message = "The server closed the connection each time this was sent.";
    this.#end(request, "error", { code: "not_accepted", message });
  }

  #resume(request) {
    this.#send({ type: "resume", id: request.id, request: request.name, cursor: request.cursor });
    if (request.cancelled) this.#send({ type: "cancel", id: request.id });
  }

  #cancel(request) {
    if (request.cancelled || !this.#pending.has(request.id)) return;
    request.cancelled = true;
    if (this.#open) {
      this.#send({ type: "cancel", id: request.id });
      this.#watch(SILENCE_MS.afterCancel);
    } else {
      this.#stopUnconnected(request);
    }
  }

  // The reader has their stop at once; the server hears of it when the next socket opens.
  #stopUnconnected(request) {
    request.listener.done(CANCELLED);
    request.listener = NOBODY;
    if (!request.name) this.#pending.delete(request.id);
  }

  #send(frame) {
    this.#socket.send(JSON.stringify(frame));
  }

  // A half-open socket never closes by itself: too long a silence means a new socket, which costs no token. The
  // patience doubles each time, since a long queue is silent too.
  #watch(ms) {
    clearTimeout(this.#watchdog);
    if (this.#open && !this.#pending.size) return;
    this.#watchdog = setTimeout(() => {
      this.#silence = Math.min(SILENCE_MS.most, this.#silence * 2);
      this.drop();
    }, ms);
  }

  #receive(frame) {
    this.#failures = 0;
    this.#silence = SILENCE_MS.first;
    const request = this.#pending.get(frame.id);
    if (request) this.#deliver(request, frame);
    else if (frame.type === "error" && frame.id == null) this.#onNotice(frame);
    this.#watch(request?.cancelled ? SILENCE_MS.afterCancel : this.#silence);
  }

  #deliver(request, frame) {
    if (frame.type === "accepted") {
      request.name = frame.request;
    } else if (frame.type === "token") {
      request.cursor = frame.cursor;
      request.listener.token(frame);
    } else if (frame.code === "superseded" && request.name && request.sends++ < MOST_SENDS) {
      this.#attach(request); // an earlier socket's resume came late, and took the stream from this one
    } else if (frame.type === "done" || frame.type === "error") {
      this.#end(request, frame.type, frame);
    }
  }

  #end(request, how, frame) {
    this.#pending.delete(request.id);
    if (request.cancelled && how === "error") request.listener.done(CANCELLED);
    else request.listener[how](frame);
  }
}

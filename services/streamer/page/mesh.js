// "The mesh at work": what /v1/mesh says, once a second while someone looks.

const EVERY_MS = 1000;
const PATIENCE_MS = 3000;
const SAMPLES = 60;
const STAGES = new Set(["streamer", "tokenizer", "engine"]);

const find = (selector) => document.querySelector(selector);

export class Mesh {
  #onModel;
  #timer = 0;
  #last = null;
  #rates = [];

  constructor(onModel) {
    this.#onModel = onModel;
    document.addEventListener("visibilitychange", () => this.#reschedule());
    this.#reschedule();
  }

  #reschedule() {
    clearTimeout(this.#timer);
    this.#last = null;
    if (!document.hidden) this.#poll();
  }

  async #poll() {
    const mesh = await ask();
    if (document.hidden) return;
    if (mesh) this.#show(mesh);
    else showState("out of reach", "bad");
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#poll(), EVERY_MS);
  }

  #show(mesh) {
    const processes = mesh.processes ?? [];
    showState(...stateOf(mesh, processes));
    showProcesses(processes);
    showQueues(mesh.queues ?? {});
    if (mesh.model) this.#onModel(mesh.model);
    this.#sample(mesh.counters?.output_tokens);
  }

  // Tokens per second from two readings of a counter that starts again when its process does.
  #sample(total) {
    if (!Number.isFinite(total)) return;
    const now = { total, at: performance.now() };
    if (this.#last) {
      const made = Math.max(0, total - this.#last.total);
      this.#rates = [...this.#rates, (made * 1000) / (now.at - this.#last.at)].slice(-SAMPLES);
      showRate(this.#rates);
    }
    this.#last = now;
  }
}

async function ask() {
  try {
    const response = await fetch("v1/mesh", { signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store" });
    return response.ok ? await response.json() : null;
  } catch {
    return null;
  }
}

function stateOf(mesh, processes) {
  const ready = processes.filter((process) => process.ready).length;
  const count = `${ready} of ${processes.length} processes ready`;
  return mesh.ready === false ? [`starting, ${count}`, "wait"] : [count, ready < processes.length ? "wait" : "good"];
}

function showState(text, mood) {
  const state = find("#mesh-state");
  state.textContent = text;
  find("#mesh").dataset.mood = mood;
}

function showProcesses(processes) {
  const order = new Intl.Collator("en", { numeric: true });
  const sorted = processes.toSorted((a, b) => order.compare(a.id, b.id));
  const extra = new Set(sorted.map((process) => process.stage).filter((stage) => !STAGES.has(stage)));
  find("#other-stages").replaceChildren(...[...extra].map(stageCard));
  for (const stage of [...STAGES, ...extra]) {
    const rows = sorted.filter((process) => process.stage === stage).map(processRow);
    find(`.stage[data-stage="${CSS.escape(stage)}"] ul`).replaceChildren(...rows);
  }
}

function stageCard(stage) {
  const card = find(".stage").cloneNode(true);
  card.dataset.stage = stage;
  card.querySelector("h3").textContent = stage;
  return card;
}

function processRow({ id, pid, host, ready, detail, gauges = {} }) {
  const row = find("#process-template").content.firstElementChild.cloneNode(true);
  row.dataset.ready = ready === true;
  row.title = [host, detail].filter(Boolean).join(" · ");
  row.querySelector(".lamp").ariaLabel = ready ? "ready" : "not ready";
  row.querySelector(".name").textContent = id;
  row.querySelector(".pid").textContent = pid === undefined ? "" : `pid ${pid}`;
  row.querySelector(".detail").textContent = ready ? load(gauges) : detail || "starting";
  showPages(row.querySelector(".kv"), gauges);
  return row;
}

function load(gauges) {
  return ["running", "waiting"]
    .filter((name) => Number.isFinite(gauges[name]))
    .map((name) => `${gauges[name]} ${name}`)
    .join(", ");
}

function showPages(bar, { blocks, free_blocks: free }) {
  if (!(blocks > 0) || !Number.isFinite(free)) return;
  const used = (100 * (blocks - free)) / blocks;
  bar.hidden = false;
  bar.title = `KV pages: ${blocks - free} of ${blocks} in use`;
  bar.firstElementChild.style.width = `${used}%`;
}

function showQueues(queues) {
  for (const depth of document.querySelectorAll("[data-queue]")) {
    const waiting = queues[depth.dataset.queue];
    depth.textContent = waiting ?? "–";
    depth.classList.toggle("waiting", waiting > 0);
  }
  const others = Object.entries(queues).filter(([name]) => !find(`[data-queue="${CSS.escape(name)}"]`));
  find("#other-queues").textContent = others.map(([name, depth]) => `${name} ${depth}`).join(", ");
}

function showRate(rates) {
  const now = rates.at(-1);
  const top = Math.max(1, ...rates);
  const left = SAMPLES - rates.length;
  const points = rates.map((rate, index) => `${left + index},${(19 - (18 * rate) / top).toFixed(2)}`);
  find("#rate").textContent = Math.round(now);
  find("#spark-line").setAttribute("points", points.join(" "));
  find("#spark-area").setAttribute("points", [`${left},20`, ...points, `${SAMPLES - 1},20`].join(" "));
  find("#race").classList.toggle("flowing", now > 0);
}

// Joins the parts of the page: composer, conversation, settings, mesh panel and the socket they share.

import { Chat } from "./chat.js";
import { Mesh } from "./mesh.js";
import { Settings } from "./settings.js";
import { Wire } from "./socket.js";

const find = (selector) => document.querySelector(selector);
const question = find("#question");
const status = find("#status");

const wire = new Wire(socketUrl(), { onState: showState, onNotice: ({ code, message }) => say(message ?? code) });
const settings = new Settings(find("#settings-open"));
const chat = new Chat(wire, settings, showBusy);
new Mesh(showModel);

function socketUrl() {
  const url = new URL("v1/ws", document.baseURI);
  url.protocol = url.protocol.replace("http", "ws");
  return url;
}

function say(text) {
  status.textContent = text;
}

function showState(state) {
  document.body.dataset.socket = state;
  say(state === "open" ? "" : "Reconnecting…");
}

function showModel(name) {
  find("#model").textContent = name;
}

function showBusy(busy) {
  document.body.classList.toggle("busy", busy);
  find("#send").hidden = busy;
  find("#stop").hidden = !busy;
}

function send() {
  const text = question.value.trim();
  if (!text || chat.busy || !settings.check()) return;
  if (document.body.dataset.socket === "open") say("");
  find("#welcome").hidden = true;
  question.value = "";
  chat.ask(text);
}

function newChat() {
  chat.clear();
  find("#welcome").hidden = false;
  question.focus();
}

function toggleMesh() {
  const shown = document.body.classList.toggle("mesh-shown");
  find("#mesh-toggle").setAttribute("aria-expanded", shown);
}

function composerKey(event) {
  // A key that confirms an input method's candidate is not a send.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
}

function pageKey(event) {
  if (event.key === "Escape" && !settings.open) chat.stop();
}

function bindComposer() {
  find("#composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  question.addEventListener("keydown", composerKey);
  find("#stop").addEventListener("click", () => {
    chat.stop();
    question.focus();
  });
  for (const starter of document.querySelectorAll(".starters button")) {
    starter.addEventListener("click", () => {
      question.value = starter.textContent;
      send();
      question.focus();
    });
  }
}

function bindPage() {
  document.addEventListener("keydown", pageKey);
  find("#new-chat").addEventListener("click", newChat);
  find("#mesh-toggle").addEventListener("click", toggleMesh);
  addEventListener("offline", () => wire.drop());
  addEventListener("online", () => wire.hurry());
  // Who leaves the page has cancelled; said aloud, the engine need not wait for the resume window to end.
  addEventListener("pagehide", () => wire.cancelAll());
  // For tests and the curious: dispatchEvent(new Event("headrace:drop")) loses the socket.
  addEventListener("headrace:drop", () => wire.drop());
}

bindComposer();
bindPage();
if (matchMedia("(min-width: 68rem)").matches) toggleMesh();

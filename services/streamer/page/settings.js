// The settings drawer: system prompt and sampling, kept in this browser between visits.

const STORE = "headrace.settings";

export class Settings {
  #dialog = document.querySelector("#settings");
  #form = document.querySelector("#settings-form");

  constructor(opener) {
    this.#restore();
    opener.addEventListener("click", () => this.#dialog.showModal());
    this.#dialog.addEventListener("click", (event) => this.#clickedOutside(event));
    this.#dialog.addEventListener("close", () => this.#keep());
  }

  get open() {
    return this.#dialog.open;
  }

  // Whether the values can be sent; if not, shows the drawer with the browser's own word on the first bad one.
  check() {
    if (this.#form.checkValidity()) return true;
    this.#dialog.showModal();
    this.#form.reportValidity();
    return false;
  }

  // The fields of the request body; an empty one is left to the server's default.
  sampling() {
    const filled = this.#numbers().filter((input) => input.value !== "");
    return Object.fromEntries(filled.map((input) => [input.name, input.valueAsNumber]));
  }

  system() {
    const content = this.#form.elements.system.value.trim();
    return content ? [{ role: "system", content }] : [];
  }

  #numbers() {
    return [...this.#form.querySelectorAll("input[type=number]")];
  }

  #clickedOutside(event) {
    if (event.target === this.#dialog) this.#dialog.close();
  }

  #keep() {
    const values = JSON.stringify(Object.fromEntries(new FormData(this.#form)));
    stored((storage) => storage.setItem(STORE, values));
  }

  #restore() {
    const kept = JSON.parse(stored((storage) => storage.getItem(STORE)) ?? "{}");
    for (const [name, value] of Object.entries(kept)) {
      const input = this.#form.elements.namedItem(name);
      if (input) input.value = value;
    }
  }
}

// A browser that refuses storage still chats; it only forgets.
function stored(use) {
  try {
    return use(localStorage);
  } catch {
    return null;
  }
}

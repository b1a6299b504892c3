"""The chat page in a real browser, against the real mesh."""

import json
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Protocol
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

PATIENCE_S = 60.0
FLAGS = (
    "--headless=new --no-sandbox --disable-dev-shm-usage --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --window-size=1280,900 "
    "--force-prefers-reduced-motion"  # endless animations would take a core from the mesh
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs a browser: chromium and chromedriver are not on PATH"
)

HOSTILE = '<img src=x onerror="hacked=1"> <b>b</b> **<i>i</i>**\n\n```html\n<script>hacked=1</script>\n```\n\n`<u>`\n'


class Mesh(Protocol):
    url: str


def wait_for(what: str, check: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s for {what}"
        time.sleep(0.05)


class Page:
    """What a reader can see and do."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url
        driver.get(url)
        driver.execute_script("localStorage.clear()")
        driver.get_log("performance")
        driver.get_log("browser")
        driver.get(url)
        wait_for("the socket", lambda: self.find("body").get_attribute("data-socket") == "open")

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
        return list(self.driver.execute_script(script, selector))

    def set(self, **values: object) -> None:
        self.find("#settings-open").click()
        for name, value in values.items():
            field = self.find(f"#settings-form [name={name}]")
            field.clear()
            field.send_keys(str(value))
        self.find("#settings-form button[type=submit]").click()

    def ask(self, question: str) -> None:
        self.find("#question").send_keys(question, Keys.ENTER)

    def answers(self) -> list[str]:
        return self.texts(".prose")

    def wait_text(self, letters: int) -> None:
        wait_for(f"{letters} letters", lambda: len(self.answers()[-1]) >= letters)

    def wait_end(self) -> None:
        wait_for("the answer's end", lambda: not self.all(".running"))

    def figure(self, name: str) -> str:
        return self.texts(f"[data-figure={name}]")[-1]

    def network(self, method: str) -> list[dict[str, Any]]:
        """The browser's own record of what it sent, since the last look."""
        records = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [record["params"] for record in records if record["method"] == method]

    def sent(self, kind: str) -> list[dict[str, Any]]:
        frames = [json.loads(it["response"]["payloadData"]) for it in self.network("Network.webSocketFrameSent")]
        return [frame for frame in frames if frame["type"] == kind]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: webdriver.Chrome, mesh: Mesh) -> Page:
    return Page(driver, mesh.url)


def api_answer(mesh: Mesh, max_tokens: int, *contents: str) -> str:
    """What the HTTP API answers to the same conversation, greedily."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    body = {"messages": messages, "temperature": 0, "max_tokens": max_tokens}
    request = urllib.request.Request(
        f"{mesh.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def test_loads_quietly_and_from_one_origin(page: Page) -> None:
    wait_for("the model's name", lambda: page.find("#model").text)
    urls = [urlsplit(params["request"]["url"]) for params in page.network("Network.requestWillBeSent")]
    assert {url.netloc for url in urls if url.scheme != "data"} == {urlsplit(page.url).netloc}
    assert page.driver.get_log("browser") == []


def test_answer_streams_in_and_is_measured(page: Page, mesh: Mesh) -> None:
    question = "Explain how a water wheel works."
    page.set(temperature=0, max_tokens=24)
    page.driver.execute_script(
        "window.steps = []; new MutationObserver(() => steps.push(document.querySelector('.prose')?.textContent ?? ''))"
        ".observe(document.querySelector('#turns'), { subtree: true, childList: true, characterData: true })"
    )
    page.ask(question)
    page.wait_end()
    steps = list(dict.fromkeys(page.driver.execute_script("return steps")))
    assert len(steps) > 4
    assert all(later.startswith(earlier) for earlier, later in pairwise(steps))
    assert page.answers() == [api_answer(mesh, 24, question)]
    assert float(page.figure("ttft")) > 0
    assert float(page.figure("rate")) > 0
    assert 0 < int(page.figure("tokens")) <= 24
    assert {"prefill", "decode"} <= {it.get_attribute("data-stage") for it in page.all(".stages > [data-stage]")}


def test_panel_shows_the_mesh(page: Page) -> None:
    for stage in ("tokenizer", "engine", "streamer"):
        rows = f"#mesh .stage[data-stage={stage}] li[data-ready=true]"
        wait_for(f"a ready {stage}", lambda rows=rows: page.all(rows))
        assert "pid" in page.find(rows).text
    for queue in ("submit", "work"):
        assert page.find(f"[data-queue={queue}]").text.isdecimal()
    wait_for("a rate", lambda: page.find("#rate").text.isdecimal())


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_a_long_answer_early(page: Page, how: str) -> None:
    page.set(temperature=0, max_tokens=1000)
    page.ask("Write a long history of Rome, from its founding to its fall.")
    page.wait_text(40)
    if how == "button":
        page.find("#stop").click()
    else:
        page.find("#question").send_keys(Keys.ESCAPE)
    page.wait_end()
    assert page.figure("ending") == "stopped"
    assert int(page.figure("tokens")) < 300
    assert page.find("#send").is_displayed()


def test_second_question_keeps_the_context(page: Page, mesh: Mesh) -> None:
    page.set(temperature=0, max_tokens=12)
    page.ask("My name is Ada.\nRemember it.".replace("\n", Keys.SHIFT + Keys.ENTER + Keys.NULL))
    page.wait_end()
    page.ask("What is my name?")
    page.wait_end()
    first, second = page.answers()
    talk = ["My name is Ada.\nRemember it.", first, "What is my name?"]
    assert [message["content"] for message in page.sent("generate")[-1]["messages"]] == talk
    assert second == api_answer(mesh, 12, *talk)
    page.find("#new-chat").click()
    assert page.answers() == []


def test_dropped_socket_loses_and_doubles_nothing(page: Page, mesh: Mesh) -> None:
    question = "Explain how a water wheel works, step by step."
    page.set(temperature=0, max_tokens=48)
    page.ask(question)
    for letters in (20, 90):
        page.wait_text(letters)
        drop = "dispatchEvent(new Event('headrace:drop')); return document.querySelector('#status').textContent"
        assert page.driver.execute_script(drop) == "Reconnecting…"
    page.wait_end()
    assert page.answers() == [api_answer(mesh, 48, question)]
    assert page.find("#status").text == ""
    first, second = page.sent("resume")
    assert first["request"] == second["request"] and first["cursor"] != second["cursor"]
    assert page.texts(".problem:not([hidden])") == []


def test_html_from_the_model_is_text(page: Page, mesh: Mesh) -> None:
    question = "Write a minimal HTML page with one <b>bold</b> word."
    page.set(temperature=0, max_tokens=24)
    page.ask(question)
    page.wait_end()
    assert page.texts(".question") == [question]
    assert page.answers() == [api_answer(mesh, 24, question)]
    render = """
        const [text, done] = arguments;
        import("/page/prose.js").then(({ render }) => {
          const box = document.querySelector(".prose");
          for (let end = 1; end <= text.length; end++) render(box, text.slice(0, end));
          done([box.textContent, [...box.querySelectorAll("*")].map((node) => node.localName), window.hacked]);
        });
    """
    shown, elements, hacked = page.driver.execute_async_script(render, HOSTILE)
    assert shown == HOSTILE
    assert set(elements) <= {"p", "pre", "code", "strong", "span"}
    assert hacked is None


def test_refusal_is_shown_plainly_and_can_be_retried(page: Page) -> None:
    page.set(temperature=0, max_tokens=10**12)
    page.ask("Say hello.")
    wait_for("the refusal", lambda: page.all(".problem:not([hidden])"))
    assert page.find(".problem span").text
    page.set(max_tokens=8)
    page.find(".problem button").click()
    page.wait_end()
    assert page.answers()[-1] and not page.all(".problem:not([hidden])")


def test_fits_a_phone(page: Page) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        page.driver.refresh()
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 390
        assert not page.find("#mesh").is_displayed()
        page.find("#mesh-toggle").click()
        wait_for("the panel", page.find("#mesh").is_displayed)
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

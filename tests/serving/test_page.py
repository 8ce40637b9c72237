"""The chat page in a real browser: documents are dropped in, asked about, quoted and compared, and errors are shown."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from queue import Queue
from signal import SIGTERM
from threading import Thread

import pytest
from passes import PATIENCE
from served import KEYS
from tiny import SENTENCES, save_tiny

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("nicegui")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)"),
    pytest.mark.enable_socket,
    pytest.mark.browser,
]

QUESTION = "When was the bridge closed?"
HOSTILE = (
    "<img src=x onerror=document.title='stolen'><script>document.title='stolen'</script> The bridge is <b>bold</b>."
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


class Server:
    """`extemb serve` in a process, whose stderr is read all the time: a full pipe would stop it."""

    def __init__(self, model, data, keys=""):
        command = [sys.executable, "-c", "from extemb_core.cli.main import main; main()", "serve", "--port", "0",
                   "--llm", model / "llm", "--embedder", "untrained", "--data", data, "--max-new-tokens", "8",
                   "--max-body-mib", "1"]  # fmt: skip
        env = os.environ | {"EXTEMB_API_KEYS": keys}
        self._process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=env)
        self._lines, self._url = [], Queue()
        self._reader = Thread(target=self._read)
        self._reader.start()
        self.url = self._url.get(timeout=PATIENCE)
        assert self.url, self._lines

    def _read(self):
        for line in self._process.stderr:
            self._lines.append(line)
            if found := re.search(r"listening at (http://[0-9.:]+)", line):
                self._url.put(found[1])
        self._url.put(None)

    def stop(self):
        self._process.terminate()
        assert self._process.wait(PATIENCE) in (0, -SIGTERM)
        self._reader.join()
        self._process.stderr.close()
        assert not [line for line in self._lines if "Traceback" in line or '"level": "error"' in line]


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    """The address of a server for all tests; each leaves documents of other names."""
    server = Server(model, tmp_path_factory.mktemp("open"))
    yield server.url
    server.stop()


@pytest.fixture
def opened(browser):
    """Open pages, in which nothing may fail."""
    failed, pages = [], []

    def visit(url, **settings):
        page = browser.new_page(**settings)
        page.set_default_timeout(PATIENCE * 1000)
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(url)
        page.get_by_label("Question").wait_for()
        pages.append(page)
        return page

    yield visit
    for page in pages:
        page.close()
    assert not failed


def drop(page, name, text):
    page.set_input_files("input[type=file]", {"name": name, "mimeType": "text/plain", "buffer": text.encode()})
    page.get_by_text(re.compile(r"[0-9,]+ tokens")).first.wait_for()


def ask(page, question, n_answers=1):
    page.get_by_label("Question").fill(question)
    page.keyboard.press("Enter")
    page.get_by_text("first token after").nth(n_answers - 1).wait_for()


def test_a_document_is_dropped_in_asked_about_and_quoted(url, opened):
    page = opened(url)
    drop(page, "ships.txt", SENTENCES * 4)
    ask(page, QUESTION)
    page.get_by_text(re.compile("[0-9,]+ tokens → [0-9,]+ positions")).wait_for()
    quote = page.locator(".quote").first
    assert "the bridge was closed for repairs" in quote.inner_text()
    quote.click()
    page.locator("#passage", has_text="the bridge was closed for repairs").first.wait_for()
    page.get_by_label("Close", exact=True).click()
    page.get_by_label("Remove ships.txt").click()
    page.get_by_label("Remove ships.txt").wait_for(state="detached")


def test_three_ways_of_reading_are_compared(url, opened):
    page = opened(url)
    drop(page, "many-ships.txt", f"The bridge was closed in 1987. {SENTENCES * 12}")
    page.get_by_text("Compare with truncated and full text").click()
    ask(page, QUESTION, n_answers=3)
    for number, way in enumerate(("Compressed", "Truncated", "Full text")):
        column = page.locator(".way").nth(number)
        column.get_by_text(way, exact=True).wait_for()
        expected = column.get_by_text("Left out: many-ships.txt") if way == "Full text" else column.locator(".quote")
        expected.first.wait_for()  # the full text is more than the window holds
    page.get_by_text("New conversation").click()
    page.locator(".way").first.wait_for(state="detached")


def test_markup_in_documents_and_questions_is_text(url, opened):
    page = opened(url)
    drop(page, "<b>x</b>.txt", HOSTILE)
    ask(page, f"{HOSTILE} Is it bold?")
    page.locator(".quote").first.click()
    page.locator("#passage").first.wait_for()
    assert page.get_by_text("onerror=").count() >= 2
    assert page.title() == "extemb"
    assert not page.locator("img[src=x]").count()


def test_what_cannot_be_read_is_said(url, opened):
    page = opened(url)
    page.set_input_files("input[type=file]", {"name": "a.pdf", "mimeType": "application/pdf", "buffer": b"%PDF-1.7 no"})
    said = page.get_by_role("alert").first.inner_text()
    assert "\na.pdf is a damaged PDF" in said
    assert tempfile.gettempdir() not in said


def test_documents_of_a_key_are_behind_it(model, tmp_path, opened):
    server = Server(model, tmp_path, ",".join(KEYS))
    page = opened(server.url)
    page.set_input_files("input[type=file]", {"name": "early.txt", "mimeType": "text/plain", "buffer": b"Early."})
    for key in ("wrong-key-0123456789", KEYS[0]):
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        if key not in KEYS:
            page.get_by_text("the API key is missing or wrong").wait_for()
    page.get_by_text("None yet").wait_for()
    drop(page, "ships.txt", SENTENCES)
    for key, there in zip(KEYS, ("Remove ships.txt", "None yet"), strict=True):
        page = opened(server.url)
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        (page.get_by_label(there) if key == KEYS[0] else page.get_by_text(there)).wait_for()
    server.stop()


def test_a_narrow_screen_shows_the_conversation_first(url, opened):
    page = opened(url, viewport={"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_label("Show or hide the documents").click()
    page.get_by_text("Positions for documents").wait_for()

"""The chat page in a real browser: documents are dropped in, asked about, quoted and compared, and errors are shown."""

from __future__ import annotations

import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM

import pytest
from passes import PATIENCE
from pdfs import write_pdf
from served import KEYS, serve
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


@contextmanager
def running(model, data, keys=""):
    """`extemb serve` in a process; yields the address of its page."""
    options = ["--port", "0", "--llm", model / "llm", "--embedder", "untrained", "--data", data]
    process, api = serve("--max-new-tokens", "8", "--max-body-mib", "1", *options, env={"EXTEMB_API_KEYS": keys})
    yield api.removesuffix("/v1")
    process.send_signal(SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == -SIGTERM
    assert not [line for line in said.splitlines() if "Traceback" in line or '"level": "error"' in line]


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    """The address of a server for all tests; each leaves documents of other names."""
    with running(model, tmp_path_factory.mktemp("open")) as address:
        yield address


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
        page.wait_for_function("window.did_handshake")  # what is done before may come in another order
        pages.append(page)
        return page

    yield visit
    for page in pages:
        page.close()
    assert not failed


def drop(page, name, text):
    page.set_input_files("input[type=file]", {"name": name, "mimeType": "text/plain", "buffer": text.encode()})
    page.get_by_label(f"Remove {Path(name).name}", exact=True).wait_for()  # other tests have left documents


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


@pytest.mark.parametrize("times", [1, 600])
def test_a_quote_of_a_pdf_names_its_page(model, tmp_path, opened, times):
    """Of a document that is read whole, and of one that is so long that passages of it are."""
    pages = ["Copper wires ran from the cellar to the roof. " * times, "", "The bridge was closed in 1987."]
    file = write_pdf(tmp_path / "report.pdf", pages)
    with running(model, tmp_path / "data") as url:
        page = opened(url)
        page.set_input_files("input[type=file]", file)
        page.get_by_label("Remove report.pdf").wait_for()
        if times > 1:
            page.get_by_role("slider").press("Home")  # the least positions
        ask(page, QUESTION)
        quote = page.locator(".q-item", has=page.locator(".quote", has_text="closed in 1987"))
        assert re.search(r"report\.pdf(:\d+-\d+)?, page 3$", quote.inner_text())
        assert (":" in quote.inner_text()) == (times > 1)


def test_each_of_two_documents_of_the_same_text_is_quoted_as_itself(url, opened):
    page = opened(url)
    for name in ("first.txt", "second.txt"):
        drop(page, name, "The observatory was opened in 1911. " * 3)
    ask(page, "When was the observatory opened?")
    cited = page.locator(".q-item", has=page.locator(".quote", has_text="observatory")).all_inner_texts()
    assert {text.splitlines()[-1].split(":")[0] for text in cited} == {"first.txt", "second.txt"}


def test_every_button_says_what_it_does(url, opened):
    page = opened(url)
    drop(page, "named.txt", SENTENCES)
    with page.expect_file_chooser() as choosing:
        page.get_by_label("Add documents").click()
    assert choosing.value.is_multiple()
    unnamed = "e => !e.ariaLabel && !e.querySelector('.q-btn__content span')?.innerText"
    assert not page.locator(".q-btn").evaluate_all(f"all => all.filter({unnamed}).map(e => e.outerHTML)")


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
    page.locator(".question", has_text="onerror=").first.wait_for()
    page.locator(".q-item", has_text="b>.txt").locator(".quote").first.click()
    page.locator(".q-dialog", has_text="onerror=").first.wait_for()
    assert page.title() == "extemb"
    assert not page.locator("img[src=x]").count()


def test_what_cannot_be_read_is_said(url, opened):
    page = opened(url)
    page.set_input_files("input[type=file]", {"name": "a.pdf", "mimeType": "application/pdf", "buffer": b"%PDF-1.7 no"})
    said = page.get_by_role("alert").first.inner_text()
    assert "\na.pdf is a damaged PDF" in said
    assert tempfile.gettempdir() not in said


def test_a_file_without_text_is_not_added(url, opened):
    page = opened(url)
    page.set_input_files("input[type=file]", {"name": "empty.txt", "mimeType": "text/plain", "buffer": b" "})
    page.get_by_text("empty.txt holds no text to ask about").wait_for()
    assert not page.get_by_label("Remove empty.txt").count()


def text_file(name, text="The bridge was closed."):
    return {"name": name, "mimeType": "text/plain", "buffer": text.encode()}


def test_a_file_that_is_still_being_sent_stays_when_another_has_come(url, opened):
    page, held = opened(url), []

    def hold(route):
        if b"slow.txt" in route.request.post_data_buffer:
            held.append(route)
        else:
            route.continue_()

    page.route("**/upload/*", hold)
    page.set_input_files("input[type=file]", [text_file("quick.txt"), text_file("slow.txt", "It was opened.")])
    page.get_by_label("Remove quick.txt").wait_for()
    page.locator(".q-uploader__file", has_text="quick.txt").wait_for(state="detached")
    held[0].continue_()
    page.get_by_label("Remove slow.txt").wait_for()


@pytest.mark.parametrize(
    ("status", "said"),
    [(408, "Not there within 30 s: lost.txt; send less at once"), (500, "Could not be sent: lost.txt; try again")],
)
def test_a_file_that_did_not_come_is_named(url, opened, status, said):
    page = opened(url)
    page.route("**/upload/*", lambda route: route.fulfill(status=status))
    page.set_input_files("input[type=file]", text_file("lost.txt"))
    page.get_by_text(said).wait_for()
    page.locator(".q-uploader__file").wait_for(state="detached")


def test_files_that_are_refused_are_named_with_the_rule(url, opened):
    page = opened(url)
    large, odd = text_file("large.txt", "much " * 2**18), [text_file("a.docx"), text_file("b.docx")]
    page.set_input_files("input[type=file]", [large, *odd, text_file("right.txt")])
    page.get_by_text("Larger than 1 MiB: large.txt; send them in parts").wait_for()
    page.get_by_text("Of a type that is not read: a.docx, b.docx; convert to text").wait_for()
    page.get_by_label("Remove right.txt").wait_for()


def test_another_text_of_a_name_gets_a_name_of_its_own(url, opened):
    page = opened(url)
    drop(page, "report.txt", "The chairman is Ann.")
    drop(page, "report.txt", "The chairman is Ann.")
    assert not page.get_by_label("Remove report (2).txt").count()
    for number, text in ((2, "The budget is small."), (3, "The year was long.")):
        page.set_input_files("input[type=file]", text_file("report.txt", text))
        page.get_by_label(f"Remove report ({number}).txt").wait_for()


def test_a_name_that_is_too_long_for_a_disk_is_taken(url, opened):
    name = "報告" * 60 + ".txt"
    drop(opened(url), name, "The bridge was closed.")


def test_what_another_tab_has_changed_is_known_to_the_next_question(model, tmp_path, opened):
    with running(model, tmp_path) as url:
        one, other = opened(url), opened(url)
        drop(one, "old.txt", SENTENCES)
        other.reload()
        other.get_by_label("Remove old.txt").click()
        other.get_by_text("None yet").wait_for()
        one.get_by_label("Question").fill(QUESTION)
        one.keyboard.press("Enter")
        one.get_by_text("there is no document 'old.txt'").wait_for()
        one.get_by_text("None yet").wait_for()
        drop(one, "new.txt", SENTENCES)
        ask(one, QUESTION)


def test_a_question_without_a_document_stays_where_it_is(model, tmp_path, opened):
    with running(model, tmp_path) as url:
        page = opened(url)
        page.get_by_text("Drop in documents").wait_for()
        page.get_by_label("Question").fill(QUESTION)
        page.keyboard.press("Enter")
        page.get_by_text("Add a document first").wait_for()
        assert page.get_by_label("Question").input_value() == QUESTION
        drop(page, "ships.txt", SENTENCES)
        ask(page, QUESTION)
        assert not page.get_by_text("Drop in documents").is_visible()


def test_a_document_that_is_still_being_read_is_said_to_be(model, tmp_path, opened):
    long = {"name": "long.txt", "mimeType": "text/plain", "buffer": (SENTENCES * 4000)[:900_000].encode()}
    with running(model, tmp_path) as url:
        page = opened(url)
        page.set_input_files("input[type=file]", long)
        page.get_by_text("being read").wait_for()
        page.get_by_label("Question").fill(QUESTION)
        page.keyboard.press("Enter")
        page.get_by_text("Ask when it has been read: long.txt").wait_for()
        page.get_by_label("Remove long.txt").wait_for()
        assert not page.get_by_text("being read").count()
        drop(page, "ships.txt", SENTENCES)
        page.set_input_files("input[type=file]", long | {"name": "longer.txt"})
        page.get_by_text("being read").wait_for()
        ask(page, QUESTION)
        page.get_by_text("Not asked about, still being read: longer.txt").wait_for()
        page.get_by_label("Remove longer.txt").wait_for()
        ask(page, QUESTION, 2)
        assert page.get_by_text("Not asked about").count() == 1


def test_a_long_question_leaves_its_button_in_sight(url, opened):
    page = opened(url)
    page.get_by_label("Question").fill("Why? " * 4000)
    box = page.get_by_label("Ask", exact=True).bounding_box()
    assert box["y"] > 0
    assert page.get_by_label("Question").bounding_box()["height"] < 0.5 * page.viewport_size["height"]


def test_documents_of_a_key_are_behind_it(model, tmp_path, opened):
    with running(model, tmp_path, ",".join(KEYS)) as url:
        page = opened(url)
        page.set_input_files("input[type=file]", {"name": "early.txt", "mimeType": "text/plain", "buffer": b"Early."})
        for key in ("wrong-key-0123456789", KEYS[0]):
            page.get_by_label("API key").fill(key)
            page.keyboard.press("Enter")
            if key not in KEYS:
                page.get_by_text("the API key is missing or wrong").wait_for()
        page.get_by_text("None yet").wait_for()
        drop(page, "ships.txt", SENTENCES)
        for key, there in zip(KEYS, ("Remove ships.txt", "None yet"), strict=True):
            page = opened(url)
            page.get_by_label("API key").fill(key)
            page.keyboard.press("Enter")
            (page.get_by_label(there) if key == KEYS[0] else page.get_by_text(there)).wait_for()


def test_a_narrow_screen_shows_the_conversation_first(url, opened):
    page = opened(url, viewport={"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_label("Show or hide the documents").click()
    page.get_by_text("Positions for documents").wait_for()


def test_a_wide_screen_shows_the_documents_until_they_are_hidden(url, opened):
    page = opened(url)
    panel = page.get_by_text("Positions for documents")
    for state in ("visible", "hidden", "visible"):
        panel.wait_for(state=state)
        page.get_by_label("Show or hide the documents").click()


@pytest.mark.parametrize("system", ["dark", "light"])
def test_each_click_changes_between_dark_and_light(url, opened, system):
    page = opened(url, color_scheme=system)
    for dark in (system == "dark", system != "dark", system == "dark"):
        page.locator("body.body--dark" if dark else "body.body--light").wait_for()
        page.get_by_label("Dark or light").click()


def test_a_click_before_the_page_is_connected_counts(url, browser):
    page, sockets = browser.new_page(), []
    page.set_default_timeout(PATIENCE * 1000)
    page.route_web_socket("**/socket.io/**", lambda one: sockets.append(one))
    page.goto(url)
    panel = page.get_by_text("Positions for documents")
    panel.wait_for()
    page.get_by_label("Show or hide the documents").click()
    assert panel.is_visible()
    for one in sockets:
        one.connect_to_server()
    panel.wait_for(state="hidden")
    page.close()

"""How an answer shows what became of its documents."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser

import pytest

from extemb_core.answers import Answer, ContextEntry, ContextSpan
from extemb_core.documents import Document
from extemb_core.errors import ConfigError

TEXT = "Rivers <script>alert('x & y')</script> carry\n  sand \x1b[2Jto the\u202e sea. \"}{0}\" Then it rains."
SPANS = (
    ContextSpan(0, 12, "raw", 5),
    ContextSpan(12, 40, 8, 2),
    ContextSpan(40, 60, 16, 1),
    ContextSpan(60, len(TEXT), "dropped", 0),
)


def entry(text=TEXT, fidelity="mixed", spans=SPANS, source="<i>a</i>"):
    ref = Document(text).ref
    return ContextEntry(
        source=source, ref=ref, n_tokens=40, positions=8, fidelity=fidelity, cached=False, reason="", spans=spans
    )


class Page(HTMLParser):
    """Collects the tags of a page, and its text by the tag that it stands in."""

    def __init__(self, page):
        super().__init__()
        self.open, self.texts = [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1], data))


def body(page):
    return Page(page[page.index('<div dir="auto"') : -len("</div>")]).texts


def test_a_document_is_shown_with_its_spans_marked_and_nothing_of_it_is_markup():
    page = entry().highlight(Document(TEXT))
    shown = body(page)
    assert [tag for tag, _ in shown] == ["mark", "u", "sub", "u", "sub", "s"]
    assert [text for tag, text in shown if tag == "sub"] == ["8", "16"]
    assert "".join(text for tag, text in shown if tag != "sub") == TEXT.replace("\x1b", "").replace("\u202e", "")
    assert "<script" not in page
    assert "&lt;i&gt;a&lt;/i&gt;</b>: 40 tokens in 8 positions" in page
    legend = [(tag, text) for tag, text in Page(page).texts if text in ("raw", "compressed", "ratio", "dropped")]
    assert legend == [("mark", "raw"), ("u", "compressed"), ("sub", "ratio"), ("s", "dropped")]


@pytest.mark.parametrize(("fidelity", "tags"), [("raw", ["mark"]), (4, ["u", "sub"]), ("dropped", ["s"])])
def test_a_document_of_one_fidelity_is_one_span(fidelity, tags):
    shown = body(entry("One & two.", fidelity, ()).highlight("One & two."))
    assert [tag for tag, _ in shown] == tags
    assert shown[0][1] == "One & two."


def test_another_document_is_refused():
    with pytest.raises(ConfigError, match="is not the text of '<i>a</i>'; pass that document"):
        entry().highlight("Something else.")


def test_a_table_says_the_spans_in_words():
    context = (entry(), entry("x", 8, (), source="b"))
    answer = Answer(
        text="<b>Yes</b>", context=context, seconds={}, prompt_positions=9, new_tokens=1, finish_reason="stop"
    )
    cells = re.findall("<td>(.*?)</td>", answer._repr_html_())
    assert unescape(cells[3]) == "mixed, of 4 spans: 1 raw, 1 at ratio 8, 1 at ratio 16, 1 dropped"
    assert (cells[0], cells[8]) == ("&lt;i&gt;a&lt;/i&gt;", "8")
    assert "&lt;b&gt;Yes" in answer._repr_html_()

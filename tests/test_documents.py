"""Document: one ref per text, and the shapes that frameworks hand over."""

from __future__ import annotations

import fileinput
import hashlib
import io
import pickle
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extemb_core.documents import TEXT_KEYS, Document, as_documents
from extemb_core.errors import DocumentError

CLERK = "The clerk copied the encyclopaedia."


class Node:
    """As a LlamaIndex node: the text comes from a method."""

    metadata = {"file_name": "clerk.txt", "title": "Clerk"}  # noqa: RUF012

    def get_content(self) -> str:
        return CLERK


@given(st.text())
def test_ref_is_the_hash_of_the_text_alone(text: str) -> None:
    document = Document(text, title="A", metadata={"source": "b"})
    assert document.ref == Document(text).ref == "ext:" + hashlib.sha256(text.encode()).hexdigest()[:32]


def test_texts_that_look_alike_have_refs_of_their_own() -> None:
    assert len({Document(text).ref for text in ("", " ", "a", "A", "é", "e\u0301")}) == 6


def test_it_is_frozen_hashable_and_picklable() -> None:
    document = Document(CLERK, metadata={"page": 1})
    with pytest.raises(AttributeError):
        document.text = "other"  # type: ignore[misc]
    assert {document: 1}[Document(CLERK, metadata={"page": 1})] == 1
    assert pickle.loads(pickle.dumps(document)) == document


def test_later_changes_of_the_callers_dict_do_not_reach_it() -> None:
    metadata = {"page": 1}
    document = Document(CLERK, metadata=metadata)
    metadata["page"] = 2
    assert document.metadata == {"page": 1}


def test_title_and_metadata_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        Document(CLERK, "title")  # type: ignore[call-arg]


def test_source_prefers_the_named_one() -> None:
    assert Document(CLERK, title="Clerk", metadata={"source": Path("clerk.txt")}).source == "clerk.txt"
    assert Document(CLERK, title="Clerk").source == "Clerk"
    assert Document(CLERK).source == Document(CLERK).ref
    assert Document(CLERK, title="", metadata={"source": ""}).source == Document(CLERK).ref


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (CLERK, Document(CLERK)),
        *[({key: CLERK}, Document(CLERK)) for key in TEXT_KEYS],
        ({"text": CLERK, "title": "Clerk", "metadata": {"page": 1}}, (CLERK, "Clerk", {"page": 1})),
        ({"text": CLERK, "id": 7, "metadata": {"page": 1}}, (CLERK, None, {"id": 7, "page": 1})),
        ({"text": CLERK, "id": 7, "metadata": {"id": 8}}, (CLERK, None, {"id": 8})),
        ({"text": CLERK, "content": "other"}, (CLERK, None, {"content": "other"})),
        ({"text": CLERK, "title": None, "metadata": None}, Document(CLERK)),
        (
            SimpleNamespace(page_content=CLERK, metadata={"source": "clerk.txt"}),
            (CLERK, None, {"source": "clerk.txt"}),
        ),
        (Node(), (CLERK, "Clerk", {"file_name": "clerk.txt", "title": "Clerk"})),
        (SimpleNamespace(text=CLERK, metadata={"title": "Clerk"}), (CLERK, "Clerk", {"title": "Clerk"})),
        (SimpleNamespace(text=CLERK, metadata={"title": 3}), (CLERK, None, {"title": 3})),
        (SimpleNamespace(text=CLERK), Document(CLERK)),
        ("", Document("")),
    ],
)
def test_from_any_takes(value: object, expected: Document | tuple[str, str | None, dict[str, Any]]) -> None:
    if isinstance(expected, tuple):
        text, title, metadata = expected
        expected = Document(text, title=title, metadata=metadata)
    assert Document.from_any(value) == expected


def test_from_any_returns_a_document_as_it_is() -> None:
    document = Document(CLERK)
    assert Document.from_any(document) is document


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "a NoneType is not a document"),
        (7, "a int is not a document"),
        (b"bytes", "a bytes is not a document"),
        (Path("clerk.txt"), "read_document"),
        ([CLERK], "a list is not a document"),
        ({"body": CLERK}, "its keys: 'body'"),
        ({}, "its keys: none"),
        ({"text": None}, "a str, not a NoneType"),
        ({"text": CLERK, "title": 3}, "title=3 is a int"),
        ({"text": CLERK, "metadata": "page 1"}, "metadata='page 1' is a str"),
        (SimpleNamespace(page_content=3, metadata={}), "a str, not a int"),
        (SimpleNamespace(text=CLERK, metadata=[1]), "metadata=[1] is a list"),
        ("half a pair \ud83d", "lone surrogate (U+D83D) at character 12"),
    ],
)
def test_from_any_refuses_in_one_sentence(value: object, said: str) -> None:
    with pytest.raises(DocumentError) as caught:
        Document.from_any(value)
    message = str(caught.value)
    assert said in message
    assert ("; pass " in message) or ("; decode " in message)
    assert "\n" not in message


@pytest.mark.parametrize("name", ["page_content", "text"])
def test_one_document_of_a_framework_is_one_also_where_it_iterates_over_its_fields(name: str) -> None:
    kind = type("Fields", (), {name: CLERK, "__iter__": lambda self: iter([(name, CLERK)])})
    assert as_documents(kind()) == [Document(CLERK)]


def test_an_iterator_that_was_read_before_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    texts = iter([CLERK])
    assert len(as_documents(texts)) == 1
    assert as_documents([]) == []
    assert not caplog.text
    assert as_documents(texts) == []
    assert "documents is a list_iterator that gives none" in caplog.text


@pytest.mark.parametrize("kind", ["text", "bytes", "memory", "temporary", "lines"])
def test_an_open_file_is_not_taken_for_a_list_of_its_lines(tmp_path: Path, kind: str) -> None:
    (file := tmp_path / "a.txt").write_text("Line one.\nLine two.\n")
    with ExitStack() as opened:
        lines: Any = {
            "text": lambda: opened.enter_context(file.open()),
            "bytes": lambda: opened.enter_context(file.open("rb")),
            "memory": lambda: io.StringIO(file.read_text()),
            "temporary": lambda: opened.enter_context(tempfile.SpooledTemporaryFile("w+")),
            "lines": lambda: opened.enter_context(fileinput.input(file)),
        }[kind]()
        with pytest.raises(DocumentError, match=r"documents is a \w+, an open file; pass .*read_document\(path\)"):
            as_documents(lines)
    assert [document.text for document in as_documents(file.read_text().splitlines())] == ["Line one.", "Line two."]


def test_a_text_that_is_the_name_of_a_file_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text(CLERK)
    for text in ("notes", "notes/a.txt", str(tmp_path / "notes")):
        assert as_documents(text)[0].text == text
        assert f"pass read_document({text!r})" in caplog.text
        caplog.clear()
    as_documents([CLERK, "none.txt", "", "x" * 5000, "//share/x", Document("notes")])
    assert not caplog.text


@pytest.mark.parametrize("name", ["text", "title"])
def test_a_lone_surrogate_is_no_text_and_no_title(name: str) -> None:
    with pytest.raises(DocumentError, match=rf"the {name} holds a lone surrogate \(U\+DCFF\) at character 3"):
        Document(**{"text": "a", name: "bad\udcff"})

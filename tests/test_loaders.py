"""Files become documents, or one sentence that says why not."""

from __future__ import annotations

import codecs
import logging
import os
import sys
import time
from pathlib import Path

import pypdf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pdfs import write_pdf

from extemb_core.documents import Document
from extemb_core.errors import DocumentError, DocumentNotFoundError, MissingExtraError
from extemb_core.loaders import (
    BINARY_SUFFIXES,
    SUPPORTED_SUFFIXES,
    Skipped,
    _read_html,
    read_document,
    read_documents,
)


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def refused(path: str | Path) -> str:
    with pytest.raises(DocumentError) as caught:
        read_document(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.py", "A.TXT", "README", "a.unheard-of"])
def test_text_of_any_suffix(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "Straße\n\n  indented\n")
    document = read_document(path)
    assert document.text == "Straße\n\n  indented\n"
    assert (document.title, document.metadata) == (name, {"source": str(path)})
    assert read_document(str(path)) == document


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.html"])
def test_byte_order_marks_are_obeyed_and_stripped(tmp_path: Path, mark: bytes, encoding: str, name: str) -> None:
    assert read_document(write(tmp_path / name, mark + "né 你".encode(encoding))).text == "né 你"


def test_a_tilde_is_the_home_folder(home: Path) -> None:
    (home / "docs").mkdir()
    (home / "docs" / "a.txt").write_text("A")
    assert read_document("~/docs/a.txt").metadata["source"] == str(home / "docs" / "a.txt")
    assert [document.text for document in read_documents("~/docs")] == ["A"]
    assert [document.text for document in read_documents([Path("~/docs/a.txt")])] == ["A"]


def test_line_ends_become_newlines(tmp_path: Path) -> None:
    assert read_document(write(tmp_path / "a.txt", b"a\r\nb\rc\nd")).text == "a\nb\nc\nd"


@pytest.mark.parametrize("name", ["a.txt", "a.html"])
@pytest.mark.parametrize("content", ["", " \n\t "])
def test_an_empty_file_is_a_document(tmp_path: Path, name: str, content: str) -> None:
    assert read_document(write(tmp_path / name, content)).text.strip() == ""


def test_ten_megabytes_in_one_line(tmp_path: Path) -> None:
    text = "word " * 2_000_000
    assert read_document(write(tmp_path / "a.txt", text)).text == text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"caf\xe9 au lait", "UTF-8 at byte 3"),
        (codecs.BOM_UTF8 + b"caf\xe9", "UTF-8 at byte 6"),
        (codecs.BOM_UTF16_LE + b"a\0b\0\x00\xd8", "UTF-16-LE at byte 6"),
    ],
)
def test_invalid_text_names_file_offset_and_remedy(tmp_path: Path, data: bytes, said: str) -> None:
    path = write(tmp_path / "menu.txt", data)
    message = refused(path)
    assert message.startswith(f"{path} is not valid {said}; re-encode it as UTF-8")


def test_binary_content_is_refused_under_a_text_suffix(tmp_path: Path) -> None:
    for name in ("a.txt", "a.html", "a"):
        assert "a NUL byte at offset 2" in refused(write(tmp_path / name, b"ab\0c"))


@pytest.mark.parametrize("suffix", sorted(BINARY_SUFFIXES))
def test_binary_suffixes_are_refused_with_the_supported_ones(tmp_path: Path, suffix: str) -> None:
    message = refused(write(tmp_path / f"a{suffix.upper()}", "text all the same"))
    assert f"is a {suffix} file" in message
    assert ".txt, .md, .rst, .html, .pdf" in message


def test_no_suffix_is_both_read_and_refused() -> None:
    assert not SUPPORTED_SUFFIXES & BINARY_SUFFIXES


@pytest.mark.parametrize("name", ["missing.txt", "missing.docx", "missing.pdf", "there.txt/below.txt"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    write(tmp_path / "there.txt", "x")
    with pytest.raises(DocumentNotFoundError, match="does not exist; check the path"):
        read_document(tmp_path / name)


@pytest.mark.parametrize("text", ["A text passed as a path. " * 400, "a\0b"])
def test_text_taken_for_a_path(text: str) -> None:
    assert "Document(text)" in refused(text)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert "pass it to read_documents" in refused(tmp_path)


PAGE = """<!doctype html><html><head><title> The
  League </title><style>p {}</style></head><body><nav>Home | About</nav><!-- note -->
<h1>Red-Headed   League</h1><p>A <b>clerk</b>,
hired&nbsp;once.<br>Twice.</p><script>alert("x < y")</script>
<ul><li>one</li><li>two <i>three</i></li></ul>
<table><tr><th></th><th>pay</th></tr> <tr> <td>clerk</td> <td>4</td> </tr></table>
<pre>
def f():

    return  1
</pre>end &amp; more</body></html>"""


def test_html_as_a_reader_sees_it(tmp_path: Path) -> None:
    document = read_document(write(tmp_path / "a.html", PAGE))
    assert document.title == "The League"
    assert document.text.split("\n") == [
        "Red-Headed League",
        "A clerk, hired once.",
        "Twice.",
        "one",
        "two three",
        "\tpay",
        "clerk\t4",
        "",
        "def f():",
        "",
        "    return  1",
        "end & more",
    ]


def test_html_without_a_title_takes_the_file_name(tmp_path: Path) -> None:
    assert read_document(write(tmp_path / "a.htm", "<p>x")).title == "a.htm"


def test_html_with_an_unclosed_head_loses_nothing(tmp_path: Path) -> None:
    document = read_document(write(tmp_path / "a.html", "<html><head><title>T</title><p>kept"))
    assert document.text == "kept"


@pytest.mark.parametrize(
    ("declared", "encoding"),
    [("iso-8859-1", "cp1252"), ("koi8-r", "koi8-r"), ("utf-16", "utf-8"), ("nonsense", "utf-8")],
)
def test_html_in_its_declared_encoding(tmp_path: Path, declared: str, encoding: str) -> None:
    word = "мир" if encoding == "koi8-r" else "café €"
    page = f'<meta charset="{declared}"><p>{word}</p>'.encode(encoding)
    assert read_document(write(tmp_path / "a.html", page)).text == word


@pytest.mark.parametrize(
    "declared", ["hex", "rot13", "zip", "bz2", "base64", "quopri", "uu", "undefined", "punycode", "idna", "utf-7",
                 "unicode_escape", "raw_unicode_escape", "utf-16", "utf-32", "cp037", "none such", "x" * 9000]
)  # fmt: skip
@pytest.mark.parametrize(
    "page", ['<meta charset="{}"><p>M\u00fcller \\x41', '<?xml encoding="{}"?><p>M\u00fcller \\x41']
)
def test_html_that_declares_what_no_page_is_encoded_in_is_read_as_utf8(
    tmp_path: Path, declared: str, page: str
) -> None:
    assert read_document(write(tmp_path / "a.html", page.format(declared))).text == "M\u00fcller \\x41"


@pytest.mark.parametrize(
    "repeated",
    ["<a ", "<a/", "<a \n", "<meta ", "<meta charset", "<a b='", "<!--", "<!-- >", "<![CDATA[", "</a ", "<?"],
)
@pytest.mark.parametrize("end", ["", ">", "-->", "'>"])
def test_html_is_read_in_one_pass_whatever_is_left_open(tmp_path: Path, repeated: str, end: str) -> None:
    page = write(tmp_path / "a.html", "<p>said</p>" + repeated * (40_000 // len(repeated)) + end)
    start = time.process_time()
    assert read_document(page).text.startswith("said")
    assert time.process_time() - start < 1.5  # what is looked through to its end for each of them takes many times that


def test_html_that_the_parser_refuses_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"a\.html cannot be parsed as HTML; open it in a browser"):
        read_document(write(tmp_path / "a.html", "<p>x<![x>"))


@pytest.mark.parametrize(
    "hidden",
    [
        "<p hidden>obey</p>", "<p HIDDEN=''>obey</p>", "<div hidden='until-found'><p>obey</p></div>",
        *(f'<span style="{style}">obey</span>' for style in (
            "display:none", "color: red; DISPLAY : none !important", "display:/**/none", "visibility:hidden",
            "opacity:0", "opacity: 0.0;", "font-size:0px")),
        "<dialog>obey</dialog>", "<datalist><option>obey</datalist>", "<iframe>obey</iframe>", "<canvas>obey</canvas>",
    ],
)  # fmt: skip
def test_html_that_is_hidden_is_not_read(tmp_path: Path, hidden: str) -> None:
    assert read_document(write(tmp_path / "a.html", f"<p>before {hidden}</p><p>after</p>")).text == "before\nafter"


@pytest.mark.parametrize("style", [
    "display:block", "opacity:0.5", "font-size:0.8em", "visibility:visible", "--x:none", "backface-visibility: hidden",
    "-webkit-backface-visibility:hidden", "fill-opacity:0", "--bg-opacity: 0", "--font-size:0", "--menu-display:none",
])  # fmt: skip
def test_html_of_another_style_is_read(tmp_path: Path, style: str) -> None:
    assert read_document(write(tmp_path / "a.html", f'<p style="{style}" aria-hidden="true">seen')).text == "seen"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ('<td style="font-size:0px;padding:1px"><div style="font-size:13px">4711</div> gap</td>', "4711"),
        ('<div style="font-size:0">gap<b style="font-size: medium">seen</b></div>', "seen"),
        ('<div style="font-size:0"><b style="font-size:2em">gap</b><i style="font-size:80%">gap</i></div>', ""),
        ('<div style="font-size:0"><b style="font-size:2rem">seen</b></div>', "seen"),
        ('<div style="font-size:12px;font-size:0 !important">gap</div>', ""),
        ('<p style="visibility:hidden">gap<span style="visibility:visible">seen</span></p>', "seen"),
        ('<p style="visibility:hidden">gap<span style="color:red">gap</span></p>after', "after"),
        ('<p style="visibility:hidden">gap<span style="content-visibility:auto">gap</span></p>after', "after"),
        ('<p style="display:none">gap<span style="display:inline">gap</span></p>after', "after"),
    ],
)
def test_html_is_seen_again_inside_what_has_no_size_or_is_invisible(tmp_path: Path, page: str, text: str) -> None:
    assert read_document(write(tmp_path / "a.html", page)).text == text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<table><tr><td>Name<td>Age<tr><td>Bob<td>30</table>", "Name\tAge\nBob\t30"),
        ("<table><tr><th>Name</th><td></td><td>Age</td></tr></table>", "Name\t\tAge"),
        ("<table><tr><td>a<table><tr><td>b<td>c</table><td>d</table>", "a\nb\tc\n\td"),
        ("<ul><li hidden><p>two<li>three</ul>", "three"),
        ("<ul><li>one<li hidden>two<li>three<li>four</ul>", "one\nthree\nfour"),
        ("<ul><li hidden>two<ul><li>inside</ul><li>three</ul>", "three"),
        ("<select><option hidden>Choose<option>Alpha<option>Beta</select>", "Alpha\nBeta"),
        ("<p hidden>one<p>two<p>three", "two\nthree"),
        ("<dl><dt hidden>a<dd>b<dt>c<dd>d</dl>", "b\nc\nd"),
        ("<table><tr hidden><td>a<tr><td>b</table>", "b"),
        ("<ruby>\u6f22<rp>(<rt>kan<rp>)</ruby>\u5b57", "\u6f22kan\u5b57"),
    ],
)
def test_html_whose_end_tags_are_left_out_is_read_as_if_they_stood(tmp_path: Path, page: str, text: str) -> None:
    assert read_document(write(tmp_path / "a.html", page)).text == text


def test_html_nested_deeper_than_the_stack(tmp_path: Path) -> None:
    depth = 3 * sys.getrecursionlimit()
    page = "<div>" * depth + "deep" + "</div>" * depth
    assert read_document(write(tmp_path / "a.html", page)).text == "deep"


def test_html_that_looks_like_a_path_or_like_xml_raises_no_warning(tmp_path: Path) -> None:
    assert read_document(write(tmp_path / "a.html", "page.html")).text == "page.html"
    page = '<?xml version="1.0"?><html><body><p>x</p></body></html>'
    assert read_document(write(tmp_path / "a.xhtml", page)).text == "x"


@given(st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc", "Z"), exclude_characters="<>&")), max_size=8))
def test_html_keeps_every_word_in_order(words: list[str]) -> None:
    words = [word for word in words if word.split() == [word]]
    page = "".join(f"<p>{word}</p>" if place % 2 else f"<div>{word}" for place, word in enumerate(words))
    text, _ = _read_html(Path("a.html"), page.encode())
    assert text.split() == words


def test_pdf_pages_are_joined_by_blank_lines(tmp_path: Path) -> None:
    document = read_document(write_pdf(tmp_path / "a.pdf", ["First page.", "Second page."]))
    assert document.text == "First page.\n\nSecond page."
    assert document.title == "a.pdf"
    assert document.metadata["pages"] == 2


def test_what_was_filled_into_a_pdf_form_is_read(tmp_path: Path) -> None:
    fields: list[list[dict[str, str]]] = [
        [{"/T": "Tenant", "/FT": "/Tx", "/V": "Jane Doe"}, {"/T": "Empty", "/FT": "/Tx"}],
        [{"/T": "Pets", "/FT": "/Btn", "/V": "/Yes", "/AS": "/Yes"}, {"/T": "Car", "/FT": "/Btn", "/AS": "/Off"}],
    ]
    document = read_document(write_pdf(tmp_path / "a.pdf", ["Name:", ""], fields=fields))
    assert document.text == "Name:\nTenant: Jane Doe\n\nPets: Yes"
    assert document.page_of(document.text.index("Yes")) == 2
    assert "pages_without_text" not in document.metadata


def test_the_page_of_each_word_of_a_pdf_is_known(tmp_path: Path) -> None:
    pages = ["", "Two.", "", "", "Five.", "Six.", ""]
    document = read_document(write_pdf(tmp_path / "a.pdf", pages))
    for number, text in enumerate(pages, start=1):
        if text:
            start = document.text.index(text)
            assert {document.page_of(at) for at in range(start, start + len(text))} == {number}
    assert Document(document.text).page_of(0) is None


def test_pdf_pages_without_text_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_pdf(tmp_path / "a.pdf", ["One.", "", "Three."])
    with caplog.at_level(logging.WARNING):
        document = read_document(path)
    assert document.text == "One.\n\nThree."
    assert document.metadata["pages_without_text"] == [2]
    assert "no text on 1 of 3 pages: [2]" in caplog.text


def test_pdf_encrypted_with_a_password(tmp_path: Path) -> None:
    message = refused(write_pdf(tmp_path / "a.pdf", ["Secret."], password="open sesame"))
    assert "is encrypted and cannot be read; save a copy without a password" in message


def test_pdf_encrypted_without_a_password_is_read(tmp_path: Path) -> None:
    assert read_document(write_pdf(tmp_path / "a.pdf", ["Open."], password="")).text == "Open."


def test_pdf_encrypted_with_aes_and_without_a_password_is_read() -> None:
    pytest.importorskip("cryptography")
    assert read_document(Path(__file__).with_name("aes-256.pdf")).text == "open"


def test_pdf_encrypted_with_aes_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise pypdf.errors.DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr("pypdf._encryption.aes_cbc_decrypt", refuse)
    monkeypatch.setattr("pypdf._encryption.aes_cbc_encrypt", refuse)
    with pytest.raises(MissingExtraError, match=r"aes-256\.pdf, .*cryptography.*pip install 'extemb\[documents\]'"):
        read_document(Path(__file__).with_name("aes-256.pdf"))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Exceeded 8 form XObject invocations while extracting text; further form content is skipped.", True),
        ("Impossible to decode XFormObject /F1: oh", True),
        ("Detected cyclic form XObject reference, skipping /F1.", True),
        ("Ignoring wrong pointing object 8 0 (offset 0)", False),
        ("Duplicate %%EOF marker(s) found, skipping them", False),
    ],
)
def test_pdf_whose_text_was_not_all_read_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, said: str, told: bool
) -> None:
    extract = pypdf.PageObject.extract_text

    def extracting(page: pypdf.PageObject) -> str:
        logging.getLogger("pypdf._page").warning(said)
        return extract(page)

    monkeypatch.setattr(pypdf.PageObject, "extract_text", extracting)
    assert read_document(write_pdf(tmp_path / "a.pdf", ["text"])).text == "text"
    ours = [record.getMessage() for record in caplog.records if record.name == "extemb_core.loaders"]
    assert ours == ([f"{tmp_path / 'a.pdf'}: some of its text may be missing: {said.rstrip('.')}"] if told else [])


def test_pdf_without_any_text(tmp_path: Path) -> None:
    assert "holds no text on its 2 pages" in refused(write_pdf(tmp_path / "a.pdf", ["", ""]))


@pytest.mark.parametrize("data", [b"", b"plain text", b"PK\x03\x04"])
def test_pdf_that_is_none(tmp_path: Path, data: bytes) -> None:
    assert "is not a PDF" in refused(write(tmp_path / "a.pdf", data))


@pytest.mark.parametrize("data", [b"%PDF-1.7", b"%PDF-1.7\ntrailer << /Root 9 0 R >>\nstartxref\n0\n%%EOF"])
def test_pdf_damaged(tmp_path: Path, data: bytes) -> None:
    assert "is a damaged PDF" in refused(write(tmp_path / "a.pdf", data))


@pytest.mark.parametrize(("name", "package"), [("a.html", "bs4"), ("a.pdf", "pypdf")])
def test_a_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    path = write(tmp_path / name, "%PDF-1.7")
    with pytest.raises(MissingExtraError, match=r"pip install 'extemb\[documents\]'"):
        read_document(path)


def test_a_folder_is_read_recursively_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/c.html", ".hidden.txt", ".git/x.txt", "d.png", "a/.env", "LICENSE"):
        write(tmp_path / name, name)
    found = [Path(document.metadata["source"]) for document in read_documents(tmp_path)]
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/c.html", "a/z.md", "b.txt"]


def test_files_and_folders_keep_the_order_given(tmp_path: Path) -> None:
    for name in ("b.txt", "f/a.txt"):
        write(tmp_path / name, name)
    documents = read_documents([str(tmp_path / "b.txt"), tmp_path / "f", tmp_path / "b.txt"])
    assert [document.text for document in documents] == ["b.txt", "f/a.txt", "b.txt"]
    assert read_documents(str(tmp_path / "b.txt"))[0].text == "b.txt"
    assert read_documents([]) == []


def test_a_folder_with_nothing_to_read(tmp_path: Path) -> None:
    write(tmp_path / "a.png", "x")
    with pytest.raises(DocumentError, match="holds no file of a type that is read; convert"):
        read_documents(tmp_path)


def test_one_unreadable_file_of_a_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path / "good.txt", "good")
    write(tmp_path / "bad.txt", b"\xff\xff")
    with pytest.raises(DocumentError, match=r"bad\.txt is not valid UTF-8 at byte 0"):
        read_documents(tmp_path)
    with pytest.raises(DocumentNotFoundError):
        read_documents(tmp_path / "nowhere")


def test_a_folder_is_read_as_far_as_it_can_be(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    write(folder / "a.txt", "a")
    write(folder / "sub" / "b.md", "b")
    unreadable = {
        "latin.txt": write(folder / "latin.txt", b"M\xfcller"),
        "locked.pdf": write_pdf(folder / "locked.pdf", ["x"], "secret"),
        "nowhere.txt": folder / "nowhere.txt",
    }
    unreadable["nowhere.txt"].symlink_to(tmp_path / "none")
    for name in ("report.docx", "README"):
        write(folder / name, "x")
    (folder / "linked").symlink_to(folder / "sub")
    skipped = Skipped()
    assert [document.text for document in read_documents(folder, skipped=skipped)] == ["a", "b"]
    assert [path.name for path in skipped.passed_over] == ["README", "linked", "report.docx"]
    assert len(skipped.unreadable) == 3
    for name, error in zip(unreadable, skipped.unreadable, strict=True):
        assert name in str(error)
    with pytest.raises(DocumentError, match=r"latin\.txt is not valid UTF-8"):
        read_documents(unreadable["latin.txt"], skipped=Skipped())  # one that was named


def test_a_reader_that_is_not_installed_leaves_the_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    write_pdf(tmp_path / "a.pdf", ["x"])
    write(tmp_path / "b.txt", "b")
    skipped = Skipped()
    assert [document.text for document in read_documents(tmp_path, skipped=skipped)] == ["b"]
    assert isinstance(skipped.unreadable[0], MissingExtraError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_what_is_no_file_in_a_folder_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    os.mkfifo(tmp_path / "pipe.txt")
    skipped = Skipped()
    assert [document.text for document in read_documents(tmp_path, skipped=skipped)] == ["a"]
    assert skipped.passed_over == [tmp_path / "pipe.txt"]
    assert len(read_documents(tmp_path)) == 1


def test_stores_and_shards_in_a_folder_are_none_of_its_documents(tmp_path: Path) -> None:
    for name in ("lib/data.mdb", "lib/store.json", "lib/passages.json", "out/manifest.json", "out/0.safetensors"):
        write(tmp_path / name, "{}")
    for name in ("a.txt", "b/store.json", "c/manifest.json"):
        write(tmp_path / name, "of the user's")
    skipped = Skipped()
    found = [document.metadata["source"] for document in read_documents(tmp_path, skipped=skipped)]
    assert found == [str(tmp_path / name) for name in ("a.txt", "b/store.json", "c/manifest.json")]
    assert skipped.passed_over == [tmp_path / "lib", tmp_path / "out"]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are Unicode")
def test_a_name_that_is_not_utf8_is_written_down_as_utf8(tmp_path: Path) -> None:
    for byte in (b"\xff", b"\xfe"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad" + byte + b".txt")).write_text("x")
    documents = read_documents(tmp_path)
    assert [document.title for document in documents] == [r"bad\xfe.txt", r"bad\xff.txt"]
    assert [document.source for document in documents] == [rf"{tmp_path}/bad\xfe.txt", rf"{tmp_path}/bad\xff.txt"]

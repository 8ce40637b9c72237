"""From a file to a Document: text, Markdown, HTML and PDF, or one sentence that says why not."""

from __future__ import annotations

import codecs
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extemb_core.documents import Document, without_lone_surrogates
from extemb_core.errors import DocumentError, DocumentNotFoundError, MissingExtraError, optional_import
from extemb_core.utils.validation import path_of

if TYPE_CHECKING:
    from bs4.element import Tag

logger = logging.getLogger(__name__)


def _words(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


HTML_SUFFIXES = frozenset({".html", ".htm", ".xhtml"})
PDF_SUFFIXES = frozenset({".pdf"})
TEXT_SUFFIXES = _words(
    """
    .txt .text .md .markdown .rst .adoc .org .tex .log .csv .tsv .json .jsonl .xml .toml .yaml .yml .ini .cfg
    .py .pyi .js .ts .c .h .cc .cpp .hpp .cs .java .kt .swift .go .rs .rb .php .pl .lua .r .jl .sh .sql .css
    """
)
SUPPORTED_SUFFIXES = TEXT_SUFFIXES | HTML_SUFFIXES | PDF_SUFFIXES
"""Suffixes that are read in a folder; a file named by the caller is tried as text under any other suffix too."""

BINARY_SUFFIXES = _words(
    """
    .doc .docx .odt .rtf .pages .xls .xlsx .ods .ppt .pptx .odp .epub .mobi .djvu .ps .png .jpg .jpeg .gif
    .bmp .webp .tif .tiff .ico .mp3 .wav .flac .ogg .mp4 .mkv .avi .mov .webm .zip .gz .bz2 .xz .zst .7z .rar
    .tar .tgz .exe .dll .so .dylib .o .a .class .jar .whl .pyc .pkl .npy .npz .pt .pth .bin .safetensors
    .gguf .onnx .parquet .arrow .db .sqlite
    """
)

# UTF-32 before UTF-16: the little-endian mark of the one begins with that of the other.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Encodings that extend ASCII decode these bytes to the same characters; UTF-7, escapes and IDNA do not.
_PLAIN = bytes(range(32, 91)) + bytes(range(94, 127)) + rb"+AEE-\u0041.xn--4ca"
_MAX_DECLARATION_BYTES = 2048  # in which a page declares its encoding; the standard says 1024
_CONVERT = "convert it to text, Markdown, HTML or PDF (.txt, .md, .rst, .html, .pdf)"

_UNSEEN_TAGS = _words("title script style noscript template nav svg datalist noframes iframe audio video canvas rp")
_BLOCK_TAGS = _words(
    """
    address article aside blockquote body br caption center dd details dialog div dl dt fieldset figcaption
    figure footer form h1 h2 h3 h4 h5 h6 head header hr html legend li main ol option p pre section select
    summary table tbody textarea tfoot thead tr ul
    """
)
_CELL_TAGS = frozenset({"td", "th"})
# Tags whose end may be left out, and the tags that then end them; the parser puts those inside.
_CLOSED_BY = {
    "li": _words("li"),
    "p": _BLOCK_TAGS - {"br", "body", "html", "legend", "option", "summary", "tr"},
    "option": _words("option optgroup"),
    "tr": _words("tr tbody tfoot"),
    **dict.fromkeys(_words("dt dd"), _words("dt dd")),
    **dict.fromkeys(_CELL_TAGS, _words("td th tr tbody tfoot")),
    **dict.fromkeys(_words("rp rt"), _words("rp rt")),
}
_UNSEEN_STYLE = re.compile(r"(?<![\w-])(display\s*:\s*none|opacity\s*:\s*0(\.0+)?%?\s*(;|!|$))", re.I)
# Elements inside one that is hidden by these styles may be visible again.
_FONT_SIZE = re.compile(
    r"(?<![\w-])font-size\s*:\s*(?P<zero>0(?:\.0+)?[a-z%]*\s*(?:;|!|$))?(?P<relative>[\d.]+(?:em|%))?", re.I
)
_VISIBILITY = re.compile(r"(?<![\w-])visibility\s*:\s*(?P<hidden>hidden|collapse)?", re.I)
_COMMENT = re.compile(r"/\*.*?\*/", re.S)


_PAGE_BREAK = "\n\n"
_LOSS = re.compile(r"(?<!found, )skipp|exceed|impossible|missing|not be read", re.IGNORECASE)  # in what pypdf logs


@dataclass
class Skipped:
    """Gathers what `read_documents` leaves out of the folders that it reads.

    Attributes:
        unreadable: Errors of the folders, and of files of a readable type, that could not be read.
        passed_over: Files of other types, links to folders, special files, and stores and shards of embeddings.
    """

    unreadable: list[DocumentError | MissingExtraError] = field(default_factory=list)
    passed_over: list[Path] = field(default_factory=list)


def read_document(path: str | os.PathLike[str]) -> Document:
    """Read one file by its suffix; its title is the file's name (for HTML, its `<title>`).

    Text is UTF-8 (UTF-16 and UTF-32 with a byte order mark are recognised), line ends become `\\n`.
    `metadata["source"]` is the path; a PDF adds `metadata["pages"]`, `metadata["page_starts"]`, which
    `Document.page_of` reads, and `metadata["pages_without_text"]` if there are any. An empty file is an empty
    document.

    Raises:
        DocumentNotFoundError: there is no such file.
        DocumentError: a folder, a file of a type that is not read, or one that cannot be decoded.
        MissingExtraError: HTML or PDF without the extra `documents`.
    """
    path = path_of(path)
    suffix = path.suffix.lower()
    if suffix in BINARY_SUFFIXES and os.path.isfile(path):
        raise DocumentError(f"{path} is a {suffix} file, a type that is not read; {_CONVERT}")
    data = _read_bytes(path)
    # The bytes of a name need not be UTF-8, as a text must be.
    title, source = (os.fsencode(name).decode("utf-8", "backslashreplace") for name in (path.name, path))
    metadata = {"source": source}
    if suffix in PDF_SUFFIXES:
        text, about = _read_pdf(path, data)
        metadata |= about
    elif suffix in HTML_SUFFIXES:
        text, heading = _read_html(path, data)
        title = heading or title
    else:
        text = _decode(path, data).replace("\r\n", "\n").replace("\r", "\n")
    return Document(text, title=title, metadata=metadata)


def read_documents(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, skipped: Skipped | None = None
) -> list[Document]:
    """Read files and folders, in the order given; a folder recursively, in sorted order.

    In a folder, only files with one of `SUPPORTED_SUFFIXES` are read, never hidden ones. Links to folders are not
    followed, and a store inside the folder is not read as a document.

    Args:
        paths: A file or folder, or several.
        skipped: Collects what is left out of folders, so that the other files are read; without it, the first file that
            cannot be read is an error.

    Raises:
        DocumentError: as `read_document`, or a folder that holds nothing to read.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    documents: list[Document] = []
    for path in map(path_of, paths):
        for file in _files(path, skipped):
            documents += _try_to_read(file, None if file == path else skipped)
    return documents


def _try_to_read(file: Path, skipped: Skipped | None) -> list[Document]:
    try:
        return [read_document(file)]
    except (DocumentError, MissingExtraError) as error:
        if skipped is None:
            raise
        skipped.unreadable.append(error)
        return []


def _files(path: Path, skipped: Skipped | None) -> list[Path]:
    """List a file, or the files to read in a folder."""
    if not os.path.isdir(path):
        return [path]
    skipped_here = Skipped()

    def note(exc: OSError) -> None:
        error = DocumentError(f"{exc.filename} cannot be listed ({exc.strerror}); check its permissions")
        if skipped is None:
            raise error from exc
        skipped_here.unreadable.append(error)

    files: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=note):
        if _holds_embeddings(names):
            skipped_here.passed_over.append(Path(folder))
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        skipped_here.passed_over += [link for name in folders if (link := Path(folder, name)).is_symlink()]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            # A broken link counts as an unreadable file; a pipe would keep its reader waiting for ever.
            is_file = os.path.isfile(file) or not os.path.exists(file)
            taken = is_file and file.suffix.lower() in SUPPORTED_SUFFIXES
            (files if taken else skipped_here.passed_over).append(file)
    if not files and not skipped_here.unreadable:
        raise DocumentError(f"{path} holds no file of a type that is read; {_CONVERT}, or name files to read as text")
    if skipped is not None:
        skipped.unreadable += skipped_here.unreadable
        skipped.passed_over += sorted(skipped_here.passed_over)
    return sorted(files)


def _holds_embeddings(names: Sequence[str]) -> bool:
    """Return whether a folder of these files is a store, a library or an export of one."""
    shards = "manifest.json" in names and any(name.endswith(".safetensors") for name in names)
    return shards or {"store.json", "data.mdb"} <= {*names}


def _read_bytes(path: Path) -> bytes:
    shown = str(path) if len(str(path)) <= 200 else str(path)[:200] + "..."
    if os.path.isdir(path):
        raise DocumentError(f"{shown} is a folder, not a file; pass it to read_documents")
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise DocumentNotFoundError(f"{shown} does not exist; check the path (seen from {Path.cwd()})") from exc
    except (OSError, ValueError) as exc:  # ValueError: a NUL character in the path
        why = getattr(exc, "strerror", None) or exc
        raise DocumentError(
            f"{shown!r} cannot be read ({why}); check the path and its permissions, or wrap text as Document(text)"
        ) from exc


def _decode(path: Path, data: bytes, declared: str | None = None) -> str:
    """Decode by byte order mark, else by the declared encoding, else as UTF-8; never guess."""
    marks = (*_BYTE_ORDER_MARKS, (b"", declared or "utf-8"))  # all data begins with the last mark, which is empty
    mark, encoding = next((mark, name) for mark, name in marks if data.startswith(mark))
    if not encoding.startswith(("utf-16", "utf-32")) and b"\0" in data:
        offset = data.index(b"\0")
        raise DocumentError(f"{path} is a binary file (a NUL byte at offset {offset}), not text; {_CONVERT}")
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as exc:
        raise DocumentError(
            f"{path} is not valid {encoding.upper()} at byte {len(mark) + exc.start}; re-encode it as UTF-8 "
            "(for instance: iconv -f WINDOWS-1252 -t UTF-8)"
        ) from exc


def _read_html(path: Path, data: bytes) -> tuple[str, str]:
    """Return the visible text of a page (block elements on lines of their own), and its title.

    Text that `hidden` or an element's own style hides is left out; stylesheets and scripts, which could hide more, are
    not run.
    """
    bs4 = optional_import("bs4", "documents", f"reading {path}", "beautifulsoup4")
    declared = bs4.dammit.EncodingDetector.find_declared_encoding(data[:_MAX_DECLARATION_BYTES], is_html=True)
    markup = _decode(path, data, _web_encoding(declared))
    # The parser takes an unclosed tag for text; earlier versions of Python searched to the end of the page for each.
    end = markup.rfind(">") + 1
    markup = markup[:end] + markup[end:].replace("<", "&lt;")
    with warnings.catch_warnings():
        # bs4 warns of XHTML, and of pages so short that they look like a file name: both are read.
        warnings.simplefilter("ignore")
        try:
            soup = bs4.BeautifulSoup(markup, "html.parser")
        except bs4.builder.ParserRejectedMarkup as exc:
            raise DocumentError(f"{path} cannot be parsed as HTML; open it in a browser and save it again") from exc
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    return _visible_text(soup), title


def _web_encoding(declared: str | None) -> str | None:
    """Return the codec for an encoding named inside a page, as the HTML standard reads such names.

    The declaration was read as ASCII, so an encoding that would read it otherwise (UTF-16, punycode), or that is not a
    text encoding (hex), cannot be the page's.
    """
    try:
        name = codecs.lookup(declared or "utf-8").name
        if _PLAIN.decode(name) != _PLAIN.decode("ascii"):
            return None
    except (LookupError, ValueError):  # ValueError: a NUL character in the name, or bytes that the codec cannot decode
        return None
    return "cp1252" if name in ("iso8859-1", "ascii") else name


def _visible_text(root: Tag) -> str:
    """Read the text in order: blocks on lines of their own, cells separated by tabs, `<pre>` as it stands."""
    from bs4.element import NavigableString, PreformattedString, Tag

    lines: list[str] = []
    line: list[str] = []
    pre_depth = 0

    def end_line() -> None:
        joined = "".join(line).rstrip()
        line.clear()
        if not pre_depth:
            joined = re.sub(r" *\t *", "\t", re.sub(r"[^\S\t]+", " ", joined)).lstrip(" ")
        if joined.strip():
            lines.append(joined)

    # A stack, not recursion: pages nest deeper than Python's stack. With each node: whether it closes, has no size, and
    # is invisible.
    stack: list[tuple[Any, bool, bool, bool]] = [(root, False, False, False)]
    while stack:
        node, closes, tiny, invisible = stack.pop()
        if isinstance(node, Tag):
            style = _COMMENT.sub("", str(node.get("style", "")))
            if not closes and (node.name in _UNSEEN_TAGS or _is_hidden(node, style)):
                stack += [(child, False, tiny, invisible) for child in reversed(_after_missing_end(node))]
                continue
            if node.name in _BLOCK_TAGS:
                end_line()
            elif node.name in _CELL_TAGS and (closes or (node.parent is not None and node.parent.name in _CELL_TAGS)):
                line.append("\t")
            if node.name == "pre":
                pre_depth += -1 if closes else 1
            if not closes:
                for size in _FONT_SIZE.finditer(style):
                    tiny = size["zero"] is not None or (tiny and size["relative"] is not None)
                for visibility in _VISIBILITY.finditer(style):
                    invisible = visibility["hidden"] is not None
                children = ((child, False, tiny, invisible) for child in reversed(node.contents))
                stack += [(node, True, tiny, invisible), *children]
        elif tiny or invisible:
            continue
        elif isinstance(node, NavigableString) and not isinstance(node, PreformattedString):
            if not pre_depth:
                line.append(re.sub(r"\s+", " ", node))
                continue
            first, *others = node.split("\n")
            line.append(first)
            for other in others:
                lines.append("".join(line).rstrip())
                line[:] = [other]
    end_line()
    return "\n".join(lines).strip("\n")


def _is_hidden(tag: Tag, style: str) -> bool:
    unopened = tag.name == "dialog" and "open" not in tag.attrs
    return unopened or "hidden" in tag.attrs or bool(_UNSEEN_STYLE.search(style))


def _after_missing_end(tag: Tag) -> list[Any]:
    """List the nodes that follow a tag whose end the page left out; the parser puts them inside it."""
    names: frozenset[str] = _CLOSED_BY.get(tag.name, frozenset())
    inside: Any = tag
    while inside is not None and inside.name in _CLOSED_BY:
        tags = [(at, child) for at, child in enumerate(inside.contents) if getattr(child, "name", None) is not None]
        if (first := next((at for at, child in tags if child.name in names), None)) is not None:
            return list(inside.contents[first:])
        inside = tags[-1][1] if tags else None  # if its end is left out as well, it holds the rest
    return []


class _Losses(logging.Handler):
    """Collects pypdf's log messages, in this thread, about text that it left out."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread and _LOSS.search(message := record.getMessage()):
            self.messages.append(message.rstrip("."))


def _read_pdf(path: Path, data: bytes) -> tuple[str, dict[str, Any]]:
    """Return the text of the pages, joined by blank lines, and the metadata."""
    if b"%PDF-" not in data[:1024]:
        raise DocumentError(f"{path} is not a PDF in spite of its suffix; rename it to what it is, or save it again")
    pypdf = optional_import("pypdf", "documents", f"reading {path}")
    losses = _Losses()
    logging.getLogger("pypdf").addHandler(losses)
    try:
        read = [
            "\n".join([page.extract_text(), *_form_values(page)]).strip()
            for page in pypdf.PdfReader(BytesIO(data)).pages
        ]
    except pypdf.errors.FileNotDecryptedError as exc:
        raise DocumentError(f"{path} is encrypted and cannot be read; save a copy without a password") from exc
    except pypdf.errors.DependencyError as exc:
        raise MissingExtraError("cryptography", "documents", f"reading {path}, which is encrypted with AES,") from exc
    except Exception as exc:  # a damaged file makes the parser raise nearly anything
        why = " ".join(str(exc).split()) or type(exc).__name__
        raise DocumentError(f"{path} is a damaged PDF ({why}); open it in a viewer and print it to a new PDF") from exc
    finally:
        logging.getLogger("pypdf").removeHandler(losses)
    if losses.messages:
        logger.warning("%s: some of its text may be missing: %s", path, "; ".join(losses.messages))
    pages = [without_lone_surrogates(page) for page in read]
    without = [number for number, page in enumerate(pages, start=1) if not page]
    if len(without) == len(pages):
        raise DocumentError(f"{path} holds no text on its {len(pages)} pages (a scan?); run OCR first, e.g. ocrmypdf")
    starts = accumulate((len(page) + len(_PAGE_BREAK) if page else 0 for page in pages[:-1]), initial=0)
    about: dict[str, Any] = {"pages": len(pages), "page_starts": list(starts)}
    if without:
        about["pages_without_text"] = without
        logger.warning("%s: no text on %d of %d pages: %s", path, len(without), len(pages), without)
    return _PAGE_BREAK.join(page for page in pages if page), about


def _form_values(page: Any) -> Iterator[str]:
    """Yield the values filled into a page's form, as "name: value"; a box that is not ticked has none."""
    for annotation in page.get("/Annots") or ():
        widget = annotation.get_object()
        if widget.get("/Subtype") != "/Widget":
            continue
        # A widget of a field with several widgets inherits the rest from its parent.
        parent = widget["/Parent"].get_object() if "/Parent" in widget else {}
        name, kind, value = (widget.get(key, parent.get(key)) for key in ("/T", "/FT", "/V"))
        if kind == "/Btn":
            value = widget.get("/AS", value)
            value = "" if value == "/Off" else str(value or "").lstrip("/")
        values = value if isinstance(value, list) else [value]
        if filled := ", ".join(str(one) for one in values if one is not None and str(one).strip()):
            yield f"{name}: {filled}"

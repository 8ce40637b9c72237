"""The chat page: a visitor's own documents, a budget for them, and answers with their sources.

NiceGUI draws it, in the server's process; each visit, which is one browser tab, is an object here. Everything that
comes from documents or the LLM is shown as text.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from nicegui import background_tasks, run, ui

from extemb_core.answers import Answer, ContextEntry
from extemb_core.context.scoring import bm25_scores
from extemb_core.context.spans import Array, split_into_sentences
from extemb_core.documents import Document
from extemb_core.errors import DocumentError, ExtembError
from extemb_core.loaders import SUPPORTED_SUFFIXES, read_document
from extemb_core.models.llm import LLM
from extemb_core.serving.errors import ApiError
from extemb_core.serving.guard import NO_KEY, PAGE, TIMED_OUT, Keys
from extemb_core.serving.requests import StoredDocument
from extemb_core.serving.service import Service
from extemb_core.serving.workspace import Workspace
from extemb_core.utils.text import strip_control_chars

_N_PASSAGES = 8  # read instead of documents that are too long even at the coarsest ratio
_MIN_BUDGET, _BUDGET_STEP, _USUAL_BUDGET = 128, 128, 1024
_N_QUOTES, _QUOTE_CHARS = 3, 240
_STEP = 16  # positions by which documents are shortened until they fit with their headings
_OPENING_SECONDS = 0.3  # until a dialog has opened
_PASSAGE = re.compile(r":(\d+)-\d+$")  # ends the source of a passage
_WAYS = {"compressed": "Compressed", "truncated": "Truncated", "full": "Full text"}
_HINT = (
    "Drop in documents at the left (behind the menu on a narrow screen), then ask about them. Each answer quotes what "
    "it was made from; a quote opens the document at its place. A language model answers: check it there."
)
_STYLE = """
.answer, .question, .hint { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 72ch }
.question { align-self: flex-end; padding: .6rem .9rem; border-radius: .8rem; background: rgba(86, 180, 233, .25) }
.way { flex: 1 1 15rem; min-width: 0 }
.asking { background: #fff }
.asking textarea { max-height: 40vh }
.body--dark .asking { background: #121212 }
.quote { font-style: italic; overflow-wrap: anywhere; text-decoration: underline dotted; text-underline-offset: .2em }
.q-uploader__subtitle { display: none }
.q-uploader__list { min-height: 0; padding: 0 }
"""

# Replaces Quasar's own, whose button has no label for screen readers.
_ADD = """
<div class="q-uploader__header-content row flex-center no-wrap q-gutter-xs">
  <q-spinner v-if="props.isUploading" class="q-uploader__spinner"></q-spinner>
  <div class="col q-uploader__title">Drop PDF, Markdown, HTML or text here</div>
  <q-btn v-if="props.canAddFiles" type="a" icon="add" flat dense aria-label="Add documents">
    <q-uploader-add-trigger></q-uploader-add-trigger>
  </q-btn>
</div>
"""

_AROUND_FILE = 4096  # bytes of a request besides the file in it

# Quasar's events about files, reduced to names and numbers; a failed file is removed from its list once reported.
_REJECTED = "(entries) => emit(entries.map((entry) => [entry.file.name, entry.failedPropValidation]))"
_FAILED = """({files, xhr}) => {
  files.forEach((file) => getElement(%d).$refs.qRef.removeFile(file));
  emit(files.map((file) => file.name), xhr.status);
}"""

_service: Service  # NiceGUI has one application per process, so its pages share one model


def add_page(app: FastAPI, service: Service) -> None:
    """Add the page to an application."""
    global _service
    _service = service
    app.add_api_route("/", lambda: RedirectResponse(f"{PAGE}/"), include_in_schema=False)
    ui.run_with(
        app, title="extemb", mount_path=PAGE, dark=None, tailwind=False, show_welcome_message=False,
        reconnect_timeout=30,
    )  # fmt: skip


@ui.page("/")
def _page() -> None:
    _Visit(_service).draw()


class _Visit:
    """One tab."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._owner: str | None = None  # until a key is entered
        self._drawer: ui.element
        self._tokens: dict[str, int] = {}  # by document
        self._reading: list[str] = []  # documents of this tab that are still being added
        self._counted: dict[str, int] = {}  # tokens of texts, by ref
        self._positions: dict[str, int] = {}  # by document, in the last answer
        self._free = 0  # positions that documents could take in the last answer
        self._messages: list[dict[str, str]] = []
        self._task: asyncio.Task[None] | None = None

    # -- what it looks like -----------------------------------------------------------------------------------

    def draw(self) -> None:
        """Draw the page for a visitor."""
        ui.add_css(_STYLE)
        with ui.header().classes("items-center"):
            _icon("menu", "Show or hide the documents", lambda: self._drawer.run_method("toggle"), "white")
            ui.label("extemb").classes("text-h6")
            ui.label(self._service.model).classes("text-caption")
            ui.space()
            _icon("contrast", "Dark or light", lambda: ui.run_javascript("Quasar.Dark.toggle()"), "white")
        # The browser alone keeps whether it is shown: `ui.left_drawer` keeps that on the server and loses early clicks.
        with ui.context.client.layout.props('view="hHh Lpr fFf"'), ui.element("q-drawer") as self._drawer:
            self._drawer.props("side=left bordered width=340 breakpoint=700 show-if-above").classes("nicegui-drawer")
            self._drawer.move(target_index=1)  # after the header
            self._documents_panel()
        self._hint = ui.label(_HINT).classes("hint q-pa-md")
        self._conversation = ui.column().classes("full-width q-pa-md q-gutter-md").props("role=log aria-live=polite")
        with ui.footer().classes("asking"), ui.row().classes("full-width items-end no-wrap"):
            self._question = (
                ui.textarea(placeholder="Ask about your documents").props("autogrow outlined dense aria-label=Question")
                .classes("col").on("keydown.enter.exact.prevent", self._ask)
            )  # fmt: skip
            self._send = _icon("send", "Ask", self._ask)
            self._stop = _icon("stop", "Stop the answer", self._cancel)
        self._stop.set_visibility(False)
        ui.context.client.on_delete(self._cancel)
        if self._service.settings.keys:
            self._ask_for_key()
        else:
            self._enter(NO_KEY)

    def _documents_panel(self) -> None:
        ui.label("Documents").classes("text-subtitle1")
        upload = ui.upload(
            multiple=True, auto_upload=True, on_upload=self._add,
            max_file_size=self._service.settings.max_body_mib * 2**20 - _AROUND_FILE,
        ).props(f'flat bordered accept="{",".join(sorted(SUPPORTED_SUFFIXES))}"').classes("full-width")  # fmt: skip
        upload.add_slot("header", _ADD)
        upload.on("rejected", self._say_rejected, js_handler=_REJECTED)
        upload.on("failed", self._say_failed, js_handler=_FAILED % upload.id)
        self._list = ui.list().props("dense separator").classes("full-width")
        window = self._service.lm.llm.context_window
        most = max(_MIN_BUDGET, window - self._service.settings.max_new_tokens)
        ui.label("Positions for documents").classes("text-subtitle2 q-mt-md")
        ui.label("Room in what the LLM reads at once: less is quicker, more says more").classes("text-caption")
        self._budget = ui.slider(
            min=_MIN_BUDGET, max=most, step=_BUDGET_STEP, value=min(_USUAL_BUDGET, most)
        ).props("label aria-label='Positions for documents'")  # fmt: skip
        ui.label().bind_text_from(
            self._budget, "value", lambda value: f"{int(value):,} of the window's {window:,}"
        ).classes("text-caption")
        self._compare = ui.switch("Compare with truncated and full text")
        ui.button("New conversation", icon="restart_alt", on_click=self._start_over).props("flat")

    def _ask_for_key(self) -> None:
        with ui.dialog(value=True).props("persistent") as dialog, ui.card():
            key = ui.input("API key", password=True).props("autofocus")

            def enter() -> None:
                try:
                    owner = Keys(self._service.settings.keys).owner_of(f"Bearer {key.value}")
                except ApiError as error:
                    key.props["error"], key.props["error-message"] = True, str(error)
                    key.update()
                    return
                dialog.close()
                self._enter(owner)

            key.on("keydown.enter", enter)
            ui.button("Enter", on_click=enter)

    def _enter(self, owner: str) -> None:
        self._owner = owner
        background_tasks.create(self._refresh())

    def _show_documents(self) -> None:
        self._list.clear()
        with self._list:
            for name, n_tokens in self._tokens.items():
                taken = f" → {self._positions[name]:,} positions" if name in self._positions else ""
                with ui.item():
                    with ui.item_section():
                        ui.item_label(strip_control_chars(name)).props("lines=2")
                        ui.item_label(f"{n_tokens:,} tokens{taken}").props("caption")
                    with ui.item_section().props("side"):
                        _icon("delete", f"Remove {name}", partial(self._remove, name))
            for name in self._reading:
                with ui.item():
                    with ui.item_section():
                        ui.item_label(strip_control_chars(name)).props("lines=2")
                        ui.item_label("being read").props("caption")
                    with ui.item_section().props("side"):
                        ui.spinner()
            if not self._tokens and not self._reading:
                ui.item_label("None yet").props("caption")

    # -- documents --------------------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        """Count the tokens of the documents in the workspace."""

        def count() -> dict[str, int]:
            records = self._workspace.records()
            for record in records:
                if record["ref"] not in self._counted:
                    text = self._document(record["source"]).text
                    self._counted[record["ref"]] = len(self._llm.encode(text))
            return {record["source"]: self._counted[record["ref"]] for record in records}

        self._tokens = await run.io_bound(count) or {}
        self._show_documents()

    def _say_rejected(self, event: Any) -> None:
        """Say which files the browser did not send, and why."""
        for refused in dict.fromkeys(rule for _, rule in event.args):
            names = [name for name, rule in event.args if rule == refused]
            if refused == "max-file-size":
                _say_wrong(f"Larger than {self._service.settings.max_body_mib} MiB", names, "send them in parts")
            else:
                _say_wrong("Of a type that is not read", names, "convert to text, Markdown, HTML or PDF")

    def _say_failed(self, event: Any) -> None:
        """Say which files did not arrive completely, and why."""
        names, status = event.args
        if status == TIMED_OUT:
            what = f"Not there within {self._service.settings.body_seconds} s"
            _say_wrong(what, names, "send less at once, or let the server wait longer (--body-seconds)")
        else:
            _say_wrong("Could not be sent", names, "try again")

    async def _add(self, event: Any) -> None:
        if self._owner is None:
            return
        data, name = await event.file.read(), Path(event.file.name.replace("\\", "/")).name or "document.txt"

        def add() -> None:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / f"document{Path(name).suffix}"  # a name may be too long for this disk
                file.write_bytes(data)
                try:
                    read = read_document(file)
                except DocumentError as error:
                    raise DocumentError(str(error).replace(str(file), name)) from error
                if not read.text.strip():
                    raise DocumentError(f"{name} holds no text to ask about; pass another file")
            title = name if read.title == file.name else read.title
            source = self._free_name(name, read.ref)
            self._workspace.add([replace(read, title=title, metadata={**read.metadata, "source": source})])

        self._reading.append(name)
        self._show_documents()
        try:
            await self._change(add)
            await self._refresh()
        except (ExtembError, ApiError, OSError) as error:
            _show_error(str(error))
        finally:
            self._reading.remove(name)
            self._show_documents()
            event.sender.run_method("removeUploadedFiles")  # files still being sent stay

    def _free_name(self, name: str, ref: str) -> str:
        """Return a file's name, with a number if another text has that name: browsers do not send a file's folder."""
        refs = {record["source"]: record["ref"] for record in self._workspace.records()}
        file, number = Path(name), 1
        while refs.get(name, ref) != ref:
            number += 1
            name = f"{file.stem} ({number}){file.suffix}"
        return name

    async def _remove(self, name: str) -> None:
        with suppress(ApiError):  # another tab has removed it
            await self._change(lambda: self._workspace.remove(name))
        self._positions.pop(name, None)
        await self._refresh()

    async def _change(self, work: Callable[[], None]) -> None:
        assert self._owner is not None
        await self._service.engine.work(work, self._service.changing[self._owner])

    def _document(self, name: str) -> Document:
        return self._workspace.documents([StoredDocument(ref=name)])[0]

    @property
    def _workspace(self) -> Workspace:
        """The workspace of the key, which is opened here if it is not open: for threads alone."""
        assert self._owner is not None
        return self._service.workspace(self._owner)

    @property
    def _llm(self) -> LLM:
        return self._service.lm.llm

    # -- questions --------------------------------------------------------------------------------------------

    async def _start_over(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._messages.clear()
        self._conversation.clear()
        self._hint.set_visibility(True)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _ask(self) -> None:
        question = self._question.value.strip()
        if not question or self._task is not None or self._owner is None:
            return
        if not self._tokens:
            still = f"Ask when it has been read: {', '.join(self._reading)}"
            first = "Add a document first: it is what the answer is made from"
            ui.notify(still if self._reading else first, type="warning")
            return
        self._question.set_value("")
        self._task = asyncio.create_task(self._answer(question))

    async def _answer(self, question: str) -> None:
        self._send.set_visibility(False)
        self._stop.set_visibility(True)
        messages = [*self._messages, {"role": "user", "content": question}]
        ways = list(_WAYS) if self._compare.value else ["compressed"]
        unread = ", ".join(self._reading)
        try:
            self._hint.set_visibility(False)
            with self._conversation:
                ui.label(question).classes("question")
                row = ui.row().classes("full-width")
            for way in ways:
                with row, ui.column().classes("way") as column:
                    if len(ways) > 1:
                        ui.label(_WAYS[way]).classes("text-subtitle2")
                    shown = ui.label().classes("answer")
                    waiting = ui.spinner("dots")
                try:
                    answer, documents = await self._stream(way, messages, shown)
                except (ExtembError, ApiError) as error:
                    shown.set_text(str(error))
                    shown.props("role=alert").classes("text-negative")
                    await self._refresh()  # another tab may have removed a document
                    continue
                finally:
                    waiting.delete()
                with column:
                    if unread:
                        ui.label(f"Not asked about, still being read: {unread}").classes("text-caption")
                    await self._tell(answer, documents, question)
                if way == "compressed":
                    self._free = answer.budget or 0
                    self._messages = [*messages, {"role": "assistant", "content": answer.text}]
                    self._positions = _by_document(answer.context)
                    self._show_documents()
        finally:
            self._task = None
            self._send.set_visibility(True)
            self._stop.set_visibility(False)
            with self._conversation:
                ui.run_javascript("window.scrollTo(0, document.body.scrollHeight)")

    async def _stream(
        self, way: str, messages: Sequence[dict[str, str]], shown: ui.label
    ) -> tuple[Answer, list[Document]]:
        """Stream an answer into a label. Returns the answer and its documents."""
        budget, text = int(self._budget.value), ""
        documents: list[Document] = []

        def prepare() -> Any:
            found = self._documents(messages[-1]["content"])
            documents[:] = self._truncated(messages, found) if way == "truncated" else found
            settings = {"budget": budget, "condense": True} if way == "compressed" else {"ratio": "raw"}
            return self._workspace.lm.prepare(
                messages, documents, max_new_tokens=self._service.settings.max_new_tokens, **settings
            )

        job = await self._service.engine.start(prepare)
        try:
            async for piece in job.pieces():
                text += piece
                shown.set_text(strip_control_chars(text))
        finally:
            self._service.engine.cancel(job)
        return job.answer, documents

    def _documents(self, question: str) -> list[Document]:
        """Return all documents, or the passages that say most about the question if the documents are too long."""
        coarsest = max(self._service.lm.embedder.config.ratios)
        if sum(self._tokens.values()) > coarsest * int(self._budget.value):
            return self._workspace.search(question, _N_PASSAGES)
        return [self._document(name) for name in self._tokens]

    def _truncated(self, messages: Sequence[dict[str, str]], documents: Sequence[Document]) -> list[Document]:
        """Truncate documents to the positions that the compressed ones took, headings included."""
        ends = [self._llm.encode_with_ends(document.text)[1] for document in documents]
        for n_tokens in range(self._free, 0, -_STEP):
            cut = _cut(documents, ends, n_tokens)
            plan = self._workspace.lm.plan(
                messages, cut, budget=self._free, ratio="raw", max_new_tokens=self._service.settings.max_new_tokens
            )
            if all(document.fidelity == "raw" for document in plan.documents):
                return cut
        return []

    async def _tell(self, answer: Answer, documents: Sequence[Document], question: str) -> None:
        """Show what an answer took, and quote its sources."""
        taken = sum(entry.positions for entry in answer.documents)
        tokens = sum(entry.n_tokens for entry in answer.documents)
        first = answer.seconds.get("first_token", 0)
        read = {entry.fidelity for entry in answer.documents}
        how = ", all in full" if read == {"raw"} else ""
        ui.label(
            f"{tokens:,} tokens of documents in {taken:,} positions{how} · first token after {first:.2f} s"
        ).classes("text-caption")  # fmt: skip
        if answer.dropped:
            ui.label(f"Left out: {', '.join(entry.source for entry in answer.dropped)}").classes("text-caption")
        for entry, document, start, stop, page in await run.io_bound(self._quotes, answer, documents, question) or ():
            quote = strip_control_chars(document.text[start:stop].strip())
            shown = quote if len(quote) <= _QUOTE_CHARS else f"{quote[:_QUOTE_CHARS]}…"
            item = ui.item(on_click=partial(_open, entry, document, start, stop)).props("dense").classes("full-width")
            with item, ui.item_section():
                ui.item_label(f"“{shown}”").classes("quote")
                on_page = "" if page is None else f", page {page}"
                ui.item_label(strip_control_chars(document.source) + on_page).props("caption")

    def _quotes(
        self, answer: Answer, documents: Sequence[Document], question: str
    ) -> list[tuple[ContextEntry, Document, int, int, int | None]]:
        """Find in each document that was read the sentence that shares most with question and answer, and its page."""
        found: list[tuple[float, ContextEntry, Document, int, int]] = []
        for entry, document in zip(answer.documents, documents, strict=True):
            if entry.fidelity == "dropped":
                continue
            sentences = split_into_sentences(document.text, self._llm.encode_with_ends(document.text)[1])
            scores = bm25_scores(f"{question} {answer.text}", sentences.texts)
            if scores and (best := max(scores)) > 0:
                at = scores.index(best)
                start, stop = (sentences.character(int(border)) for border in sentences.borders[at : at + 2])
                found.append((best, entry, document, start, stop))
        found.sort(key=lambda one: -one[0])
        return [
            (entry, document, start, stop, self._page_of(document, start))
            for _, entry, document, start, stop in found[:_N_QUOTES]
        ]

    def _page_of(self, document: Document, start: int) -> int | None:
        """Return the page that a sentence of a document, or of a passage of one, begins on."""
        while document.text[start : start + 1].isspace():
            start += 1
        if (passage := _PASSAGE.search(document.source)) is None:
            return document.page_of(start)
        try:
            whole = self._document(document.source[: passage.start()])
        except ApiError:  # it has been removed since
            return None
        return whole.page_of(int(passage[1]) + start)


def _icon(name: str, says: str, on_click: Any, color: str = "primary") -> ui.button:
    button = ui.button(icon=name, on_click=on_click).props(f"flat round dense text-color={color}").tooltip(says)
    button.props["aria-label"] = says
    return button


def _say_wrong(what: str, names: Sequence[str], remedy: str) -> None:
    _show_error(f"{what}: {', '.join(names)}; {remedy}")


def _show_error(message: str) -> None:
    close = {"label": "Close", "color": "white"}
    ui.notify(message, type="negative", multi_line=True, timeout=0, actions=[close])


def _open(entry: ContextEntry, document: Document, start: int, stop: int) -> None:
    """Show a document with the fidelity of each part, scrolled to a passage."""
    with ui.dialog(value=True) as dialog, ui.card().style("max-width: 90vw"):
        _icon("close", "Close", dialog.close).classes("self-end")
        ui.html(entry.highlight(document, passage=(start, stop)), sanitize=False)  # every part of the text is escaped
    there = "document.getElementById('passage')?.scrollIntoView({block: 'center'})"
    ui.timer(_OPENING_SECONDS, lambda: ui.run_javascript(there), once=True)


def _by_document(context: Sequence[ContextEntry]) -> dict[str, int]:
    taken: dict[str, int] = {}
    for entry in context:
        name = _PASSAGE.sub("", entry.source)
        taken[name] = taken.get(name, 0) + entry.positions
    return taken


def _cut(documents: Sequence[Document], ends: Sequence[Array], n_tokens: int) -> list[Document]:
    """Cut documents to the first `n_tokens` tokens of all together. ends: (T,) where each token of a document ends."""
    kept = []
    for document, of_tokens in zip(documents, ends, strict=True):
        if (taken := min(len(of_tokens), n_tokens)) > 0:
            text = document.text[: int(of_tokens[taken - 1])]
            kept.append(Document(text, title=document.title, metadata=document.metadata))
            n_tokens -= taken
    return kept

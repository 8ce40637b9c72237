"""Measure the server: many streaming clients with compressed documents or raw text, and what HTTP costs one client.

    python benchmarks/server.py --json benchmarks/results/server.json

Sections: clients (32 at once, each with documents of its own from a warm store, at ratio 8 and as text; the server is a
process of its own; rounds alternate), overhead (the first token over HTTP against `ExtensibleLM.stream`, one client),
page (the chat page in Chromium: how soon it is there, and a first token shown after it was made).
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import ending
import openai
from memory import MIB, sample_text, status_bytes
from timing import alternate, compare

from extemb_core.documents import Document
from extemb_core.lm import ExtensibleLM
from extemb_core.models.generation import StreamedRow
from extemb_core.serving.process import make_server
from extemb_core.serving.settings import ServerSettings
from extemb_core.store.store import EmbeddingStore
from extemb_core.weights.resolve import resolve_embedder, short_name

SECTIONS = ("clients", "overhead", "page")
QUESTION = "What is this about?"
NAME = "measured"
_PARTS = 4  # documents of a client
_PATIENCE = 600  # time limit of a request, in seconds
_PAGE_PATIENCE = 120  # time limit for something to appear on the page, in seconds


def main(argv: Sequence[str] | None = None) -> None:
    ending.report(_parser(), argv, measure, table)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the report without its provenance."""
    if options.quick:
        options.clients, options.document_tokens, options.seconds, options.rounds = 3, 64, 0.5, 2
    embedder = resolve_embedder(options.embedder, options.llm)
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddingStore.open(Path(folder) / "store") as store,
        ExitStack() as stack,
    ):
        lm = ExtensibleLM.from_pretrained(options.llm, embedder, store=store)
        documents = client_documents(lm, options.clients, options.document_tokens)
        url = cache(
            lambda: stack.enter_context(
                serving(lm, Path(folder) / "served", options.new_tokens, page="page" in (options.only or SECTIONS))
            )
        )
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "clients": lambda: clients(lm, documents, options, Path(folder), str(embedder)),
            "overhead": lambda: overhead(lm, url(), documents[0], options),
            "page": lambda: page(lm, url(), documents[0][0], options),
        }
        config = {name: value for name, value in vars(options).items() if name not in ("only", "json", "embedder")}
        return {"config": config | {"llm": short_name(options.llm)}} | ending.measured(sections, options.only)


def client_documents(lm: ExtensibleLM, n_clients: int, n_tokens: int) -> list[list[Document]]:
    """Make the documents of each client: different text for each, `n_tokens` tokens together."""
    ids = lm.llm.encode(sample_text(6 * n_clients * n_tokens))[: n_clients * n_tokens]
    size = n_tokens // _PARTS
    texts = [lm.llm.decode(ids[at : at + size].tolist()) for at in range(0, n_clients * n_tokens, size)]
    made = [Document(f"{at}. {text}", title=f"Part {at}") for at, text in enumerate(texts)]
    return [made[at : at + _PARTS] for at in range(0, len(made), _PARTS)]


# -- many clients -----------------------------------------------------------------------------------------------------


def clients(
    lm: ExtensibleLM, documents: list[list[Document]], options: argparse.Namespace, folder: Path, embedder: str
) -> dict[str, Any]:
    """Measure answers per second of all clients at once, compressed and as text, from a process that only serves."""
    lm.compress([one for of_client in documents for one in of_client], show_progress=False)
    ratios: dict[str, int | str] = {"compressed": options.ratio, "text": "raw"}
    with server_process(options, folder, embedder) as (url, pid):
        asking = [_Client(url, of_client, options.new_tokens) for of_client in documents]
        sides: dict[str, dict[str, Any]] = {name: {"samples_per_second": [], "counts": Counter()} for name in ratios}
        memory: list[int] = []
        for name, ratio in ratios.items():
            for client in asking:  # alone, to compare the answers of all at once with
                client.expected[name] = asyncio.run(client.ask(ratio))[0]
        for number in range(options.rounds):
            for name in list(ratios) if number % 2 else list(ratios)[::-1]:
                seconds = options.seconds / options.rounds
                counts, rss = asyncio.run(_at_once(asking, name, ratios[name], seconds, pid))
                memory += rss if name == "compressed" else []
                sides[name]["counts"] += counts
                sides[name]["samples_per_second"].append(counts["answers"] / seconds)
    rates = {name: median(side["samples_per_second"]) for name, side in sides.items()}
    quarter = len(memory) // 4
    grown = median(memory[-quarter:]) / median(memory[quarter : 2 * quarter]) if quarter else None
    wrong = sum(side["counts"][what] for side in sides.values() for what in ("errors", "mixed"))
    times = rates["compressed"] / rates["text"] if rates["text"] else None
    return {
        "n_clients": len(documents),
        "document_tokens": options.document_tokens,
        "answers_per_second": rates,
        "times_faster": times,
        "target": 3,
        "met": bool(times and times >= 3),
        "errors_or_mixed": wrong,
        "memory_last_over_second_quarter": grown,
        "memory_mib": [size / MIB for size in memory],
        "sides": {name: side | {"counts": dict(side["counts"])} for name, side in sides.items()},
    }


class _Client:
    """One client, its documents, and the answers that it got when it was alone."""

    def __init__(self, url: str, documents: list[Document], new_tokens: int) -> None:
        self._url = url
        self._documents = [{"title": one.title, "text": one.text} for one in documents]
        self._refs = [one.ref for one in documents]
        self._new_tokens = new_tokens
        self.expected: dict[str, str] = {}

    async def ask(self, ratio: int | str) -> tuple[str, bool]:
        """Stream an answer; return its text, and whether it is about this client's documents."""
        async with openai.AsyncOpenAI(base_url=self._url, api_key="unused", timeout=_PATIENCE, max_retries=0) as client:
            stream = await client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": QUESTION}], max_tokens=self._new_tokens, stream=True,
                extra_body={"documents": self._documents, "ratio": ratio},
            )  # fmt: skip
            chunks = [chunk async for chunk in stream]
        told: Any = chunks[-1].model_extra
        refs = [entry["ref"] for entry in told["extemb"]["context"]]
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), refs == self._refs

    async def ask_until(self, end: float, name: str, ratio: int | str, counts: Counter[str]) -> None:
        """Ask repeatedly; wait for the answer under way at the end, without counting it."""
        while time.perf_counter() < end:
            try:
                text, is_own = await self.ask(ratio)
            except openai.OpenAIError:
                counts["errors"] += 1
                continue
            counts["mixed"] += not is_own
            counts["other_text_than_alone"] += text != self.expected[name]  # another order of sums may tip a token
            counts["answers" if time.perf_counter() < end else "late"] += 1


async def _at_once(
    asking: Sequence[_Client], name: str, ratio: int | str, seconds: float, pid: int
) -> tuple[Counter[str], list[int]]:
    counts: Counter[str] = Counter()
    memory: list[int] = []
    end = time.perf_counter() + seconds

    async def watch() -> None:
        while time.perf_counter() < end:
            memory.append(status_bytes("VmRSS", pid) or 0)
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(client.ask_until(end, name, ratio, counts) for client in asking))
    return counts, memory


@contextmanager
def server_process(options: argparse.Namespace, folder: Path, embedder: str) -> Iterator[tuple[str, int]]:
    """Serve in a separate process, from the store of this one; yield its address and its process id."""
    command = [sys.executable, "-m", "extemb_core.cli.main", "serve", "--llm", options.llm, "--embedder", embedder]
    command += ["--store", str(folder / "store"), "--data", str(folder / "data"), "--name", NAME, "--port", "0"]
    command += ["--max-requests", str(2 * options.clients), "--request-seconds", str(_PATIENCE)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = next(filter(None, (re.search(r"listening at (\S+)", line) for line in process.stderr)), None)
        threading.Thread(target=process.stderr.read, daemon=True).start()  # or the process would block on a full pipe
        try:
            yield found[1] if found else "", process.pid
        finally:
            process.terminate()


# -- one client -------------------------------------------------------------------------------------------------------


def overhead(lm: ExtensibleLM, url: str, documents: list[Document], options: argparse.Namespace) -> dict[str, Any]:
    """Time the first piece of an answer, over HTTP and from the object itself, in one process."""
    lm.compress(documents, show_progress=False)
    sent = [{"title": one.title, "text": one.text} for one in documents]
    ratio = options.ratio
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", timeout=_PATIENCE) as client:

        def served() -> None:
            with client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": QUESTION}], max_tokens=2, stream=True,
                extra_body={"documents": sent, "ratio": ratio},
            ) as stream:  # fmt: skip
                next(chunk for chunk in stream if chunk.choices[0].delta.content or chunk.choices[0].finish_reason)

        def core() -> None:
            with lm.stream(QUESTION, documents, ratio=ratio, max_new_tokens=2) as stream:
                next(stream, None)

        samples = alternate({"server": served, "core": core}, 2 if options.quick else options.overhead_rounds)
    return {"document_tokens": options.document_tokens} | compare(samples, "server", "core", 1.05)


@contextmanager
def serving(lm: ExtensibleLM, data: Path, new_tokens: int, *, page: bool) -> Iterator[str]:
    """Serve an object of this process in a thread; yield its address. A process can have only one page."""
    server = make_server(lm, ServerSettings(port=0, name=NAME, data=str(data), max_new_tokens=new_tokens), page=page)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


# -- the page ---------------------------------------------------------------------------------------------------------

_SHOWN = """() => { new MutationObserver(() => {
  const answers = document.querySelectorAll('.answer'), last = answers[answers.length - 1];
  if (!window.shown && last && last.textContent.trim()) window.shown = performance.timeOrigin + performance.now();
}).observe(document.body, {subtree: true, childList: true, characterData: true}); }"""


def page(lm: ExtensibleLM, url: str, document: Document, options: argparse.Namespace) -> dict[str, Any]:
    """Time the page's loading, each time in a fresh browser context, and a first token's way to the page."""
    from playwright.sync_api import sync_playwright

    rounds = 2 if options.quick else options.page_rounds
    made: list[float] = []
    stream_batch = lm.llm.stream_batch

    def noting(rows: Sequence[StreamedRow]) -> None:
        """Note when the first token of a batch is generated."""

        def first(piece: str | None, row: StreamedRow = rows[0]) -> None:
            made.append(time.time())
            row.on_piece(piece)

        stream_batch([replace(rows[0], on_piece=first), *rows[1:]])

    loaded, shown = [], []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        lm.llm.stream_batch = noting  # type: ignore[method-assign]
        for _ in range(rounds):
            context = browser.new_context()
            tab = context.new_page()
            tab.set_default_timeout(_PAGE_PATIENCE * 1000)
            start = time.perf_counter()
            tab.goto(url)
            tab.get_by_label("Question").wait_for()
            loaded.append(time.perf_counter() - start)
            file = {"name": "part.txt", "mimeType": "text/plain", "buffer": document.text.encode()}
            tab.set_input_files("input[type=file]", file)  # type: ignore[arg-type]
            tab.get_by_label("Remove part.txt").wait_for()
            made.clear()
            tab.evaluate(_SHOWN)
            tab.get_by_label("Question").fill(QUESTION)
            tab.keyboard.press("Enter")
            tab.get_by_text("first token after").first.wait_for()
            shown.append(tab.evaluate("window.shown") / 1000 - made[0])
            tab.get_by_label("Remove part.txt").click()
            tab.get_by_label("Remove part.txt").wait_for(state="detached")
            context.close()
        browser.close()
    del lm.llm.stream_batch
    return {
        "first_load_seconds": loaded[0],
        "load_seconds": median(loaded),
        "shown_after_seconds": median(shown),
        "samples_load": loaded,
        "samples_shown": shown,
        "targets": {"first_load_seconds": 1, "shown_after_seconds": 0.1},
        "met": loaded[0] < 1 and max(shown) < 0.1,
    }


def table(report: dict[str, Any]) -> str:
    """Format what was measured beside its target, as plain text."""
    rows: list[tuple[str, str, str, bool]] = []
    if row := report.get("clients"):
        what, grown = (
            f"answers of {row['n_clients']} clients, compressed / text",
            row["memory_last_over_second_quarter"],
        )
        rows.append((what, f"{row['times_faster'] or 0:.1f}x", ">= 3x", row["met"]))
        rows.append(
            (
                "errors, and answers about others' documents",
                str(row["errors_or_mixed"]),
                "0",
                not row["errors_or_mixed"],
            )
        )
        rows.append(("memory, last / second quarter", f"{grown or 0:.3f}x", "<= 1.05x", bool(grown and grown <= 1.05)))
    if row := report.get("overhead"):
        rows.append(("first token, server / core", f"{row['ratio']:.3f}x", "<= 1.05x", row["met"]))
    if row := report.get("page"):
        first, latest = row["first_load_seconds"], max(row["samples_shown"])
        rows.append(("page, first load", f"{first:.2f} s", "< 1 s", first < 1))
        rows.append(("first token, shown after it was made", f"{1000 * latest:.0f} ms", "< 100 ms", latest < 0.1))
    return "\n".join(ending.verdicts(rows))


def _parser() -> argparse.ArgumentParser:
    parser = ending.parser(__doc__, SECTIONS)
    parser.set_defaults(llm="smollm2-135m-joint")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--document-tokens", type=int, default=4096, help="of each client")
    parser.add_argument("--ratio", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300, help="of each side, all rounds together")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--overhead-rounds", type=int, default=15)
    parser.add_argument("--page-rounds", type=int, default=6)
    return parser


if __name__ == "__main__":
    ending.run(main)

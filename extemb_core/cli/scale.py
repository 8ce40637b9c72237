"""`extemb scale compress`: a corpus over many processes and machines."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from extemb_core.cli import options
from extemb_core.cli.config_options import options_from
from extemb_core.cli.options import CommandGroup, option
from extemb_core.cli.output import debugging, library_output, print_result
from extemb_core.scale import ROWS_PER_BATCH

app = CommandGroup(no_args_is_help=True)


@app.callback()  # without it typer would turn a group of one command into that command
def scale() -> None:
    """Compress a corpus over many processes and machines."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Ray's own messages; the result of a run is printed at its end."""
    if debugging():
        yield
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(options.StoringOptions):
    """Options of `extemb scale compress`; their defaults are repeated from `compress_corpus`, whose module needs Ray.

    Attributes:
        passage_tokens: Cut documents into passages as `extemb index add` does.
        column: Name of the column that holds the text.
        rows_per_batch: Rows per shard; a lost worker loses at most so many.
        workers: Number of processes.
        cpus_per_worker: Processors per process.
        gpus_per_worker: GPUs per process.
        ray_address: Address of a running cluster; auto for the one that this machine is part of.
    """

    passage_tokens: int | None = None
    column: str = "text"
    rows_per_batch: int = ROWS_PER_BATCH
    workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    ray_address: str | None = None


_INPUTS = "Files or folders of Parquet or JSON Lines (.gz, .zst too), or their URLs; one kind at a time."


@app.command()
@options_from(CorpusOptions, passage_tokens="whole documents", ray_address="a new one on this machine")
def compress(
    inputs: Annotated[list[str], option("--input", "FILE...", _INPUTS)],
    output: Annotated[str, option("--output", "DIR", "Folder that all machines see, or its URL (s3://...).")],
    as_json: options.JsonOption = False,
    **settings: Any,
) -> None:
    """Compress the texts of a corpus into a folder of shards, with Ray Data.

    Texts in the folder are not compressed again: the same command goes on after an interruption, and adds new texts.
    """
    with library_output(), _quiet():
        from extemb_core.scale.corpus import compress_corpus

        compression = compress_corpus(inputs, output, **asdict(CorpusOptions(**settings)))
    batch = compression.batch
    message = f"{batch.n_texts:,} texts of {batch.n_rows:,} rows, {batch.n_present:,} of them compressed before; "
    if batch.n_empty or batch.n_unreadable:
        message += f"{batch.n_empty:,} rows are empty, {batch.n_unreadable:,} are no text; "
    message += f"{batch.n_tokens:,} tokens in {compression.seconds:.1f} s, "
    message += f"{len(compression.shards):,} shards in {output}"
    print_result(compression, message, as_json=as_json)

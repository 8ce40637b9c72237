"""`extemb scale compress`: a corpus over many processes and machines."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from extemb_core.cli import options
from extemb_core.cli.options import CommandGroup, option
from extemb_core.cli.output import debugging, library_output, print_result
from extemb_core.scale import ROWS_PER_BATCH

app = CommandGroup(no_args_is_help=True)


@app.callback()  # without it a group of one command would be that command
def scale() -> None:
    """Compress a corpus over many processes and machines."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray from saying things of its own accord; what a run comes to is printed at its end."""
    if debugging():
        yield
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@app.command()
def compress(
    context: typer.Context,
    inputs: Annotated[
        list[str],
        option(
            "--input",
            "FILE...",
            "Files or folders of Parquet or JSON Lines (.gz, .zst too), or their URLs; one kind at a time.",
        ),
    ],
    output: Annotated[str, option("--output", "DIR", "Folder that all machines see, or its URL (s3://...).")],
    llm: options.LlmOption = options.DEFAULT_LLM,
    embedder: options.EmbedderOption = None,
    ratio: options.FinestRatioOption = None,
    dtype: options.StoredDtypeOption = "float16",
    passage_tokens: Annotated[
        int | None,
        option("--passage-tokens", "N", "Cut documents into passages as `extemb index add` does.", "whole documents"),
    ] = None,
    column: Annotated[str, option("--column", "NAME", "Column of the input that holds the text.")] = "text",
    rows_per_batch: Annotated[
        int, option("--rows-per-batch", "N", "Rows of a shard, and lost with a worker at most.")
    ] = ROWS_PER_BATCH,
    workers: Annotated[int, option("--workers", "N", "Number of processes.")] = 1,
    cpus_per_worker: Annotated[float, option("--cpus-per-worker", "N", "Processors of each.")] = 1,
    gpus_per_worker: Annotated[float, option("--gpus-per-worker", "N", "GPUs of each.")] = 0,
    ray_address: Annotated[
        str | None,
        option(
            "--ray-address",
            "ADDRESS",
            "Address of a running cluster; auto for the one that this machine is part of.",
            "a new one on this machine",
        ),
    ] = None,
    device: options.DeviceOption = "auto",
    llm_dtype: options.LlmDtypeOption = "auto",
    as_json: options.JsonOption = False,
) -> None:
    """Compress the texts of a corpus into a folder of shards, with Ray Data.

    What is there already is not compressed again: the same command goes on after an interruption, and adds what is new.
    """
    with library_output(), _quiet():
        from extemb_core.scale.corpus import compress_corpus

        compression = compress_corpus(**{name: value for name, value in context.params.items() if name != "as_json"})
    batch = compression.batch
    message = f"{batch.n_texts:,} texts of {batch.n_rows:,} rows, {batch.n_present:,} of them compressed before; "
    if batch.n_empty or batch.n_unreadable:
        message += f"{batch.n_empty:,} rows are empty, {batch.n_unreadable:,} are no text; "
    message += f"{batch.n_tokens:,} tokens in {compression.seconds:.1f} s, "
    message += f"{len(compression.shards):,} shards in {output}"
    print_result(compression, message, as_json=as_json)

"""Compress a corpus with Ray Data: from Parquet or JSON Lines to shards and a manifest."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from extemb_core import errors
from extemb_core.errors import ConfigError, DocumentError, DocumentNotFoundError, ExtembError, optional_import
from extemb_core.scale import ROWS_PER_BATCH
from extemb_core.scale.worker import SHARD, Batch, CompressWorker, finished, seal
from extemb_core.store.format import Dtype
from extemb_core.store.remote import StorageLocation, is_url
from extemb_core.store.shards import Shard
from extemb_core.utils.jsonl import is_jsonl, read_jsonl
from extemb_core.utils.progress import progress
from extemb_core.utils.validation import name_or_path, path_of, whole_number

PARQUET = (".parquet",)
ROWS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst")
_MAX_ROW_BYTES = 2**27  # longest row of JSON Lines that is read
_ERROR = "error"
_RETRIES = 4  # for a batch whose worker is lost: one that kills every worker would otherwise be retried for ever
_CONTEXT = {
    "target_max_block_size": 2**20,  # approximate bytes of text handed to a worker at a time, and lost with it at most
    "enable_progress_bars": False,
    "print_on_execution_start": False,
}


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Result of a run.

    Attributes:
        batch: Counts over all batches.
        shards: Number of shards in the folder, those of earlier runs included.
        seconds: Duration, without the start of Ray.
    """

    batch: Batch
    shards: tuple[Shard, ...]
    seconds: float


def compress_corpus(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    llm: str | os.PathLike[str],
    embedder: str | os.PathLike[str] | None = None,
    ratio: int | None = None,
    dtype: Dtype = "float16",
    passage_tokens: int | None = None,
    column: str = "text",
    rows_per_batch: int = ROWS_PER_BATCH,
    workers: int = 1,
    cpus_per_worker: float = 1,
    gpus_per_worker: float = 0,
    ray_address: str | None = None,
    device: str = "auto",
    llm_dtype: str = "auto",
    show_progress: bool | None = None,
) -> Compression:
    """Compress the texts of a corpus into a folder of shards, on one machine or many.

    Texts in the folder are not compressed again, so the same call goes on after an interruption, and adds what is new
    in the corpus. A batch whose worker is lost is handed to another, at most four times.

    Args:
        inputs: Files or folders of Parquet or JSON Lines (.gz, .zst), or URLs of such that Ray Data knows.
        output: Folder that all machines see, or a URL that fsspec knows.
        llm, embedder: As for `ExtensibleLM.from_pretrained`; every machine needs the weights.
        ratio: The finest ratio that will be asked for; the embedder's `kept_ratio` when not given.
        dtype: Data type of the embeddings on disk: "float16", "int8" or "float32".
        passage_tokens: Cut documents into the passages of a `Library` with this setting; None compresses them whole.
        column: Name of the column that holds the text.
        rows_per_batch: Rows that a worker compresses at once, puts into one shard, and can lose at most.
        workers: Number of processes.
        cpus_per_worker, gpus_per_worker: Processors and GPUs that Ray gives each.
        ray_address: Address of a cluster ("auto": the one of this machine); a new one on this machine when not given.
        device, llm_dtype: Device and data type of each worker's LLM: `device` and `dtype` of
            `ExtensibleLM.from_pretrained`.
        show_progress: Show a bar; None shows it on a terminal.

    Raises:
        MissingExtraError: Ray is not installed.
        DocumentNotFoundError, ConfigError: The input is missing, of a type that is not read, or lacks the column.
            ConfigError too where a batch lost its worker each time.
        DocumentError: Its rows cannot be read.
        StoreError: The output holds something else, or cannot be written to.
    """
    whole_number(rows_per_batch, "rows_per_batch")
    whole_number(workers, "workers")
    done = finished(output)  # first, so that an output folder that holds the inputs is refused with the clearer error
    kind, files = _inputs([inputs] if isinstance(inputs, str | os.PathLike) else list(inputs), output)
    with _cluster(ray_address) as data, warnings.catch_warnings():
        from ray.exceptions import OutOfMemoryError, RayActorError
        from ray.util.annotations import RayDeprecationWarning

        warnings.simplefilter("ignore", RayDeprecationWarning)  # for max_task_retries, which has no replacement yet

        start = time.perf_counter()
        read = data.read_parquet if kind == PARQUET else partial(data.read_json, read_options=_json_options())
        # Reading reserves no processor, so that there can be as many workers as processors.
        results = read(files, num_cpus=0).map_batches(
            _RayWorker,
            fn_constructor_args=[CompressWorker, StorageLocation(output).absolute()],
            fn_constructor_kwargs={
                "llm": _absolute(llm),
                "embedder": None if embedder is None else _absolute(embedder),
                "ratio": ratio,
                "dtype": dtype,
                "passage_tokens": passage_tokens,
                "column": column,
                "device": device,
                "llm_dtype": llm_dtype,
                "done": done,
            },
            batch_size=rows_per_batch,
            batch_format="numpy",
            compute=data.ActorPoolStrategy(size=workers),
            num_cpus=cpus_per_worker,
            num_gpus=gpus_per_worker,
            max_task_retries=_RETRIES,
        )
        total = Batch()
        written: set[str] = set()
        with progress("compress", None, show_progress) as advance, _readable(files, column):
            try:
                for row in results.iter_rows():
                    if error := row.pop(_ERROR):
                        raise _error_of(error)
                    written.add(row.pop(SHARD))
                    batch = Batch(**{name: int(value) for name, value in row.items()})
                    total += batch
                    advance(batch.n_rows)
            except (RayActorError, OutOfMemoryError) as error:
                raise ConfigError(
                    f"a batch of rows_per_batch={rows_per_batch} lost its worker {_RETRIES + 1} times; what was done "
                    "is kept, call again with fewer rows_per_batch or more memory for each worker"
                ) from error
        return Compression(batch=total, shards=tuple(seal(output, written)), seconds=time.perf_counter() - start)


class _RayWorker:
    """Runs a `CompressWorker` and returns its errors: Ray hides errors, and restarts actors that fail to start."""

    def __init__(self, worker: Any, *args: Any, **kwargs: Any) -> None:
        self._failed: ExtembError | None = None
        try:
            self._worker = worker(*args, **kwargs)
        except ExtembError as error:
            self._failed = error

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        try:
            if self._failed is not None:
                raise self._failed
            return {**self._worker(rows), _ERROR: [""]}
        except ExtembError as error:
            what = json.dumps([type(error).__name__, str(error)])
            return {**{name: [0] for name in asdict(Batch())}, SHARD: [""], _ERROR: [what]}


def _error_of(text: str) -> ExtembError:
    """Recreate an error from the type and message that a worker sent."""
    name, message = json.loads(text)
    kind: type[ExtembError] = getattr(errors, name, ExtembError)
    return kind.__new__(kind, message)  # bypasses __init__, which may need other arguments


def _inputs(
    inputs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> tuple[tuple[str, ...], list[str]]:
    """Return the kind of the files to read, and the files; URLs stay as they are, files in the output are left out."""
    files: list[str] = []
    made = None if is_url(output) else path_of(output).resolve()
    for one in inputs:
        path = path_of(one)
        if is_url(one):
            files.append(str(one))
        elif path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if file.name.endswith((*PARQUET, *ROWS))]
            files += [str(file) for file in found if made is None or not file.resolve().is_relative_to(made)]
        elif path.is_file():
            files.append(str(path.resolve()))
        else:
            raise DocumentNotFoundError(f"{one} does not exist; pass files or folders of Parquet or JSON Lines")
    for kind in (PARQUET, ROWS):
        if files and all(file.rstrip("/").endswith(kind) for file in files):
            return kind, files
    raise ConfigError(
        f"inputs={', '.join(map(str, inputs)) or '[]'} are not all Parquet ({PARQUET[0]}) or all JSON Lines "
        f"({', '.join(ROWS)}); pass one kind at a time"
    )


@contextmanager
def _readable(files: Sequence[str], column: str) -> Iterator[None]:
    """Name the file and line that Ray could not read, if the files are on this machine."""
    try:
        yield
    except ExtembError:
        raise
    except ValueError as error:  # from JSON or Arrow, as the cause of a Ray task's error
        for file in map(Path, files):
            if is_jsonl(file) and file.is_file():
                for number, row in read_jsonl(file):
                    if not isinstance(value := row.get(column), str | None):
                        raise DocumentError(
                            f"{file}, line {number}: {column!r} is {value!r:.80}, and text in other rows, which Ray "
                            "does not read; fix or remove it"
                        ) from error
        why = str(getattr(error, "cause", error)).strip().splitlines()[-1:] or [type(error).__name__]
        shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        raise DocumentError(f"the rows of {shown} cannot be read ({why[0]}); fix or remove them") from error


def _json_options() -> Any:
    """Return options that read rows of any likely size: Ray's defaults fail at rows larger than a block."""
    from pyarrow.json import ReadOptions

    return ReadOptions(use_threads=False, block_size=_MAX_ROW_BYTES)


def _absolute(where: str | os.PathLike[str]) -> str:
    """Make a model's folder absolute, for processes with another working directory; names stay as they are."""
    return str(Path(where).absolute()) if Path(where).is_dir() else name_or_path(where)


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Connect to a Ray cluster and yield Ray Data, with our settings while it is used."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics unless the caller wants them
    data = optional_import("ray.data", "ray", "compressing a corpus", package="ray")
    import ray

    with ExitStack() as undo:
        if not ray.is_initialized():
            try:
                ray.init(address=address or "local", log_to_driver=False, configure_logging=False)
            except ConnectionError as error:
                raise ConfigError(
                    f"ray_address={address!r} is not a running cluster ({error}); start one with: ray start --head, "
                    "or, where it asks for a token, set RAY_AUTH_MODE=token"
                ) from error
            undo.callback(ray.shutdown)
        context = data.DataContext.get_current()
        for name, value in _CONTEXT.items():
            undo.callback(setattr, context, name, getattr(context, name))
            setattr(context, name, value)
        yield data

"""Training bundles: everything a training needs, for a machine without a network and without this package.

`pack` writes a folder of slices (see `slices.py`) that hold the LLM's weights, tokenised text, questions, the recipe,
the package's code and this folder's, beside `run.py`, which unpacks and trains with torch, transformers, peft and
safetensors alone. `run` trains within a time limit and leaves slices of what is needed to go on and to use the result.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import extemb_core
from benchmarks.offline_training.slices import SliceError, join_slices, parse_size, write_slices
from extemb_core.errors import ConfigError, DocumentError
from extemb_core.models.llm import LLM
from extemb_core.questions import read_questions
from extemb_core.training.checkpoints import COMPLETE, OPTIMIZER, is_finished, last_checkpoint
from extemb_core.training.config import TrainingConfig
from extemb_core.training.data import TokenFile
from extemb_core.training.recipes import Recipe, stage_configs, train_recipe

_PACKAGE = Path(extemb_core.__file__).resolve().parent
_HERE = Path(__file__).resolve().parent
_BESIDE_THE_SLICES = ("run.py", "slices.py")
_NOT_PACKED = ("pretrained", "__pycache__")
_SETTINGS = "bundle.json"
_MAX_FILES = 8


def pack(
    recipe: Recipe,
    output: str | Path,
    *,
    llm: str,
    total_tokens: int,
    data: Sequence[str | Path] = (),
    questions: Sequence[str | Path] = (),
    start_from: str | Path | None = None,
    max_tokens: int | None = None,
    max_questions: int | None = None,
    slice_size: str = "60MiB",
    dtype: str = "bfloat16",
    show_progress: bool | None = None,
    **settings: Any,
) -> list[Path]:
    """Write a bundle.

    Args:
        recipe: The recipe.
        output: The bundle's folder; it must not exist.
        llm: Name, path or hub id of the LLM.
        total_tokens: Tokens of all stages together.
        data: Text files; their documents are shuffled, so that a part of them is a fair sample.
        questions: Question files.
        start_from: An embedder to start from.
        max_tokens: Tokens of text in the bundle; all when not given.
        max_questions: Questions in the bundle, drawn from all.
        slice_size: Maximum size of each file, such as "60MiB".
        dtype: Data type of the weights in the bundle, in which the LLM runs.
        show_progress: Show a bar; None shows it on a terminal.
        **settings: Fields of `TrainingConfig` that override the recipe's.

    Returns:
        The slices.
    """
    out = Path(output)
    size = _bytes(slice_size)
    if out.exists():
        raise ConfigError(f"output={str(output)!r} exists; pass another folder, or remove it")
    bundled: dict[str, Any] = {
        "llm": "llm",
        "data": ("tokens",) if data else (),
        "questions": ("questions.jsonl",) if questions else (),
        "dtype": dtype,
        **settings,
    }
    if start_from is not None:
        bundled["start_from"] = "start"
    stage_configs(recipe, "run", total_tokens, **bundled)  # illegal settings fail now, not on the other machine
    out.parent.mkdir(parents=True, exist_ok=True)
    work, partial = out.with_name(f".{out.name}.content"), out.with_name(f".{out.name}.partial")
    for folder in (work, partial):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    try:
        model = LLM.from_pretrained(llm, device="cpu", dtype=dtype)
        model.model.save_pretrained(work / "llm")
        model.tokenizer.save_pretrained(work / "llm")
        if data:
            tokens = TokenFile.build([Path(f) for f in data], model, work / "cache", show_progress=show_progress)
            shuffled_subset(tokens, work / "tokens", max_tokens, seed=int(settings.get("seed", 0)))
            shutil.rmtree(work / "cache")
        if questions:
            _write_questions(questions, work / "questions.jsonl", max_questions, int(settings.get("seed", 0)))
        if start_from is not None:
            _copy_start(Path(start_from), work / "start")
        _copy_code(work / "package")
        (work / _SETTINGS).write_text(
            json.dumps({"recipe": asdict(recipe), "total_tokens": total_tokens, "settings": bundled}, indent=1),
            encoding="utf-8",
        )
        write_slices(work, (file for file in work.rglob("*") if file.is_file()), partial, size)
        for name in _BESIDE_THE_SLICES:
            shutil.copy(_HERE / name, partial / name)
        partial.rename(out)
    finally:
        for folder in (work, partial):
            shutil.rmtree(folder, ignore_errors=True)
    return sorted(out.glob("slice-*"))


def unpack(folder: str | Path, output: str | Path) -> None:
    """Verify the slices in a folder, a bundle's or those that `run` left, and join them.

    Raises:
        DocumentError: A slice is missing or damaged, or `output` exists.
    """
    try:
        join_slices(Path(folder), Path(output))
    except SliceError as error:
        raise DocumentError(str(error)) from error


def run(
    bundle: str | Path,
    output: str | Path,
    *,
    work: str | Path | None = None,
    max_minutes: float | None = None,
    checkpoint_size_limit: str = "15MiB",
    resume_from: str | Path | None = None,
) -> bool:
    """Verify and unpack a bundle and train, as its `run.py` does; see `run_unpacked`."""
    folder = Path(work) if work is not None else Path(bundle) / "unpacked"
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    if not folder.exists():
        unpack(bundle, folder)
    return run_unpacked(
        folder, output, deadline=deadline, checkpoint_size_limit=checkpoint_size_limit, resume_from=resume_from
    )


def run_unpacked(
    work: str | Path,
    output: str | Path,
    *,
    deadline: float | None = None,
    checkpoint_size_limit: str = "15MiB",
    resume_from: str | Path | None = None,
) -> bool:
    """Train in an unpacked bundle and leave slices in `output`.

    Args:
        work: The unpacked bundle.
        output: Folder for slices of what is needed to go on and to use the result.
        deadline: Stop cleanly at this reading of `time.monotonic()`, in seconds.
        checkpoint_size_limit: Maximum size of each file in `output`.
        resume_from: Slices that an earlier call left; not needed if `work` is as that call left it.

    Returns:
        Whether the training is finished.
    """
    size = _bytes(checkpoint_size_limit)
    out, earlier = Path(output).resolve(), Path(resume_from).resolve() if resume_from is not None else None
    with _inside(Path(work)):
        bundle = json.loads(Path(_SETTINGS).read_text(encoding="utf-8"))
        recipe = Recipe(**(bundle["recipe"] | {"stages": tuple(bundle["recipe"]["stages"])}))
        settings: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in bundle["settings"].items()
        }
        if earlier is not None and not Path("run").exists():
            unpack(earlier, "run")
        max_minutes = None if deadline is None else max(1e-6, (deadline - time.monotonic()) / 60)
        trained = train_recipe(recipe, "run", bundle["total_tokens"], max_minutes=max_minutes, resume=True, **settings)
        configs = stage_configs(recipe, "run", bundle["total_tokens"], **settings)
        written = write_slices(Path("run"), _needed_files(configs, Path("run")), out, size, prefix="state")
        if len(written) > _MAX_FILES - 1:  # the manifest is one more
            print(f"warning: {len(written) + 1} files were left; a larger --checkpoint-size-limit makes fewer")
    return trained is not None


def shuffled_subset(source: TokenFile, folder: Path, max_tokens: int | None, seed: int) -> None:
    """Write some of the documents, in random order, as a folder of tokens: any beginning of it is a fair sample.

    Args:
        source: Tokens of the documents.
        folder: Folder for the result.
        max_tokens: Maximum number of tokens, for which the last document is cut; None takes all.
        seed: Random seed of the order.
    """
    folder.mkdir(parents=True)
    left = source.n_tokens if max_tokens is None else max_tokens
    offsets = [0]
    with (folder / "tokens.bin").open("wb") as out:
        for at in np.random.default_rng(seed).permutation(len(source)):
            ids = source.tokens[source.offsets[at] : source.offsets[at + 1]][: left - offsets[-1]]
            if not len(ids):
                continue
            out.write(ids.tobytes())
            offsets.append(offsets[-1] + len(ids))
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
    meta = source.meta | {"documents": len(offsets) - 1, "tokens": offsets[-1]}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _bytes(text: str) -> int:
    try:
        return parse_size(text)
    except SliceError as error:
        raise ConfigError(str(error)) from error


def _copy_code(out: Path) -> None:
    """Copy the package and this folder, so that both can be imported there as they are here."""
    without = shutil.ignore_patterns(*_NOT_PACKED)
    shutil.copytree(_PACKAGE, out / _PACKAGE.name, ignore=without)
    shutil.copytree(_HERE, out / _HERE.parent.name / _HERE.name, ignore=without)
    shutil.copy(_HERE.parent / "__init__.py", out / _HERE.parent.name)


def _copy_start(folder: Path, out: Path) -> None:
    """Copy the result of an earlier run, and the optimiser's last state from its checkpoints."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("checkpoint-*", "stages", "data"))
    last = last_checkpoint(folder)
    if last is not None and (last / OPTIMIZER).is_file():
        (out / last.name).mkdir()
        for name in (COMPLETE, OPTIMIZER):
            shutil.copy(last / name, out / last.name / name)


def _needed_files(configs: Sequence[TrainingConfig], run_folder: Path) -> list[Path]:
    """List the files that a training leaves, without its data, logs for programs, and checkpoints no longer needed.

    The last stage's tensors are needed by a call that finds that stage finished.
    """
    files = []
    finished = {Path(config.output) for config in configs if is_finished(config)}
    last = {last_checkpoint(Path(config.output)) for config in configs}
    for file in filter(Path.is_file, run_folder.rglob("*")):
        checkpoint = next((parent for parent in file.parents if parent.name.startswith("checkpoint-")), None)
        if checkpoint is not None:
            ends = checkpoint.parent == Path(configs[-1].output) and file.name != OPTIMIZER
            needed = checkpoint in last and (checkpoint.parent not in finished or file.name == COMPLETE or ends)
        else:
            needed = not {"data", "tensorboard"} & set(file.relative_to(run_folder).parts)
        if needed:
            files.append(file)
    return files


def _write_questions(files: Sequence[str | Path], out: Path, limit: int | None, seed: int) -> None:
    rows = read_questions(files, unique=False)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])
    with out.open("w", encoding="utf-8") as stream:
        for at in chosen:
            row = rows[int(at)]
            values = {"id": row.id, "context": row.context, "question": row.question, "answers": list(row.answers)}
            stream.write(json.dumps(values, ensure_ascii=False) + "\n")


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder, so that the paths in its settings hold wherever it lies."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)

"""Checkpoints of a run: which are whole, to which run they belong, and how far it had come."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from extemb_core.errors import MismatchError, TrainingError
from extemb_core.training.config import TrainingConfig
from extemb_core.utils.files import atomic_write_text, fsync, parse_json

COMPLETE, OPTIMIZER = "complete.json", "optimizer.safetensors"
# Settings that a checkpoint's tensors depend on; others may change when a run resumes, and the log says so.
_FIXED = ("llm", "embedder", "trained", "reader_rank", "reader_first_layer", "start_from")


def last_checkpoint(output: Path) -> Path | None:
    """Find the last whole checkpoint in a folder, whichever run it belongs to."""
    whole = [folder for folder in checkpoints_in(output) if (folder / COMPLETE).is_file()]
    return max(whole, key=step_of, default=None)


def checkpoint_of(config: TrainingConfig) -> Path | None:
    """Find the last whole checkpoint of a run; raise `TrainingError` if it is another run's."""
    output = Path(config.output)
    last = last_checkpoint(output)
    if last is None:
        return None
    changed = changed_settings(last, config)
    other = next((name for name in changed if name in _FIXED), None)
    if other is not None:
        before, now = changed[other]
        raise TrainingError(
            f"{output} holds checkpoints of a run with another {other} ({before!r}, now {now!r}); use another output "
            "folder, or train without resuming"
        )
    return last


def is_finished(config: TrainingConfig) -> bool:
    """Return whether the run's last checkpoint has seen all of its tokens."""
    checkpoint = checkpoint_of(config)
    return checkpoint is not None and tokens_of(checkpoint, config) >= config.total_tokens


def checkpoint_to_resume(stages: Sequence[TrainingConfig]) -> Path | None:
    """Find the checkpoint that a resumed call begins with: the last whole one up to the first unfinished stage.

    None if checkpoints of another run are in the way.
    """
    last = None
    try:
        for config in stages:
            last = checkpoint_of(config) or last
            if not is_finished(config):
                break
    except TrainingError:
        return None
    return last


def is_saved(config: TrainingConfig) -> bool:
    """Return whether the run is finished, and its folder holds what its last checkpoint does.

    A checkpoint without tensors, as earlier versions carried it to another machine, has nothing more to save there.
    """
    checkpoint = checkpoint_of(config)
    if checkpoint is None or not is_finished(config):
        return False
    return "saved" in _mark_of(checkpoint) or not any(checkpoint.rglob("*.safetensors"))


@contextmanager
def named_if_damaged(checkpoint: Path) -> Iterator[None]:
    """Turn the error of a missing or damaged checkpoint file into one that says how the run goes on without it.

    Raises:
        TrainingError: A file of the checkpoint is missing or damaged.
    """
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, MismatchError):  # the LLM is another
            raise
        what = str(error).split("; ")[0]  # without its remedy, which is for downloaded weights
        earlier = any((one / COMPLETE).is_file() for one in checkpoints_in(checkpoint.parent) if one != checkpoint)
        then = "goes on from the one before" if earlier else "begins anew"
        raise TrainingError(f"{checkpoint} is damaged ({what}); remove it, and the run {then}") from error


def checkpoints_in(output: Path) -> list[Path]:
    """List a run's checkpoints, whole or not; a folder with another name, such as a copy, is not one."""
    return [folder for folder in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", folder.name)]


def mark_complete(folder: Path, tokens: int, config: TrainingConfig, outdated: Sequence[Path] = ()) -> None:
    """Mark a checkpoint as whole, after flushing it to disk, and discard those in outdated folders."""
    for file in filter(Path.is_file, folder.rglob("*")):
        fsync(file)
    discard_checkpoints(*outdated)
    mark = {"step": step_of(folder), "tokens": tokens, "config": _settings(config)}
    atomic_write_text(folder / COMPLETE, json.dumps(mark, indent=2))


def mark_saved(checkpoint: Path) -> None:
    """Note that the run's folder holds the result of this checkpoint, so that another run can start from it."""
    atomic_write_text(checkpoint / COMPLETE, json.dumps(_mark_of(checkpoint) | {"saved": True}, indent=2))


def remove_incomplete(output: Path) -> None:
    """Remove incomplete and discarded checkpoints, which would otherwise displace whole ones."""
    for folder in checkpoints_in(output):
        if not (folder / COMPLETE).is_file():
            shutil.rmtree(folder)


def discard_checkpoints(*outputs: Path) -> None:
    """Discard the checkpoints in these folders: no run resumes from them."""
    for output in outputs:
        for folder in checkpoints_in(output):
            (folder / COMPLETE).unlink(missing_ok=True)


def step_of(checkpoint: Path) -> int:
    """Read a checkpoint's step from its name."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def tokens_of(checkpoint: Path, config: TrainingConfig) -> int:
    """Return how many tokens a checkpoint has seen; earlier versions noted none, and had steps of constant size."""
    mark = _mark_of(checkpoint)
    if "tokens" in mark:
        return int(mark["tokens"])
    sizes = ("batch_size", "accumulation_steps", "sample_length")
    before = {name: value for name, value in _config_of(checkpoint).items() if name in sizes}
    return step_of(checkpoint) * replace(config, **before).tokens_per_step


def _mark_of(checkpoint: Path) -> dict[str, Any]:
    """Read the mark that makes a checkpoint whole."""
    try:
        return dict(parse_json((checkpoint / COMPLETE).read_bytes()))
    except (ValueError, TypeError) as error:
        raise TrainingError(
            f"{checkpoint / COMPLETE} is damaged ({error}); remove {checkpoint}, and train again"
        ) from error


def changed_settings(checkpoint: Path, config: TrainingConfig) -> dict[str, tuple[Any, Any]]:
    """Compare the settings with those that a checkpoint was made with: changed name -> (then, now).

    A setting that the checkpoint's version did not know had its default. Paths are equal if they lead to the same
    folder, also if a recipe's folder, with its stages side by side, was moved.
    """
    defaults = _settings(TrainingConfig(llm="", data=("",), output=""))
    before = defaults | {"data": [], "llm": ""} | _config_of(checkpoint)
    changed = {name: (before[name], now) for name, now in _settings(config).items() if before[name] != now}
    for name in changed.keys() & {"llm", "start_from", "output"}:
        if None not in changed[name] and _same_place(*changed[name], before["output"], config.output):
            del changed[name]
    return changed


def _same_place(then: str, now: str, output_then: str, output_now: str) -> bool:
    """Return whether two paths are one, or lead to one place beside a run's folder before and after that was moved."""
    one, other, beside_then, beside_now = (
        Path(os.path.abspath(path)) for path in (then, now, Path(output_then).parent, Path(output_now).parent)
    )
    if one == other:
        return True
    inside = one.is_relative_to(beside_then) and other.is_relative_to(beside_now)
    return inside and one.relative_to(beside_then) == other.relative_to(beside_now)


def _settings(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings of a run as they are after a round trip through JSON."""
    return dict(json.loads(json.dumps(asdict(config))))


def _config_of(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's settings from its mark, or, for the first versions, from the run's file."""
    for file in (checkpoint / COMPLETE, checkpoint.parent / "training.json"):
        try:
            values = parse_json(file.read_text(encoding="utf-8"))
            config = values["config"] if file.name == COMPLETE else values
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(config, dict):
            return config
    raise TrainingError(f"{checkpoint} does not say what run it is of; use another output folder, or remove it")

"""Train in several processes on one device, for a GPU that is faster than one process can launch its work.

    python -m benchmarks.offline_training.one_device settings.json --processes 6 --minutes 8
    python -m benchmarks.offline_training.one_device short.json long.json --processes 4 2 --minutes 8

`settings.json` holds the fields of `TrainingConfig`. Each process takes batches of its own, and all take one step by
the mean of their gradients, as several GPUs would. Some may read other data than others, such as longer texts: each
file of settings has processes of its own, and may differ from the first in what is read, but not in what is trained.
Nothing is resumed: the result is left in `output` every `save_steps`, and when the steps or the minutes are over; the
rate falls to 0 over the last part of the steps or minutes, whichever end first. The log is `log.jsonl` there; losses of
further files have their number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException
from torch.utils.data import DataLoader

from benchmarks.ending import run as run_script
from extemb_core.errors import ConfigError, ExtembError, TrainingError
from extemb_core.models.llm import LLM, choose_device
from extemb_core.training.attention import training_attention
from extemb_core.training.batches import Collator, drawn_from, plan_batches
from extemb_core.training.config import OBJECTIVES, TrainingConfig
from extemb_core.training.run_trainer import learning_rate_factor, make_optimizer
from extemb_core.training.trainable import starting_point
from extemb_core.utils.files import parse_json

# Settings in which a file may differ from the first.
_READ = {"data", "questions", "cache", "objectives", "most_per_source", "raw_share", "mixed_share", "focus_share",
         "most_distractors", "sample_length", "spans", "chunk_sizes", "ratios", "ratios_per_sample", "batch_size",
         "seed", "total_tokens"}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, nargs="+", help="JSON files with the fields of TrainingConfig")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[2], metavar="N", help="of each file, on one device"
    )
    parser.add_argument("--minutes", type=float, metavar="X", help="of training; else all steps are taken")
    parser.add_argument(
        "--decay", type=float, default=0.4, metavar="X", help="last part of it, in which the rate falls"
    )
    options = parser.parse_args(argv)
    configs = [_config(file) for file in options.settings]
    if len(configs) != len(options.processes) or min(options.processes) < 1:
        raise ConfigError(
            f"--processes {' '.join(map(str, options.processes))} came with {len(configs)} files of settings; pass a "
            "number from 1 for each of them"
        )
    for file, config in zip(options.settings, configs, strict=True):
        for name in (field.name for field in fields(config) if field.name not in _READ):
            if getattr(config, name) != getattr(configs[0], name):
                raise ConfigError(
                    f"{file} has {name}={getattr(config, name)!r} and {options.settings[0]} has "
                    f"{getattr(configs[0], name)!r}; what is trained, and how, is the same in all"
                )
    mine = [number for number, count in enumerate(options.processes) for _ in range(count)]
    Path(configs[0].output).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
                _told, (configs, mine, options.minutes, options.decay, folder), nprocs=len(mine)
            )
        except ProcessException as error:
            # Report the first that failed: the others may have failed only because it was missing.
            told = min(Path(folder).glob("error-*"), key=lambda file: file.stat().st_mtime_ns, default=None)
            if told is None:
                raise
            raise pickle.loads(told.read_bytes()) from error
    print(configs[0].output)


def _config(file: Path) -> TrainingConfig:
    try:
        values: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
        settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return TrainingConfig(**settings)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} does not hold a training's settings ({error}); fix it") from error


def _told(rank: int, *settings: Any) -> None:
    """Train as one of the processes, and leave errors of this library where the first process finds them."""
    try:
        _train(rank, *settings)
    except ExtembError as error:
        (Path(settings[-1]) / f"error-{rank}").write_bytes(pickle.dumps(error))
        raise


def _train(
    rank: int,
    configs: Sequence[TrainingConfig],
    of_each: Sequence[int],
    minutes: float | None,
    decay: float,
    folder: str,
) -> None:
    """Train as one of the processes; `of_each` has the number of each one's settings."""
    per_step = sum(configs[number].batch_size * configs[number].sample_length for number in of_each)
    steps = math.ceil(configs[0].total_tokens / per_step)
    number = of_each[rank]
    alike = [other for other, its in enumerate(of_each) if its == number]
    os.environ["WORLD_SIZE"] = str(len(alike))  # `TrainingConfig` counts tokens and steps by it
    config = replace(configs[number], total_tokens=steps * configs[number].tokens_per_step)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=len(of_each))
    device = choose_device(config.device)
    model = starting_point(config, LLM.from_pretrained(config.llm, device=str(device), dtype=config.dtype))
    if model.embedder is None:
        raise ConfigError(f"trained={config.trained!r} without an embedder reads no embeddings; use extemb train")
    ratios, chunk_sizes = drawn_from(config, model.embedder.config)
    size = config.batch_size
    first = [(at * len(alike) + alike.index(rank)) * size for at in range(steps)]
    batches: Any = plan_batches(config, model.llm, min(ratios), chunk_sizes)
    loader: DataLoader[Any] = DataLoader(
        batches,
        batch_sampler=[list(range(at, at + size)) for at in first],
        collate_fn=Collator(ratios, chunk_sizes, config.seed, config.ratios_per_sample),
        num_workers=config.dataloader_num_workers,
    )
    parameters = model.trainable()
    optimizer = make_optimizer(parameters, config.learning_rate, config.connector_lr_factor, config.weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    names = ["loss"]  # the same in every process and in the same order, as their sums are added up
    for at, other in enumerate(configs):
        ratios_of_it, _ = drawn_from(other, model.embedder.config)
        names += [_loss(part, at) for part in (*OBJECTIVES, *(f"ratio_{ratio}" for ratio in sorted(set(ratios_of_it))))]
    log = _Log(Path(config.output) / "log.jsonl" if rank == 0 else None, names, per_step)
    model.train(True)
    start = time.monotonic()
    with training_attention(*model.transformers()):
        for step, inputs in enumerate(loader):
            gone = torch.tensor([time.monotonic() - start])
            dist.broadcast(gone, 0)  # one that stopped by its own clock would leave the others waiting
            passed = max(step / steps, float(gone) / (60 * minutes) if minutes else 0)
            if passed >= 1:
                break
            rising = learning_rate_factor(step, last=steps, warmup_steps=config.warmup_steps, decay_steps=0)
            falling = learning_rate_factor(passed, last=1, warmup_steps=0, decay_steps=decay)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * min(rising, falling)
            objective = inputs.pop("objective")
            with torch.autocast(device.type, torch.bfloat16, enabled=model.llm.dtype == torch.bfloat16):
                output = model(**inputs)
            output["loss"].backward()
            norm = _average_gradients(list(parameters.values()), config.max_grad_norm)
            if not torch.isfinite(norm):
                raise TrainingError(f"the gradients became {float(norm)} at step {step}; begin with a lower rate")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            parts = {objective: output["loss"]} | {f"ratio_{ratio}": loss for ratio, loss in output["by_ratio"].items()}
            log.add({"loss": output["loss"]} | {_loss(part, number): loss for part, loss in parts.items()})
            if (step + 1) % config.logging_steps == 0:
                log.write(step + 1, optimizer.param_groups[0]["lr"])
            if rank == 0 and (step + 1) % config.save_steps == 0:
                model.save(Path(config.output))
    if rank == 0:
        model.train(False)
        model.save(Path(config.output))
    dist.barrier()
    dist.destroy_process_group()


def _loss(part: str, number: int) -> str:
    """Return the name in the log of the loss of an objective or a ratio, for the settings with this number."""
    return f"loss_{part}" if not number else f"loss_{part}_{number + 1}"


def _average_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> Tensor:
    """Average the gradients over the processes, and clip them. Returns their norm before clipping."""
    device = parameters[0].device
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).cpu()
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    norm: Tensor = flat.norm()
    flat = (flat * min(1.0, max_norm / (float(norm) + 1e-6))).to(device)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return norm


class _Log:
    """Mean losses over all processes since the last row."""

    def __init__(self, file: Path | None, names: Sequence[str], tokens_per_step: int) -> None:
        self._sums = {name: torch.zeros(2, dtype=torch.float64) for name in names}
        self._file = file
        self._per_step = tokens_per_step
        self._last = time.monotonic(), 0

    def add(self, losses: Mapping[str, Tensor]) -> None:
        for name, loss in losses.items():
            self._sums[name] += torch.tensor([float(loss.detach()), 1.0])

    def write(self, step: int, learning_rate: float) -> None:
        sums = torch.stack([*self._sums.values()])
        dist.all_reduce(sums)
        now, (before, last) = time.monotonic(), self._last
        means = {
            name: round(total / count, 4)
            for name, (total, count) in zip(self._sums, sums.tolist(), strict=True)
            if count
        }
        speed = round((step - last) * self._per_step / (now - before), 1)
        row = {
            "step": step,
            "tokens": step * self._per_step,
            "learning_rate": learning_rate,
            "tokens_per_second": speed,
        }
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row | means) + "\n")
        for total in self._sums.values():
            total.zero_()
        self._last = now, step


if __name__ == "__main__":
    run_script(main)

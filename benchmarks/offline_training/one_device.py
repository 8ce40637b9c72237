"""Train in several processes on one device, for a GPU that waits for a single process to launch its work.

    python -m benchmarks.offline_training.one_device settings.json --processes 6 --minutes 8

`settings.json` holds the fields of `TrainingConfig`. Each process takes batches of its own, and all take one step by
the mean of their gradients, as several GPUs would. Nothing is resumed: what was trained is left in `output` when the
steps or the minutes are over, and the rate falls to 0 over the last part of whichever ends first. The log is
`log.jsonl` there.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.ending import run as run_script
from extemb_core.errors import ConfigError, TrainingError
from extemb_core.models.llm import LLM, choose_device
from extemb_core.training.attention import training_attention
from extemb_core.training.batches import Collator
from extemb_core.training.config import TrainingConfig
from extemb_core.training.trainer import drawn_from, learning_rate_factor, make_optimizer, plan_batches, starting_point
from extemb_core.utils.files import parse_json


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="JSON file with the fields of TrainingConfig")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="on the one device")
    parser.add_argument("--minutes", type=float, metavar="X", help="of training; else all steps are taken")
    parser.add_argument("--decay", type=float, default=0.4, metavar="X", help="share of the run that the rate falls in")
    options = parser.parse_args(argv)
    try:
        values: dict[str, Any] = parse_json(options.settings.read_text(encoding="utf-8"))
        settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        config = TrainingConfig(**settings)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{options.settings} does not hold a training's settings ({error}); mend it") from error
    Path(config.output).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
            _train, (config, options.processes, options.minutes, options.decay, folder), nprocs=options.processes
        )
    print(config.output)


def _train(rank: int, config: TrainingConfig, processes: int, minutes: float | None, decay: float, folder: str) -> None:
    os.environ["WORLD_SIZE"] = str(processes)  # by which `TrainingConfig` counts tokens and steps
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=processes)
    device = choose_device(config.device)
    model = starting_point(config, LLM.from_pretrained(config.llm, device=str(device), dtype=config.dtype))
    if model.embedder is None:
        raise ConfigError(f"trained={config.trained!r} without an embedder reads no embeddings; use extemb train")
    ratios, chunk_sizes = drawn_from(config, model.embedder.config)
    steps, size = config.max_steps, config.batch_size
    mine = [range((at * processes + rank) * size, (at * processes + rank + 1) * size) for at in range(steps)]
    batches: Any = plan_batches(config, model.llm, min(ratios), chunk_sizes)
    loader: DataLoader[Any] = DataLoader(
        batches,
        batch_sampler=map(list, mine),
        collate_fn=Collator(ratios, chunk_sizes, config.seed, config.ratios_per_sample),
        num_workers=config.dataloader_num_workers,
    )
    parameters = model.trainable()
    optimizer = make_optimizer(parameters, config.learning_rate, config.connector_lr_factor, config.weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    log = _Log(Path(config.output) / "log.jsonl", config, ratios, rank)
    model.train(True)
    start = time.monotonic()
    with training_attention(*model.transformers()):
        for step, inputs in enumerate(loader):
            gone = torch.tensor([time.monotonic() - start])
            dist.broadcast(gone, 0)  # one that stops by its own clock leaves the others waiting
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
            losses = {"loss": output["loss"], f"loss_{objective}": output["loss"]}
            log.add(losses | {f"loss_ratio_{ratio}": loss for ratio, loss in output["by_ratio"].items()})
            if (step + 1) % config.logging_steps == 0:
                log.write(step + 1, optimizer.param_groups[0]["lr"])
    if rank == 0:
        model.train(False)
        model.save(Path(config.output))
    dist.barrier()
    dist.destroy_process_group()


def _average_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> Tensor:
    """Average the gradients over the processes, and clip them; returns their norm before."""
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

    def __init__(self, file: Path, config: TrainingConfig, ratios: Sequence[int], rank: int) -> None:
        objectives = sorted(name for name, share in config.objectives.items() if share)
        parts = [*objectives, *(f"ratio_{ratio}" for ratio in sorted(set(ratios)))]
        self._names = ["loss", *(f"loss_{name}" for name in parts)]
        self._sums = torch.zeros(len(self._names), 2, dtype=torch.float64)
        self._file, self._config, self._rank = file, config, rank
        self._last = time.monotonic(), 0

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, loss in losses.items():
            self._sums[self._names.index(name)] += torch.tensor([float(loss.detach()), 1.0])

    def write(self, step: int, learning_rate: float) -> None:
        dist.all_reduce(self._sums)
        now, (before, last) = time.monotonic(), self._last
        per_step = self._config.tokens_per_step
        pairs = zip(self._names, self._sums.tolist(), strict=True)
        means = {name: round(total / count, 4) for name, (total, count) in pairs if count}
        speed = round((step - last) * per_step / (now - before), 1)
        row = {"step": step, "tokens": step * per_step, "learning_rate": learning_rate, "tokens_per_second": speed}
        if self._rank == 0:
            with self._file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row | means) + "\n")
        self._sums.zero_()
        self._last = now, step


if __name__ == "__main__":
    run_script(main)

"""What a training run left in its folder."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file


def log_of(config):
    return [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]


def losses(config):
    return {row["step"]: row["loss"] for row in log_of(config) if "loss" in row}


def rates(config):
    return [row["learning_rate"] for row in log_of(config) if "loss" in row]


def tensors(config):
    return load_file(Path(config.output) / "model.safetensors")


def reader_tensors(config):
    return load_file(Path(config.output) / "reader" / "adapter_model.safetensors")

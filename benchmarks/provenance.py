"""Where a number comes from: versions, hardware in words, git revision and the command that made it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from extemb_core.errors import ExtembError

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


def provenance(argv: list[str]) -> dict[str, Any]:
    """Everything about this run that is not its settings. `argv` is sys.argv; paths in it become file names."""
    import torch

    return {
        "command": shlex.join(["python", *(_without_folders(argument) for argument in argv)]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "git": git_revision(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
        "hardware": {
            "cpu": cpu_name(),
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": _memory_gib(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": f"{platform.system()} {platform.machine()}",
            "load_before": round(os.getloadavg()[0], 1),  # other work on the machine shows here
        },
    }


def git_revision() -> dict[str, Any]:
    """The commit, and whether files differ from it; None where there is no git."""
    revision = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=normal", "--", "extemb_core", "benchmarks/*.py")
    return {"revision": revision, "dirty": None if changed is None else bool(changed)}


def cpu_name() -> str:
    """The processor's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def short_name(name: str) -> str:
    """A model's name without the folders that lead to it."""
    return Path(name).name if Path(name).exists() else name


def write_json(report: dict[str, Any], file: Path) -> None:
    """Write a report, making its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def note(message: str) -> None:
    """Tell how far a run is, on stderr."""
    print(message, file=sys.stderr, flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a script; an error of ours is one line on stderr and exit status 2."""
    try:
        main()
    except ExtembError as error:
        note(f"error: {error}")
        sys.exit(2)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _without_folders(argument: str) -> str:
    option, equals, value = argument.rpartition("=")
    if os.sep not in value:
        return argument
    path = Path(value)
    inside = Path(os.path.abspath(path))
    return option + equals + (str(inside.relative_to(ROOT)) if inside.is_relative_to(ROOT) else path.name)


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)

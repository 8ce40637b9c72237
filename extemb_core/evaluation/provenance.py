"""Record the origin of a number: versions, hardware in words, git revision, and the command that made it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


def provenance(command: Sequence[str]) -> dict[str, Any]:
    """Collect everything about this run except its settings.

    Args:
        command: The words of the command line; paths outside the repository are reduced to the file's name.
    """
    import torch

    return {
        "command": shlex.join(_without_folders(word) for word in command),
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
            "load_before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,  # shows other work
        },
    }


def git_revision() -> dict[str, Any]:
    """Return the commit, and whether code differs from it; None if the package is not in a git checkout of its own."""
    if not (ROOT / "pyproject.toml").is_file():  # installed, perhaps inside somebody else's checkout
        return {"revision": None, "dirty": None}
    revision = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=normal", "--", "extemb_core", "benchmarks/*.py")
    return {"revision": revision, "dirty": None if changed is None else bool(changed)}


def cpu_name() -> str:
    """Return the processor's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _without_folders(word: str) -> str:
    word = os.fsencode(word).decode(errors="backslashreplace")  # a name may not be UTF-8, and a record must be
    option, equals, value = word.rpartition("=")
    if os.sep not in value:
        return word
    path = Path(value)
    inside = Path(os.path.abspath(path))
    return option + equals + (str(inside.relative_to(ROOT)) if inside.is_relative_to(ROOT) else path.name)


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)

"""Measure the size of the base install on disk: this package, its shipped weights, and its requirements."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from extemb_core.evaluation.provenance import ROOT

PACKAGE, INTEGRATIONS = ROOT / "extemb_core", ROOT / "integrations"  # what the wheel holds
MB = 1_000_000


def install_size() -> dict[str, Any]:
    """Return sizes in MB (10^6 bytes) of the files on disk, without byte code."""
    with_torch = closure(base_requirements())
    without = closure(base_requirements(), skip={"torch"})
    own = [file for top in (PACKAGE, INTEGRATIONS) for file in top.rglob("*") if file.is_file() and _counts(file)]
    weights = [file for file in own if file.is_relative_to(PACKAGE / "pretrained")]
    sizes = {name: distribution_bytes(name) / MB for name in with_torch}
    return {
        "what": "files on disk after installing the base package, without byte code; MB = 10^6 bytes",
        "extemb_code_mb": sum(file.stat().st_size for file in own if file not in weights) / MB,
        "extemb_weights_mb": sum(file.stat().st_size for file in weights) / MB,
        "dependencies_mb": sum(sizes[name] for name in without),
        "torch_mb": sum(sizes[name] for name in with_torch if name not in without),
        "torch_version": metadata.version("torch"),
        "n_dependencies": len(without),
        "by_distribution_mb": {name: round(sizes[name], 3) for name in sorted(sizes, key=lambda n: -sizes[n])},
        "installed_by_torch_alone": [name for name in with_torch if name not in without],
    }


def base_requirements() -> list[str]:
    """Return the requirements of the base package, from the installed distribution or else from pyproject.toml."""
    try:
        return metadata.requires("extemb") or []
    except metadata.PackageNotFoundError:
        toml = importlib.import_module("tomllib")  # Python 3.11
        found: list[str] = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
        return found


def closure(
    requirements: Iterable[str],
    skip: Iterable[str] = (),
    requires: Callable[[str], list[str] | None] = metadata.requires,
) -> list[str]:
    """Return the distributions that requirements need here, directly or not, without those in `skip` and their own."""
    found: dict[str, set[str]] = {}
    skipped = set(skip)
    waiting = [(requirement, "") for requirement in requirements]
    while waiting:
        line, extra = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        wanted = {"", *requirement.extras} - found.get(name, set())
        if name in skipped or (name in found and not wanted):
            continue
        try:
            needed = requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # needed by an extra or on another system only
        found.setdefault(name, set()).update(wanted)
        waiting += [(line, extra) for extra in wanted for line in needed]
    return sorted(found)


def distribution_bytes(name: str) -> int:
    """Return the bytes of the files that a distribution has installed."""
    paths = (Path(str(file.locate())) for file in metadata.files(name) or [])
    return sum(path.stat().st_size for path in paths if _counts(path) and path.is_file())


def _counts(path: Path) -> bool:
    return "__pycache__" not in path.parts and path.suffix != ".pyc"

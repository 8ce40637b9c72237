"""How a script ends: its report as JSON, or one line that says what is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from extemb_core.errors import ExtembError


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

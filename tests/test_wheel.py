"""What the wheel holds is decided, not left to happen: its files are those of wheel_files.txt."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["extemb_core", "integrations/langchain_extemb", "integrations/llama_index", "integrations/vllm_extemb"]


def wheel_files() -> set[str]:
    """List what a wheel built now would hold: hatch takes all files of the packages that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *PACKAGES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return {name.removeprefix("integrations/") for name in done.stdout.splitlines() if (ROOT / name).is_file()}


def test_the_packages_are_those_of_the_wheel() -> None:
    assert f"\npackages = {json.dumps(PACKAGES)}" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_no_file_gets_into_the_wheel_or_out_of_it_unseen() -> None:
    listed = (ROOT / "tests" / "wheel_files.txt").read_text(encoding="utf-8").splitlines()
    assert listed == sorted(set(listed))
    files = wheel_files()
    new, gone = sorted(files - set(listed)), sorted(set(listed) - files)
    assert (new, gone) == ([], []), "if users need it so, bring tests/wheel_files.txt up to date"

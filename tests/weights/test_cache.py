"""A folder in the cache is whole or not there, and damage to it is found, whatever is killed on the way."""

from __future__ import annotations

import os
import signal
import textwrap
from pathlib import Path

import pytest
from known_models import NAME, TINY, assert_one_sentence, fake_dequantise
from processes import Process

from extemb_core.errors import WeightsCorruptError, WeightsError
from extemb_core.weights import cache
from extemb_core.weights import resolve as weights
from extemb_core.weights.registry import KnownModel


def test_the_cache_is_where_the_environment_says(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXTEMB_HOME", str(tmp_path / "elsewhere"))
    assert weights.get(NAME) == tmp_path / "elsewhere" / "models" / NAME
    monkeypatch.delenv("EXTEMB_HOME")
    assert cache.cache_root().name == "extemb"


def test_a_folder_of_an_older_conversion_is_made_anew(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = weights.get(NAME)
    (folder / "left-over").touch()
    monkeypatch.setattr(cache, "CONVERSION_VERSION", 99)
    assert weights.resolve_llm(NAME) == folder
    assert not (folder / "left-over").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_verify_finds_a_flipped_byte_and_get_mends_it(installed: Path, file: str) -> None:
    path = weights.get(NAME) / file
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))

    with pytest.raises(WeightsCorruptError, match=rf"{file}.*sha256.*extemb weights get {NAME}") as e:
        weights.verify(NAME)
    assert_one_sentence(e.value)
    weights.get(NAME)
    assert path.read_bytes() == good


@pytest.mark.parametrize("name", ["special_tokens_map.json", "additional_chat_templates/tool_use.jinja"])
def test_what_was_put_beside_the_files_is_not_read_and_get_removes_it(installed: Path, name: str) -> None:
    folder = weights.get(NAME)
    (folder / ".DS_Store").touch()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "version").touch()
    assert weights.resolve_llm(NAME) == folder
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    for call in (weights.verify, weights.resolve_llm):
        with pytest.raises(
            WeightsCorruptError, match=f"{name} is none of the files of {NAME}; run: extemb weights get"
        ):
            call(NAME)
    assert weights.get(NAME) == folder == weights.resolve_llm(NAME)
    assert not (folder / name).exists()


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_visible_damage_is_found_on_every_use(installed: Path, damage: str) -> None:
    folder = weights.get(NAME)
    if damage == "truncate":
        os.truncate(folder / "model.safetensors", 10)
    elif damage == "remove":
        (folder / "model.safetensors").unlink()
    else:
        (folder / cache.MANIFEST).write_text('{"name": 1')
    with pytest.raises(WeightsCorruptError, match=f"run: extemb weights get {NAME}"):
        weights.resolve_llm(NAME)
    assert not weights.list_models()[0].present
    assert weights.get(NAME) == folder == weights.resolve_llm(NAME)


def test_an_error_in_the_middle_leaves_nothing(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(gguf: Path, target: Path) -> None:
        fake_dequantise(gguf, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "dequantise", fails)
    with pytest.raises(KeyboardInterrupt):
        weights.get(NAME)
    assert [path.name for path in (cache.cache_root() / "models").iterdir()] == [f".{NAME}.lock"]


def run_elsewhere(test_file: Path, before: str) -> Process:
    """Start a process that gets the tiny model; ``before`` runs at the end of its de-quantisation."""
    program = f"""
        import importlib.util, os, pathlib, signal, sys, time
        spec = importlib.util.spec_from_file_location("shared", {str(test_file)!r})
        shared = importlib.util.module_from_spec(spec)
        sys.modules["shared"] = shared
        spec.loader.exec_module(shared)
        weights = shared.weights
        weights.KNOWN_MODELS = {{shared.NAME: shared.TINY}}
        def dequantise(gguf, target):
            shared.fake_dequantise(gguf, target)
            {before}
        weights.dequantise = dequantise
        print(weights.get(shared.NAME))
    """
    return Process(textwrap.dedent(program))


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_a_killed_process_leaves_no_folder_and_does_not_block_the_next(installed: Path) -> None:
    killed = run_elsewhere(Path(__file__), "os.kill(os.getpid(), signal.SIGKILL)")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    models = cache.cache_root() / "models"
    assert not (models / NAME).exists()
    assert any(path.name.startswith(f".{NAME}.partial-") for path in models.iterdir())

    assert weights.verify(weights.get(NAME).name)
    assert sorted(path.name for path in models.iterdir()) == [f".{NAME}.lock", NAME]


def test_two_processes_at_once_end_with_one_good_folder(installed: Path, tmp_path: Path) -> None:
    count = f"time.sleep(0.3); open({str(tmp_path / 'count')!r}, 'a').write('x')"
    running = [run_elsewhere(Path(__file__), count) for _ in range(2)]
    outputs = [process.communicate()[0].strip() for process in running]

    assert [process.returncode for process in running] == [0, 0]
    assert outputs == [str(cache.cache_root() / "models" / NAME)] * 2
    assert (tmp_path / "count").read_text() == "x"
    assert weights.verify(NAME)


def test_a_full_disk_is_seen_before_the_work(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "KNOWN_MODELS", {NAME: KnownModel(**{**TINY.__dict__, "n_parameters": 10**18})})
    with pytest.raises(WeightsError, match="GB free.*EXTEMB_HOME"):
        weights.get(NAME)


def test_a_cache_that_cannot_be_written_is_one_sentence(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EXTEMB_HOME", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match="cannot be written to.*EXTEMB_HOME"):
        weights.get(NAME)

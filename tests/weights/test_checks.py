"""A folder that is no whole model in safetensors is refused, with the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from known_models import assert_one_sentence, model_folder

from extemb_core.errors import WeightsCorruptError, WeightsError, WeightsNotFoundError
from extemb_core.weights import resolve as weights


def test_a_sharded_folder_is_read_whole(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "sharded")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    assert weights.resolve_llm(folder) == folder
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}))
    with pytest.raises(WeightsNotFoundError, match=r"b\.safetensors is named by its index"):
        weights.resolve_llm(folder)


def test_folders_of_another_kind_are_refused_with_the_reason(site: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(WeightsError, match=r"no config\.json"):
        weights.resolve_llm(empty)
    (empty / "config.json").write_text('{"model_type": "llama"}')
    (empty / "pytorch_model.bin").touch()
    with pytest.raises(WeightsError, match=r"no safetensors file \(it holds pytorch_model\.bin\)") as e:
        weights.resolve_llm(empty)
    assert_one_sentence(e.value)
    with pytest.raises(WeightsError, match="is a file"):
        weights.resolve_llm(empty / "config.json")
    with pytest.raises(WeightsError, match="holds an embedder"):
        weights.resolve_llm(model_folder(tmp_path / "embedder", model_type="extemb"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    folder, access = model_folder(tmp_path / "model"), os.access
    monkeypatch.setattr(os, "access", lambda file, mode: Path(file).name != name and access(file, mode))
    with pytest.raises(WeightsError, match=f"{name} may not be read; check its permissions") as told:
        weights.resolve_llm(folder)
    assert not isinstance(told.value, WeightsCorruptError)


@pytest.mark.parametrize("content", ["{", "[]", "", pytest.param("[" * 9999, id="nested")])
def test_a_damaged_config_is_one_sentence(tmp_path: Path, content: str) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(WeightsCorruptError, match=r"config\.json"):
        weights.resolve_llm(folder)


@pytest.mark.parametrize("n_bytes", [0, 5, 40, 100])
def test_a_truncated_safetensors_file_is_seen_from_its_header(tmp_path: Path, n_bytes: int) -> None:
    folder = model_folder(tmp_path / "model")
    os.truncate(folder / "model.safetensors", n_bytes)
    with pytest.raises(WeightsCorruptError, match="truncated"):
        weights.resolve_llm(folder)


@pytest.mark.parametrize("name", ["../../../x.safetensors", "/tmp/x.safetensors", "a/x.safetensors"])
def test_an_index_names_files_beside_it_alone(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(WeightsCorruptError, match="has no weight_map with names of files beside it"):
        weights.resolve_llm(folder)

"""Checks of settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
from tiny import Named

from extemb_core.errors import ConfigError
from extemb_core.evaluation.settings import CalibrationConfig, NeedleConfig, PerplexityConfig, QaConfig, SpeedConfig
from extemb_core.training.config import TrainingConfig
from extemb_core.utils.validation import is_count, name_or_path, path_of


@pytest.mark.parametrize("value", [1, 10**9])
def test_positive_whole_numbers_count(value):
    assert is_count(value)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", None])
def test_nothing_else_does(value):
    assert not is_count(value)


def test_a_path_is_taken_for_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner").mkdir()
    assert name_or_path("owner/name") == "owner/name"
    assert name_or_path(Path("owner/name")) == "./owner/name".replace("/", os.sep)  # no model of a hub
    assert name_or_path(Path("owner")) == "owner"
    assert name_or_path(Named(tmp_path / "gone")) == str(tmp_path / "gone")
    for wrong in (7, None, ["a"]):
        with pytest.raises(ConfigError, match="is neither a name nor a path; pass a str or an os.PathLike"):
            name_or_path(wrong)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, 10**400, 1.5, True, "7", None])
@pytest.mark.parametrize(
    "config",
    [
        partial(TrainingConfig, llm="llm", data=("a.txt",), output="run"),
        partial(QaConfig, llm="llm", data=("a.jsonl",)), partial(PerplexityConfig, llm="llm", data=("a.txt",)),
        partial(NeedleConfig, llm="llm"), partial(SpeedConfig, llm="llm"), partial(CalibrationConfig, llm="llm"),
    ],
)  # fmt: skip
def test_a_seed_is_one_of_numpy_and_torch(config, seed):
    assert config(seed=2**32 - 1).seed == 2**32 - 1
    with pytest.raises(ConfigError, match="seed=.*; pass an int from 0 to 4294967295"):
        config(seed=seed)


def test_a_tilde_is_the_home_folder_where_there_is_such_a_user(home):
    for path in ("~", Path("~"), Named("~")):
        assert path_of(path) == home
    for text in ("~nobody-of-that-name/s", "a/~/s", "s~", ""):
        assert path_of(text) == Path(text)


@pytest.mark.parametrize("path", [Path, Named, str])
def test_a_tilde_in_a_configuration_is_the_home_folder(home, path):
    files = (path("~/a.txt"), "b.txt")
    config = TrainingConfig(
        llm="tiny", data=files, eval_data=list(files), output=path("~/run"), cache=path("~/c"), start_from=path("~/s")
    )
    assert list(config.data) == list(config.eval_data) == [str(home / "a.txt"), "b.txt"]
    assert (config.output, config.cache, config.start_from) == (str(home / "run"), str(home / "c"), str(home / "s"))
    assert config.token_cache == home / "c"
    assert TrainingConfig(llm="tiny", data=("a~.txt",), output="run").data == ("a~.txt",)
    assert QaConfig(llm="tiny", data=files).data == (str(home / "a.txt"), "b.txt")


@pytest.mark.parametrize("path", [Path, Named])
def test_configurations_take_paths_and_hold_text(path, tmp_path):
    for kind, others in ((QaConfig, {"embedder": path(tmp_path)}), (TrainingConfig, {"output": path(tmp_path)})):
        config = kind(llm=path(tmp_path), data=(path(tmp_path / "a.txt"), "b.txt"), **others)
        assert (config.llm, config.data) == (str(tmp_path), (str(tmp_path / "a.txt"), "b.txt"))
        assert str(tmp_path) in json.dumps(asdict(config))


@pytest.mark.parametrize("module", ["training.config", "evaluation.settings", "context.planning"])
def test_configurations_and_plans_need_no_torch(module):
    code = f"import sys, extemb_core.{module}; sys.exit(', '.join({{'torch', 'numpy'}} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

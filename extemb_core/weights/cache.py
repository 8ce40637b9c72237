"""Keep the folders of known models in the cache: written atomically, and checked against their manifests."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from typing import Any

from extemb_core.errors import WeightsCorruptError, WeightsError
from extemb_core.utils.files import fsync, parse_json, sha256_of
from extemb_core.weights.gguf import CONVERSION_VERSION
from extemb_core.weights.registry import KnownModel

MANIFEST = "extemb-weights.json"


def cache_root() -> Path:
    """Return the folder for everything this library stores: ``EXTEMB_HOME``, or the platform's cache folder."""
    if home := os.environ.get("EXTEMB_HOME"):
        return Path(os.path.expanduser(home))
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("extemb", appauthor=False))


def folder_of(model: KnownModel) -> Path:
    """Return the folder where a model is, or will be."""
    return cache_root() / "models" / model.name


def is_ready(model: KnownModel) -> bool:
    """Return whether the folder is there: from the pinned bytes, by this conversion, with files of the right sizes.

    Raises:
        WeightsCorruptError: The folder is there and damaged.
    """
    folder = folder_of(model)
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder)
    if (manifest["source_sha256"], manifest["conversion"]) != (model.sha256, CONVERSION_VERSION):
        return False
    check_files(folder)
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read ``extemb-weights.json``: its fields about the model, and (sha256, size in bytes) of the files beside it."""
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (str(file["sha256"]), int(file["size_bytes"])) for name, file in manifest["files"].items()}
        return {key: manifest[key] for key in ("name", "source_sha256", "conversion")} | {"files": files}
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsCorruptError(
            f"{folder / MANIFEST} is missing or damaged, so the files beside it cannot be trusted; "
            f"run: extemb weights get {folder.name}"
        ) from error


def check_files(folder: Path, *, hashes: bool = False) -> None:
    """Compare every file with the manifest: its size always, and every byte when ``hashes``.

    Raises:
        WeightsCorruptError: A file is missing or not what was written, or was put there since.
    """
    manifest = read_manifest(folder)
    remedy = f"run: extemb weights get {manifest['name']}"
    for file in folder.rglob("*"):  # transformers would also read files that were added, such as a chat template
        name = file.relative_to(folder).as_posix()
        is_known = name in (MANIFEST, *manifest["files"]) or name.startswith(".") or "/." in name
        if file.is_file() and not is_known:
            raise WeightsCorruptError(f"{file} is none of the files of {manifest['name']}; {remedy}")
    for name, (sha256, size_bytes) in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise WeightsCorruptError(f"{file} is missing; {remedy}")
        if (size := file.stat().st_size) != size_bytes:
            raise WeightsCorruptError(f"{file} has {size} bytes and must have {size_bytes}; {remedy}")
        if hashes and (actual := sha256_of(file)) != sha256:
            raise WeightsCorruptError(f"{file} has sha256 {actual} and must have {sha256}; {remedy}")


def need_space(parent: Path, model: KnownModel) -> None:
    """Raise an error before the work if the disk cannot hold its result."""
    free = shutil.disk_usage(parent).free
    needed = 4 * model.n_parameters + 2 * model.size_bytes  # de-quantised to float32
    if free < needed:
        raise WeightsError(
            f"{parent} has {free / 1e9:.1f} GB free and {model.name} needs {needed / 1e9:.1f} GB; "
            f"free some space or set EXTEMB_HOME to a folder on another disk"
        )


def write_manifest(folder: Path, model: KnownModel, origin: str) -> None:
    """Write the manifest after all other files, flush all of them to disk, and make them readable as the umask says."""
    files = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = {"sha256": sha256_of(file), "size_bytes": file.stat().st_size}
        fsync(file)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "gguf")}
    manifest = {
        "name": model.name,
        "licence": model.licence,
        "source": origin,
        "source_sha256": model.sha256,
        "conversion": CONVERSION_VERSION,
        "versions": versions,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for name in files:  # safetensors makes files that only their owner can read
        (folder / name).chmod((folder / MANIFEST).stat().st_mode)
    fsync(folder / MANIFEST)


def replace_folder(new: Path, folder: Path) -> None:
    """Put the finished folder in place; an old one is moved first, as only an empty one can be replaced."""
    if folder.exists():
        os.replace(folder, new.parent / "old")
    os.replace(new, folder)
    fsync(folder.parent)

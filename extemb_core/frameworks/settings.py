"""Settings of the integrations, weights that are loaded when needed, and metadata of a response.

Needs pydantic, which each of the frameworks brings.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, PrivateAttr
from typing_extensions import Self

from extemb_core.answers import Answer
from extemb_core.errors import ConfigError
from extemb_core.frameworks.shared import share

if TYPE_CHECKING:
    from extemb_core.lm import ExtensibleLM

logger = logging.getLogger(__name__)

_OF_ANSWER = ("ratio", "budget", "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
_PER_CALL = {"model", "embedder", "documents", *_OF_ANSWER}


class ModelSettings(BaseModel):
    """Settings of a model. No weights are loaded before they are needed; all objects of a process share them."""

    model: str = "smollm2-135m-joint"
    """A known name (`extemb weights list`), a folder or a Hugging Face id."""
    embedder: str | None = None
    """Its embedder: a folder or hub id; the one shipped for a known LLM when not given."""
    store: Any = None
    """Folder where compressed documents are kept, or a store; in memory when not given."""
    ratio: str | int = "auto"
    """Tokens per extensible embedding: "auto", "raw", or a trained ratio for all documents."""
    device: str = "auto"
    """"auto" (CUDA, then CPU) or a torch device."""
    dtype: str = "auto"
    """"auto" (bfloat16 on CUDA, float32 elsewhere) or a torch dtype."""

    _loaded: ExtensibleLM | None = PrivateAttr(default=None)

    @classmethod
    def from_model_id(cls, model_id: str, **settings: Any) -> Self:
        """Make one by the model's name, folder or hub id; settings are the fields of this class."""
        return cls(model=model_id, **settings)

    @classmethod
    def from_lm(cls, lm: ExtensibleLM, **settings: Any) -> Self:
        """Make one over a model that is loaded already."""
        instance = cls(model=lm.llm.name, **settings)
        instance._loaded = lm
        return instance

    @property
    def lm(self) -> ExtensibleLM:
        """Model; it is loaded now if it was not."""
        if self._loaded is not None:
            return self._loaded
        return share(self.model, self.embedder, store=self.store, device=self.device, dtype=self.dtype)


class GenerationSettings(ModelSettings):
    """Settings of a model and of its answers."""

    _ELSEWHERE: ClassVar[frozenset[str]] = frozenset({"stream"})  # settings of a call that are not an answer's

    budget: int | None = None
    """Positions of the window that documents may take at most; all that is free when not given, or where it is less."""
    max_tokens: int = 256
    """Longest answer."""
    temperature: float = 0.0
    """0 is greedy and repeatable."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this probability together."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 from all."""
    repetition_penalty: float = 1.0
    """Of tokens that stand there already; 1 is off."""
    seed: int | None = None
    """Makes sampling repeatable."""
    stop: str | list[str] | None = None
    """Text that ends an answer, or several."""

    def _lm_of(self, settings: Mapping[str, Any]) -> ExtensibleLM:
        """Return the model of one call, which may name another than this object's."""
        model, embedder = settings.get("model"), settings.get("embedder")
        if model is None and embedder is None:
            return self.lm
        return share(model or self.model, embedder, store=self.store, device=self.device, dtype=self.dtype)

    def _response_metadata(self, answer: Answer, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Describe what became of each document and how the answer ended. Warn of documents that were not read."""
        unread = [entry.source for entry in answer.dropped if entry.n_tokens]
        if unread:
            logger.warning(
                "%d of %d documents were not read, as the %s positions for them do not hold them: %s",
                len(unread), len(answer.context), answer.budget, ", ".join(unread),
            )  # fmt: skip
        documents = [
            {
                "id": entry.ref,
                "source": entry.source,
                "raw_tokens": entry.n_tokens,
                "positions": entry.positions,
                "fidelity": entry.fidelity,
                "cached": entry.cached,
                "reason": entry.reason,
            }
            for entry in answer.context
        ]
        return {
            "model_name": settings.get("model") or self.model,
            "model_provider": "extemb",
            "finish_reason": answer.finish_reason,
            "extemb": {"documents": documents, "budget": answer.budget, "seconds": dict(answer.seconds)},
        }

    def _call_settings(self, stop: str | list[str] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of one call, for `ExtensibleLM.stream`, without its documents.

        Raises:
            ConfigError: One is unknown.
        """
        unknown = sorted(settings.keys() - _PER_CALL - self._ELSEWHERE)
        if unknown:
            raise ConfigError(
                f"unknown setting {unknown[0]}={settings[unknown[0]]!r:.80}; pass one of {', '.join(sorted(_PER_CALL))}"
            )
        chosen = {
            name: settings[name] if settings.get(name) is not None else getattr(self, name) for name in _OF_ANSWER
        }
        chosen["max_new_tokens"] = chosen.pop("max_tokens")
        stop = stop or self.stop or []
        return chosen | {"stop": [stop] if isinstance(stop, str) else [*stop]}

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Collect all that an answer depends on, besides the messages."""
        settings = {name: getattr(self, name) for name in ("model", *_OF_ANSWER, "stop")}
        return settings | {"embedder": self.lm.embedder.fingerprint, "dtype": str(self.lm.llm.dtype)}

    def get_token_ids(self, text: str) -> list[int]:
        """Encode a text as token ids."""
        return [int(token_id) for token_id in self.lm.llm.encode(text)]

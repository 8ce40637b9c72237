"""Settings of the integrations, weights that are loaded when needed, and metadata of a response.

Needs pydantic, which each of the frameworks brings.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import pydantic
from pydantic import BeforeValidator, Field, PlainSerializer, SecretStr, ValidationError
from typing_extensions import Self

from extemb_core.answers import Answer
from extemb_core.context.focus import check_plan
from extemb_core.context.planning import check_budget
from extemb_core.errors import ConfigError, ExtembError, RatioError
from extemb_core.frameworks.shared import close_store, share
from extemb_core.utils.validation import check_engine, check_sampling, name_or_path, refuse_unknown, whole_number
from extemb_core.weights.registry import DEFAULT_LLM

if TYPE_CHECKING:
    from extemb_core.lm import ExtensibleLM

logger = logging.getLogger(__name__)

_SAMPLED = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
_OF_ANSWER = ("ratio", "plan", "budget", *_SAMPLED)
OF_MODEL = ("model", "embedder", "store", "device", "dtype", "engine", "base_url", "api_key")
_PER_CALL = {"model", "embedder", "documents", *_OF_ANSWER}


def _checked_ratio(ratio: Any) -> Any:
    if ratio in ("auto", "raw"):
        return ratio
    number = int(ratio) if isinstance(ratio, str) and ratio.isdecimal() else ratio
    return whole_number(number, "ratio", remedy="'auto', 'raw' or one of the embedder's ratios", error=RatioError)


def folder_as_text(store: Any) -> Any:
    return os.fspath(store) if isinstance(store, os.PathLike) else store


def _saved_store(store: Any) -> str | None:
    """Return the folder of a store, open or not, to save; None for one in memory."""
    path = getattr(store, "path", store)
    return os.fspath(path) if isinstance(path, str | os.PathLike) else None


# Paths become text here: frameworks turn settings into JSON, cache keys and model names.
NameOrPath = Annotated[str, BeforeValidator(name_or_path)]
Folder = Annotated[Any, BeforeValidator(folder_as_text), PlainSerializer(_saved_store)]
Ratio = Annotated[str | int, BeforeValidator(_checked_ratio)]
Budget = Annotated[int, BeforeValidator(check_budget)] | None
# Not saved: LlamaIndex would write asterisks to JSON, and read them back as the key.
ApiKey = Annotated[SecretStr | None, PlainSerializer(lambda _: None)]


class StrictSettings(pydantic.BaseModel):
    """Settings that raise errors of this library for unknown names and illegal values when an object is made.

    The frameworks' own classes ignore unknown names.
    """

    _WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset()
    """Settings of other models, which are accepted with a warning."""
    _SHARED: ClassVar[tuple[str, ...]] = ()
    """Fields that may hold live objects: copies share them, and pickling them is an error."""

    def __init__(self, **settings: Any) -> None:
        known = {name for key, field in type(self).model_fields.items() for name in (key, field.alias) if name}
        refuse_unknown(settings, known, self._WITHOUT_EFFECT)
        for name in sorted(settings.keys() - known):
            logger.warning("%s= makes no difference to a %s", name, type(self).__name__)
        try:
            super().__init__(**{name: value for name, value in settings.items() if name in known})
        except ValidationError as error:
            raise _as_own(error) from error

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        memo.update((id(value), value) for value in (getattr(self, name) for name in self._SHARED))
        return super().__deepcopy__(memo)

    def __getstate__(self) -> dict[Any, Any]:
        for name in self._SHARED:
            if not isinstance(getattr(self, name), str | os.PathLike | None):
                raise ConfigError(
                    f"{type(self).__name__} with {name}= of this process cannot be pickled: another process would "
                    "have another; make it by names and paths, as in from_model_id(..., store=FOLDER)"
                )
        return super().__getstate__()


def token_usage(*answers: Answer) -> dict[str, int]:
    """Count the positions of the window that all answers together really used."""
    read, written = sum(one.prompt_positions for one in answers), sum(one.new_tokens for one in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _as_own(error: ValidationError) -> ExtembError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ExtembError):
        return cause
    name = ".".join(map(str, first["loc"]))
    return ConfigError(f"{name}={first['input']!r:.80} is not legal ({first['msg']}); pass another value")


class ModelSettings(StrictSettings):
    """Settings of a model. Weights are loaded when first needed, and shared by all objects of a process."""

    _SHARED: ClassVar[tuple[str, ...]] = ("loaded_lm", "store")

    model: NameOrPath = DEFAULT_LLM
    """A known name (`extemb weights list`), a folder or a Hugging Face id."""
    embedder: NameOrPath | None = None
    """Its embedder: a folder or hub id; the one shipped for a known LLM when not given."""
    store: Folder = None
    """Folder where compressed documents are kept, or a store; in memory when not given."""
    ratio: Ratio = "auto"
    """Tokens per extensible embedding: "auto", "raw", or a trained ratio for all documents."""
    device: str = "auto"
    """"auto" (CUDA, then CPU) or a torch device."""
    dtype: str = "auto"
    """"auto" (bfloat16 on CUDA, float32 elsewhere) or a torch dtype."""
    engine: str = "transformers"
    """Engine that writes the answers: "transformers", in this process, or "vllm", a server (docs/vllm.md)."""
    base_url: str | None = None
    """Address of the vLLM server's API, such as "http://localhost:8000/v1"."""
    api_key: ApiKey = None
    """API key of the vLLM server, if it needs one."""
    loaded_lm: Any = Field(default=None, exclude=True, repr=False)
    """The `ExtensibleLM` of `from_lm`; a field, so that frameworks that rebuild an object from its fields keep it."""

    @classmethod
    def from_model_id(cls, model_id: str | os.PathLike[str], **settings: Any) -> Self:
        """Make an object from a model's name, folder or hub id; settings are the fields of this class."""
        return cls(model=name_or_path(model_id), **settings)

    @classmethod
    def from_lm(cls, lm: ExtensibleLM, **settings: Any) -> Self:
        """Make an object over a model that is loaded already, with its embedder and store."""
        return cls(**{"model": lm.llm.name, "loaded_lm": lm, **settings})

    @property
    def lm(self) -> ExtensibleLM:
        """Model; it is loaded now if it was not."""
        if self.loaded_lm is not None:
            lm: ExtensibleLM = self.loaded_lm
            return lm
        return share(self.model, self.embedder, **self._place)

    @property
    def _place(self) -> dict[str, Any]:
        """Store, device and engine of the model, as arguments of `share`."""
        place = {"store": self.store, "device": self.device, "dtype": self.dtype}
        if self.engine == "transformers":
            return place
        key = self.api_key.get_secret_value() if self.api_key else None
        return place | {"engine": self.engine, "base_url": self.base_url, "api_key": key}

    def close(self) -> None:
        """Close the store of a folder, for all objects that share it; the next call opens it again."""
        if self.loaded_lm is None:
            close_store(self.model, self.embedder, **self._place)

    def _model_elsewhere(self) -> str | None:
        """Return the name of the field that holds the model; None if it is to be loaded from the settings."""
        return None if self.loaded_lm is None else "loaded_lm"

    @pydantic.model_validator(mode="after")
    def _one_model(self) -> Self:
        """Refuse settings that contradict the model or store passed as an object, and unknown engines."""
        check_engine(self.engine, self.base_url)
        if self.api_key and self.engine == "transformers":  # LangChain's users may pass api_key to any model
            logger.warning("api_key= makes no difference to a %s without engine='vllm'", type(self).__name__)
        if (field := self._model_elsewhere()) is not None:
            for name in OF_MODEL:
                value, legal = getattr(self, name), [type(self).model_fields[name].default]
                if name == "model" and field == "loaded_lm":
                    legal.append(self.loaded_lm.llm.name)
                if value not in legal:
                    raise ConfigError(
                        f"{name}={value!r:.80} makes no difference beside {field}=, which has a model and a store; "
                        "leave it out, or make the object by from_model_id"
                    )
        return self


class GenerationSettings(ModelSettings):
    """Settings of a model and of the answers that it generates."""

    _ELSEWHERE: ClassVar[frozenset[str]] = frozenset({"stream"})  # settings of a call that are handled elsewhere
    _HAS_QUESTION: ClassVar[bool] = True
    """False for a model that only continues plain prompts."""

    budget: Budget = None
    """Maximum positions of the window for documents; all that are free when not given, or if fewer are free."""
    plan: str | None = None
    """"focus": the sentences that say most about the question in full and, if they are few, the rest compressed;
    "select": those sentences and nothing else; "even": each document at one ratio. When not given, the best for the
    embedder (see `ExtensibleLM.ask`); plain prompts, which have no question, allow only "even"."""
    max_tokens: int = 256
    """Maximum number of tokens in an answer."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy and repeatable."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 draws from all."""
    repetition_penalty: float = 1.0
    """Penalty for tokens that occur already; 1 is off."""
    seed: int | None = None
    """Random seed, which makes sampling repeatable."""
    stop: str | list[str] | None = None
    """Text or texts that end an answer."""

    @pydantic.field_validator(*_SAMPLED, "stop", mode="before")
    @classmethod
    def _legal(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        name = str(info.field_name)
        if (name, value) != ("stop", None):
            value = check_sampling("max_new_tokens" if name == "max_tokens" else name, value, alias=name)
        return value

    @pydantic.model_validator(mode="after")
    def _plan_that_can_be(self) -> Self:
        check_plan(self.plan, self.ratio, question=self._HAS_QUESTION)
        return self

    def _model_of(self, settings: Mapping[str, Any]) -> str:
        """Return the name of the model for one call."""
        return name_or_path(settings.get("model") or self.model)

    def _lm_of(self, settings: Mapping[str, Any]) -> ExtensibleLM:
        """Return the model for one call, which may name another one than this object's."""
        model, embedder = self._model_of(settings), settings.get("embedder")
        embedder = None if embedder is None else name_or_path(embedder)
        if model == self.model and embedder in (None, self.embedder):
            return self.lm
        return share(model, embedder, **(self._place if self.loaded_lm is None else {"beside": self.loaded_lm}))

    def _response_metadata(self, answer: Answer, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Describe what became of each document and how the answer ended. Warn of documents that were not read."""
        unread = [entry.source for entry in answer.dropped if entry.n_tokens]
        if unread:
            logger.warning(
                "%d of %d documents%s were not read: they do not fit the %s positions for documents: %s",
                len(unread), len(answer.context), " and older turns" * any(entry.turn for entry in answer.context),
                answer.budget, ", ".join(unread),
            )  # fmt: skip
        documents = [
            {"id": told.pop("ref"), "raw_tokens": told.pop("n_tokens"), **told, "spans": list(told["spans"])}
            for told in map(asdict, answer.context)
        ]
        return {
            "model_name": self._model_of(settings),
            "model_provider": "extemb",
            "finish_reason": answer.finish_reason,
            "extemb": {"documents": documents, "budget": answer.budget, "seconds": dict(answer.seconds)},
        }

    def _call_settings(self, stop: str | list[str] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of one call, for `ExtensibleLM.stream`, without its documents.

        Raises:
            ConfigError: A setting is unknown, or its value not legal.
        """
        refuse_unknown(settings, _PER_CALL, self._ELSEWHERE)
        chosen = {name: getattr(self, name) if settings.get(name) is None else settings[name] for name in _OF_ANSWER}
        checked = GenerationSettings(**chosen, stop=self.stop if stop is None else stop)
        chosen = {name: getattr(checked, name) for name in _OF_ANSWER}
        chosen["max_new_tokens"] = chosen.pop("max_tokens")
        return chosen | {"stop": [checked.stop] if isinstance(checked.stop, str) else checked.stop or []}

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Collect everything that an answer depends on, besides the messages."""
        settings = {name: getattr(self, name) for name in ("model", "embedder", "dtype", *_OF_ANSWER, "stop")}
        settings["own_stop"] = self.stop  # LangChain overwrites "stop" with that of the call, which is usually None
        with suppress(Exception):  # if the model cannot be loaded, the call itself will raise
            settings |= {"embedder": self.lm.embedder.fingerprint, "dtype": str(self.lm.llm.dtype)}
            settings["scorer"] = self.lm.builder.scorer_id
        return settings

    def get_token_ids(self, text: str) -> list[int]:
        """Encode a text as token ids, or as LangChain's `custom_get_token_ids` does."""
        if custom := getattr(self, "custom_get_token_ids", None):
            return list(custom(text))
        return [int(token_id) for token_id in self.lm.llm.encode(text)]

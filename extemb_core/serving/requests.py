"""Requests of clients: OpenAI's fields, and others for documents. Unknown fields are refused.

Fields of OpenAI's API without effect here are accepted; those that would change an answer are accepted only with the
value that does not.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

_MAX_ID_CHARS = 512

Empty = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, le=2**31)]


class Strict(BaseModel):
    """A JSON object without unknown fields, whose values have the right type without conversion."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextDocument(Strict):
    """A document sent with its text. Answers cite its `id`, by which a stored one is replaced or deleted."""

    text: str
    title: str | None = None
    id: str | None = Field(None, min_length=1, max_length=_MAX_ID_CHARS)


class StoredDocument(Strict):
    """A document that was added before: its `id` or its `ref`."""

    ref: str = Field(max_length=_MAX_ID_CHARS)


def _kind_of(document: Any) -> str:
    return "with ref" if isinstance(document, dict) and "ref" in document else "with text"


AnyDocument = Annotated[
    Annotated[TextDocument, Tag("with text")] | Annotated[StoredDocument, Tag("with ref")], Discriminator(_kind_of)
]


class DocumentsRequest(Strict):
    """Documents to add; they replace those of the same id."""

    documents: list[TextDocument] = Field(min_length=1)


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a conversation. The fields after its content are accepted as this server's answers have them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None
    name: str | None = None
    refusal: None = None
    annotations: Empty | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Empty | None = None

    def to_dict(self) -> dict[str, str]:
        """Return the message in the form that a chat template takes."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(Strict):
    """Form of an answer."""

    type: Literal["text"]


class AnswerRequest(Strict):
    """Fields that both kinds of requests have in common."""

    model: str
    documents: list[AnyDocument] = []
    budget: int | None = Field(None, ge=0, le=2**31)
    ratio: Literal["auto", "raw"] | Count = "auto"
    max_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Taken, and changing nothing:
    n: Literal[1] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None

    def sampling(self, max_new_tokens: int) -> dict[str, Any]:
        """Return the fields of `Sampling`."""
        named = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed")}
        given = {name: value for name, value in named.items() if value is not None}
        return {**given, "stop": self.stop or (), "max_new_tokens": self.max_tokens or max_new_tokens}

    @property
    def with_usage(self) -> bool:
        """Whether the last chunk of a stream has the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(AnswerRequest):
    """A conversation; its last message is answered."""

    messages: list[Message] = Field(min_length=1)
    plan: Literal["focus", "even", "select"] | None = None
    k: int = Field(0, ge=0, le=1024, description="Passages of the stored documents that join, nearest to the question")
    max_completion_tokens: Count | None = None
    # Taken, and changing nothing:
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    tools: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def sampling(self, max_new_tokens: int) -> dict[str, Any]:
        """Return the fields of `Sampling`."""
        return super().sampling(self.max_completion_tokens or max_new_tokens)


class CompletionRequest(AnswerRequest):
    """A text to continue, after the documents."""

    prompt: str
    # Taken, and changing nothing:
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None

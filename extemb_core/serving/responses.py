"""Responses to clients: OpenAI's objects, with what became of the documents in `extemb`."""

from __future__ import annotations

import secrets
import time
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from extemb_core.answers import Answer


class Usage(BaseModel):
    """Size of prompt and answer. `prompt_tokens` counts the positions of the LLM's window that were really used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    document_tokens: int = Field(description="Length of the documents as raw tokens")

    @classmethod
    def of(cls, answer: Answer) -> Usage:
        """Count the positions and tokens of an answer."""
        before, new = answer.prompt_positions, answer.new_tokens
        raw = sum(entry.n_tokens for entry in answer.documents)
        return cls(prompt_tokens=before, completion_tokens=new, total_tokens=before + new, document_tokens=raw)


class Choice(BaseModel):
    """The one answer."""

    index: Literal[0] = 0
    finish_reason: str
    logprobs: None = None


class ChatChoice(Choice):
    """An answer in a conversation."""

    message: dict[str, str | None]


class TextChoice(Choice):
    """An answer that continues a text."""

    text: str


class Completion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion", "text_completion"]
    created: int
    model: str
    choices: list[ChatChoice | TextChoice]
    usage: Usage
    extemb: dict[str, Any] = Field(description="context: what became of each document; budget; seconds")


class StoredRecord(BaseModel):
    """A stored document."""

    id: str
    object: Literal["document"] = "document"
    ref: str
    title: str | None
    characters: int
    passages: int

    @classmethod
    def of(cls, record: dict[str, Any]) -> StoredRecord:
        """Make it from a record of `Library.documents`."""
        return cls(
            id=record["source"], ref=record["ref"], title=record["title"], characters=record["n_chars"],
            passages=record["n_passages"],
        )  # fmt: skip


class DocumentList(BaseModel):
    """The stored documents."""

    object: Literal["list"] = "list"
    data: list[StoredRecord]


class DeletedDocument(BaseModel):
    """A deleted document."""

    id: str
    object: Literal["document"] = "document"
    deleted: Literal[True] = True


class Model(BaseModel):
    """The model that answers."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["extemb"] = "extemb"
    context_window: int
    ratios: list[int] = Field(description="Tokens that one position may stand for")


class ModelList(BaseModel):
    """The models that answer: there is one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Writer:
    """Writes one answer in the form of its route.

    Args:
        model: Name of the model.
    """

    prefix: ClassVar[str]
    whole: ClassVar[Literal["chat.completion", "text_completion"]]
    chunk: ClassVar[str]

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def completion(self, answer: Answer) -> Completion:
        """Make the body of a whole answer."""
        told: dict[str, Any] = {**self._head, "usage": Usage.of(answer), "extemb": _details(answer)}
        return Completion(object=self.whole, choices=[self._choice(answer)], **told)

    def first(self) -> dict[str, Any] | None:
        """Make the chunk that opens a stream."""
        return None

    def piece(self, text: str) -> dict[str, Any]:
        """Make a chunk of text."""
        return self._chunk(self._delta(text))

    def last(self, answer: Answer) -> dict[str, Any]:
        """Make the chunk with the reason why the answer ended, and what became of the documents."""
        end = self._delta("") | {"finish_reason": answer.finish_reason}
        return self._chunk(end) | {"extemb": _details(answer)}

    def usage(self, answer: Answer) -> dict[str, Any]:
        """Make the chunk with the usage."""
        return self._chunk(None) | {"usage": Usage.of(answer).model_dump()}

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        choices = [] if choice is None else [{"index": 0, "finish_reason": None, "logprobs": None} | choice]
        return {**self._head, "object": self.chunk, "choices": choices}

    def _choice(self, answer: Answer) -> ChatChoice | TextChoice:
        raise NotImplementedError

    def _delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError


class ChatWriter(Writer):
    """Writes messages."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> dict[str, Any]:
        """Make the chunk that names the role."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}})

    def _choice(self, answer: Answer) -> ChatChoice:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return ChatChoice(finish_reason=answer.finish_reason, message=message)

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


class TextWriter(Writer):
    """Writes plain texts."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def _choice(self, answer: Answer) -> TextChoice:
        return TextChoice(finish_reason=answer.finish_reason, text=answer.text)

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}


def _details(answer: Answer) -> dict[str, Any]:
    told = answer.to_dict()
    return {"context": told["context"], "budget": answer.budget, "seconds": told["seconds"]}

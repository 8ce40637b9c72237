"""ExtensibleLM: a frozen LLM that reads documents as extensible embeddings. The class that most users meet."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from extemb_core.answers import Answer, AnswerStream, PreparedPrompt, answer_now, to_answer
from extemb_core.context.assembly import assemble_text
from extemb_core.context.builder import ContextBuilder, capped
from extemb_core.context.conversation import Condenser, Session
from extemb_core.context.focus import check_plan
from extemb_core.context.messages import Messages, as_messages, inline_documents, question_in
from extemb_core.context.planning import Plan
from extemb_core.context.scoring import SentenceScorer
from extemb_core.context.tools import Tool
from extemb_core.documents import Document, Documents, as_documents, is_open_file, several
from extemb_core.errors import ConfigError, MismatchError
from extemb_core.frameworks.batching import Batcher
from extemb_core.frameworks.refs import Refs
from extemb_core.models.bulk import compress_in_batches, positions_at_once
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.generation import Sampling
from extemb_core.models.llm import LLM
from extemb_core.models.vllm_client import VllmLLM, load_llm
from extemb_core.store.base import MemoryStore, Store, missing_from
from extemb_core.store.shard_store import open_store
from extemb_core.utils.batches import padded_batches
from extemb_core.utils.validation import name_or_path, whole_number
from extemb_core.weights.registry import DEFAULT_LLM
from extemb_core.weights.resolve import resolve_embedder


class ExtensibleLM:
    """A frozen LLM with an embedder that compresses its documents.

    One object may be used from several threads. Documents are compressed once and kept in `store`: in memory, least
    recently used ones going first, or on disk, for later processes too. What was said in conversations is never put
    there: turns that are condensed are kept in memory, for a while.

    Args:
        llm: The frozen LLM.
        embedder: Made for that LLM.
        store: Store that keeps compressed documents; one in memory, of 512 MiB, when not given.
        scorer: Says how much a sentence has to do with the question, for plans by sentence. When not given, the LLM's
            attention by its `retrieval_heads` and BM25 together, or BM25 alone if the embedder names none.

    Attributes:
        refs: The documents whose refs were handed to frameworks.
        batcher: Answers requests of several threads in batches.
        builder: Builds the prompts.
    """

    def __init__(
        self,
        llm: LLM,
        embedder: ExtensibleEmbedder,
        store: Store | None = None,
        *,
        scorer: SentenceScorer | None = None,
    ) -> None:
        if embedder.llm is not llm:
            raise MismatchError(f"the embedder has another LLM object ({embedder.llm.name!r}); load it with this one")
        if isinstance(llm, VllmLLM):
            llm.fingerprint = embedder.fingerprint
        self.llm = llm
        self.embedder = embedder
        self.store: Store = store if store is not None else MemoryStore()
        self.refs = Refs(self.store)
        self.batcher = Batcher(llm)
        self.builder = ContextBuilder(llm, embedder, self.store, scorer=scorer)
        self._condenser = Condenser(self.builder)

    @classmethod
    def from_pretrained(
        cls,
        llm: str | os.PathLike[str] = DEFAULT_LLM,
        embedder: str | os.PathLike[str] | None = None,
        *,
        store: str | os.PathLike[str] | Store | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        adapt: bool = False,
        scorer: SentenceScorer | None = None,
        engine: str = "transformers",
        base_url: str | None = None,
        api_key: str | None = None,
    ) -> ExtensibleLM:
        """Load an LLM and its embedder.

        Args:
            llm: A local folder, a known name (`extemb weights list`) or a Hugging Face id.
            embedder: A folder or hub id; "untrained", the LLM's own first layers as they are; or when not given the one
                shipped for a known LLM, untrained for any other.
            store: Folder of an `EmbeddingStore`, made if it is not there; folder or URL of shards (`ShardStore`); or a
                store. In memory when not given.
            device: "auto" or a torch device.
            dtype: "auto" (bfloat16 on CUDA, float32 elsewhere) or a torch dtype.
            adapt: Accept an embedder that was made for other tensors: see `ExtensibleEmbedder.from_pretrained`.
            scorer: Says how much a sentence has to do with the question, for plans by sentence. When not given, the
                LLM's attention by its `retrieval_heads` and BM25 together, or BM25 alone if the embedder names none.
            engine: Engine that writes the answers: "transformers", in this process, or "vllm", a server (docs/vllm.md).
            base_url: Address of the vLLM server's API, such as "http://localhost:8000/v1".
            api_key: API key of the vLLM server, if it needs one.

        Raises:
            WeightsError: Files are missing or damaged.
            MismatchError: The embedder was made for another LLM.
            StoreError: The store cannot be opened.
        """
        opened = open_store(store)
        try:
            where = resolve_embedder(embedder, name_or_path(llm))
            loaded = load_llm(
                name_or_path(llm), device=device, dtype=dtype, engine=engine, base_url=base_url, api_key=api_key
            )
            made = ExtensibleEmbedder.from_pretrained(where, llm=loaded, adapt=adapt)
            return cls(loaded, made, opened, scorer=scorer)
        except BaseException:
            close = getattr(opened, "close", None)
            if opened is not store and close is not None:
                close()
            raise

    # -- asking -----------------------------------------------------------------------------------------------

    def ask(
        self,
        question: str,
        documents: Documents = (),
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        plan: str | None = None,
        **sampling: Any,
    ) -> Answer:
        """Answer a question from documents.

        Args:
            question: In the user's words.
            documents: Best first: texts, `Document`s, mappings with a text, or the documents of LangChain and
                LlamaIndex.
            budget: Positions of the LLM's window that the documents may take at most; all that are free when not given,
                or if fewer are free. `answer.budget` says how many there were.
            ratio: "auto", "raw", or a trained ratio for all documents.
            plan: "focus": the sentences that say most about the question in full and, if they are few, the rest
                compressed (see `plan_focus`); "select": those sentences and nothing else; "even": each document at one
                ratio (see `plan_context`). When not given, "focus", or "select" with an untrained embedder, if ratio is
                "auto" and the embedder enters above layer 0; otherwise "even" (see `mode_of`).
            **sampling: The fields of `Sampling`: max_new_tokens, temperature, top_p, top_k, stop, seed, ...

        Returns:
            The answer; `answer.context` says what became of each document.

        Raises:
            BudgetError: The question leaves no room, or the budget is below 0 or no whole number.
            RatioError: The ratio was not trained.
        """
        prepared = self.prepare(question, documents, budget=budget, ratio=ratio, plan=plan, **sampling)
        return answer_now(self.llm, *prepared)

    def chat(
        self,
        messages: Messages,
        documents: Documents = (),
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        plan: str | None = None,
        **sampling: Any,
    ) -> Answer:
        """Answer the last message of a conversation as `ask` answers a question: messages with "role" and "content".

        Documents join the last user turn. A content may also be a list of texts and `Document`s: these are read where
        they stand, without a heading, and rank below those that join.
        """
        prepared = self.prepare(messages, documents, budget=budget, ratio=ratio, plan=plan, **sampling)
        return answer_now(self.llm, *prepared)

    def stream(
        self,
        question: str | Messages,
        documents: Documents = (),
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        plan: str | None = None,
        **settings: Any,
    ) -> AnswerStream:
        """Answer as `ask` or `chat`, piece by piece. Closing the stream stops the LLM; `.answer` holds what it wrote.

        Settings are those of `prepare`.
        """
        prepared = self.prepare(question, documents, budget=budget, ratio=ratio, plan=plan, **settings)
        return AnswerStream(self.llm, *prepared)

    def prepare(
        self,
        question: str | Messages,
        documents: Documents = (),
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        plan: str | None = None,
        condense: bool = False,
        tools: Sequence[Tool] = (),
        assistant_prefix: str = "",
        **sampling: Any,
    ) -> tuple[PreparedPrompt, Sampling]:
        """Prepare what `ask` or `chat` hands to the LLM: the documents are compressed, the prompt is complete.

        Arguments that are not listed here are those of `ask` and `chat`.

        Args:
            condense: Compress the older turns of a conversation that does not fit the window beside its documents,
                instead of refusing it; the answer's context says what became of each. Documents get their budget first
                (half of the room when none is given), turns get the rest.
            tools: Functions in OpenAI's form that the LLM may call, where its template has a place for them; see
                `context.tools`.
            assistant_prefix: Text that the answer continues; it is not part of the answer.
        """
        settings = Sampling(**sampling)
        build = self._condenser.chat if condense else self.builder.chat
        prompt = build(
            as_messages(question),
            as_documents(documents),
            budget=budget,
            ratio=ratio,
            plan=plan,
            max_new_tokens=settings.max_new_tokens,
            tools=tools,
            assistant_prefix=assistant_prefix,
        )
        return prompt, settings

    def model_inputs(
        self, question: str | Messages, documents: Documents = (), **settings: Any
    ) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """Prepare the inputs of `ask` or `chat` for your own generation loop: `model.generate(**inputs, ...)`.

        The model is the LLM, or the one over its tensors that reads compressed text (`LLM.reading_model`): a
        `PreTrainedModel` like any.

        Args:
            question: See `prepare`.
            documents: See `ask`.
            **settings: Further settings of `prepare`.

        Returns:
            The model, and the inputs of its `forward` and `generate`: "attention_mask" and "input_ids", (1, T). With
            compressed documents, "entry_states", (1, T, D), and "entry_mask", (1, T), as well; or at entry layer 0,
            "inputs_embeds", (1, T, D), instead of ids.
        """
        prepared, _ = self.prepare(question, documents, **settings)
        return self.llm.batch_inputs([prepared.prompt.inputs(self.llm)])

    def generate(
        self,
        prompt: str | Sequence[str | Document],
        documents: Documents = (),
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        **sampling: Any,
    ) -> Answer:
        """Continue a plain prompt, without a chat template, after the documents and with those that stand in it.

        A plain prompt has no question to plan for, so the plan is "even".
        """
        return answer_now(self.llm, *self.prepare_text(prompt, documents, budget=budget, ratio=ratio, **sampling))

    def prepare_text(
        self,
        prompt: str | Sequence[str | Document],
        documents: Documents = (),
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        plan: str | None = None,
        **sampling: Any,
    ) -> tuple[PreparedPrompt, Sampling]:
        """Prepare what `generate` hands to the LLM.

        Raises:
            ConfigError: The plan is neither "even" nor None.
        """
        check_plan(plan, ratio, question=False)
        settings = Sampling(**sampling)
        joined, length = as_documents(documents), settings.max_new_tokens
        return self.builder.text(prompt, joined, budget=budget, ratio=ratio, max_new_tokens=length), settings

    def score(
        self,
        continuation: str,
        *,
        prompt: str = "",
        documents: Documents = (),
        budget: int | None = None,
        ratio: str | int = "auto",
    ) -> float:
        """Compute the log-probability, in nats, of a continuation after documents and a plain prompt.

        Raises:
            ConfigError: Nothing stands before the continuation, or it is empty.
        """
        targets = self.llm.encode(continuation)
        length = max(1, len(targets))
        prepared, _ = self.prepare_text(prompt, documents, budget=budget, ratio=ratio, max_new_tokens=length)
        if not len(prepared.prompt) or not len(targets):
            raise ConfigError("score needs a continuation and something before it; pass a prompt or a document")
        return float(self.llm.score(prepared.prompt.inputs(self.llm), targets).sum())

    def ask_batch(
        self,
        questions: Sequence[str | Messages],
        documents: Sequence[Documents] | None = None,
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        plan: str | None = None,
        batch_size: int = 8,
        **sampling: Any,
    ) -> list[Answer]:
        """Answer several questions or conversations at once, each with its own documents (one entry per question).

        Questions are batched by length: at most `batch_size` together, and no more positions than the device has memory
        for (see `positions_at_once`). An answer does not depend on its batch. In `seconds`, "first_token" is the time
        of the whole batch, as nothing is streamed.
        """
        if isinstance(questions, str):
            raise ConfigError(f"questions={questions!r:.80} is one text; pass a list of questions")
        questions = list(questions)
        one = isinstance(documents, str | Mapping | os.PathLike) or is_open_file(documents)
        if one or not isinstance(documents, Iterable | None):
            raise ConfigError(
                f"documents={documents!r:.80} is not a list with the documents of each question; pass one"
            )
        of_question = [()] * len(questions) if documents is None else list(documents)
        if len(of_question) != len(questions):
            raise ConfigError(f"{len(questions)} questions came with {len(of_question)} document lists; pass one each")
        whole_number(batch_size, "batch_size")
        settings = Sampling(**sampling)
        prepared = [
            self.prepare(question, texts, budget=budget, ratio=ratio, plan=plan, **sampling)[0]
            for question, texts in zip(questions, of_question, strict=True)
        ]
        lengths = {at: len(prompt.prompt) + settings.max_new_tokens for at, prompt in enumerate(prepared)}
        answers: dict[int, Answer] = {}
        for batch in padded_batches(lengths, positions_at_once(self.llm), batch_size):
            start = time.perf_counter()
            outputs = self.llm.generate([prepared[index].prompt.inputs(self.llm) for index in batch], settings)
            seconds = time.perf_counter() - start
            for index, generated in zip(batch, outputs, strict=True):
                answers[index] = to_answer(prepared[index], generated, first_token=seconds, total=seconds)
        return [answers[index] for index in range(len(questions))]

    def session(
        self,
        documents: Documents = (),
        *,
        ratio: str | int = "auto",
        window: int | None = None,
        budget: int | None = None,
    ) -> Session:
        """Begin a conversation of any length: see `Session`."""
        return Session(self.builder, documents, ratio=ratio, window=window, budget=budget)

    # -- documents --------------------------------------------------------------------------------------------

    def plan(
        self,
        question: str | Messages,
        documents: Documents,
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        plan: str | None = None,
        max_new_tokens: int = 256,
    ) -> Plan:
        """Plan what would become of each document, without answering; `print(lm.plan(...).explain())` shows it.

        Nothing is compressed either, unless the plan uses the LLM's attention to the documents (see `scorer`).
        """
        messages, joined = as_messages(question), as_documents(documents)
        ranked = [*joined, *inline_documents(messages)]
        n_bare = self.builder.render(messages, joined).n_around
        room = self.builder.room(n_bare, max_new_tokens, budget, ranked)
        return self.builder.plan(ranked, room, ratio, n_headed=len(joined), question=question_in(messages), plan=plan)

    def positions(
        self,
        question: str | Messages,
        documents: Documents = (),
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        plan: str | None = None,
        tools: Sequence[Tool] = (),
        max_new_tokens: int = 0,
    ) -> int:
        """Count the positions that a prompt takes, its documents and tools included, planned as `plan` does.

        A prompt too long for the window is counted too, with no position left for its documents.
        """
        messages, joined = as_messages(question), as_documents(documents)
        rendered = self.builder.render(messages, joined, tools=tools)
        room = capped(budget, max(0, self.llm.context_window - rendered.n_around - max_new_tokens))
        ranked = [*joined, *inline_documents(messages)]
        planned = self.builder.plan(
            ranked, room, ratio, n_headed=len(joined), question=question_in(messages), plan=plan
        )
        return self.builder.length(rendered, ranked, planned, room, n_headed=len(joined))

    def text_positions(
        self,
        prompt: str | Sequence[str | Document],
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        max_new_tokens: int = 0,
    ) -> int:
        """Count the positions that a plain prompt takes, the documents in it included, as `positions` does."""
        prompt = several(prompt, "prompt")
        n_bare = len(assemble_text(self.llm, [part for part in prompt if isinstance(part, str)]))
        room = capped(budget, max(0, self.llm.context_window - n_bare - max_new_tokens))
        documents = [part for part in prompt if isinstance(part, Document)]
        return n_bare + self.builder.plan(documents, room, ratio, n_headed=0).positions

    def positions_of(self, parts: str | Iterable[str | Document]) -> int:
        """Count the positions of a piece of a prompt: see `ContextBuilder.positions_of`."""
        return sum(map(self.builder.positions_of, several(parts, "parts")))

    def compress(
        self,
        documents: Documents,
        *,
        ratio: int | None = None,
        batch_size: int | None = None,
        show_progress: bool | None = None,
    ) -> None:
        """Compress documents now, so that later questions about them start at once.

        Finished batches, of 8 forward passes each, are in the store: after Ctrl-C or a crash, the same call goes on. A
        read-only store is left as it is.

        Args:
            documents: As for `ask`.
            ratio: The finest ratio that will be asked for; the embedder's `kept_ratio` when not given.
            batch_size: Chunks per forward pass; by the device when not given (see `default_batch_size`).
            show_progress: Show a bar; None shows it on a terminal.

        Raises:
            RatioError: The ratio was not trained.
        """
        finest, fingerprint = self.embedder.config.finest(ratio), self.embedder.fingerprint
        if self.store.readonly:
            return
        texts = {document.ref: document.text for document in as_documents(documents)}
        refs = missing_from(self.store, texts, fingerprint, finest)
        missing = [(ref, self.builder.token_ids(texts[ref])) for ref in refs]
        for batch in compress_in_batches(
            self.embedder, missing, ratio=finest, batch_size=batch_size, show_progress=show_progress
        ):
            self.store.put(*batch)

"""Compress retrieved nodes on their way to the response synthesizer."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, dropwhile
from typing import TYPE_CHECKING, Any

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from extemb_core.context.focus import Mode, check_plan, mode_of
from extemb_core.context.planning import Plan, plan_context
from extemb_core.documents import without_lone_surrogates
from extemb_core.errors import ConfigError
from extemb_core.frameworks.aio import until_cancelled
from extemb_core.frameworks.settings import OF_MODEL, Budget, ModelSettings
from extemb_core.models.chunks import compressed_positions
from llama_index.postprocessor.extemb.node import extensible, heading_of, text_of, to_document

if TYPE_CHECKING:
    from extemb_core.documents import Document
    from extemb_core.lm import ExtensibleLM

logger = logging.getLogger(__name__)


class CompressionSettings(ModelSettings):
    """Settings of the LLM that will read the nodes: its embedder compresses them, into its store."""

    llm: Any = Field(default=None, exclude=True)
    """The `ExtensibleLLM` that will read the nodes, or instead of it `model`, `embedder` and `store`."""
    batch_size: int | None = Field(default=None, ge=1)
    """Chunks per forward pass; by the device when not given."""

    @field_validator("llm")
    @classmethod
    def _reads_embeddings(cls, llm: Any) -> Any:
        if llm is not None and not hasattr(type(llm), "lm"):  # on the object it would load weights
            raise ConfigError(
                f"a {type(llm).__name__} reads text alone; pass an ExtensibleLLM, or model=, or leave it out"
            )
        return llm

    def _model_elsewhere(self) -> str | None:
        return super()._model_elsewhere() if self.llm is None else "llm"

    def __getstate__(self) -> dict[Any, Any]:
        if self.llm is not None:
            self.llm.__getstate__()  # raises: LlamaIndex would leave out one that cannot be pickled
        return super().__getstate__()

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Describe the object, with the model and store of its LLM, so that `from_dict` can make an equal one."""
        data: dict[str, Any] = super().to_dict(**kwargs)  # type: ignore[misc]
        if isinstance(self.llm, ModelSettings):
            saved = self.llm.model_dump(include=set(OF_MODEL))
            data |= {name: value for name, value in saved.items() if name in OF_MODEL}  # not its class_name
        return data

    @property
    def lm(self) -> ExtensibleLM:
        """Model; it is loaded now if it was not."""
        if self.llm is not None:
            lm: ExtensibleLM = self.llm.lm
            return lm
        return super().lm


class ExtensibleEmbeddingPostprocessor(CompressionSettings, BaseNodePostprocessor):
    """Sends nodes to the LLM as embeddings; `source_nodes` keep their text, scores, ids, metadata and relationships.

    ```python
    index.as_query_engine(llm=llm, node_postprocessors=[ExtensibleEmbeddingPostprocessor(llm=llm, budget=1024)])
    ```

    For a query, the sentences that say most about it stay text, and the rest is compressed around them if they are few
    (`extemb_core.context.focus`). In an even plan the nodes' order is their rank: a node ranked higher is never read
    more coarsely (`extemb_core.context.planning`). Metadata that the LLM may see stays text. Only an `ExtensibleLLM` of
    the same model and store can read the result; everything else that asks a node for its text gets its text.
    """

    budget: Budget = None
    """Positions of the window that the nodes may take together, with their metadata. Nodes that do not fit are dropped,
    the worst first, with a warning. When not given, "auto" aims at the LLM's own budget or half of the window, or at
    what all nodes need at the coarsest ratio if that is more, so that an even plan drops none: LlamaIndex then asks in
    several calls."""
    plan: str | None = None
    """"focus": the sentences that say most about the query stay text, and the rest is compressed if they are few, or
    dropped; "select": those sentences and nothing else; "even": each node at one ratio, by its rank. When not given,
    that of the LLM, or else "focus" ("select" with an untrained embedder) if there is a query, `ratio` is "auto",
    `top_raw` is 0 and the embedder enters above layer 0; otherwise "even"."""
    min_tokens: int = Field(default=64, ge=0)
    """Nodes of at most this many tokens stay text in an even plan, as far as the budget allows."""
    top_raw: int = Field(default=0, ge=0)
    """This many of the best ranked nodes stay text in an even plan, best first, as far as the budget allows."""

    @model_validator(mode="after")
    def _one_way_to_plan(self) -> Self:
        mode = check_plan(self.plan, self.ratio) or "even"
        if self.top_raw and mode != "even":
            raise ConfigError(
                f"top_raw={self.top_raw} came with plan={mode!r}, which goes by sentences; leave one of them out"
            )
        return self

    @classmethod
    def class_name(cls) -> str:
        return "ExtensibleEmbeddingPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        lm = self.lm
        texts = {at: text for at, scored in enumerate(nodes) if (text := text_of(scored.node)) is not None}
        documents = {at: to_document(nodes[at].node, text) for at, text in texts.items()}
        query = "" if query_bundle is None else query_bundle.query_str or ""
        planned, too_many = self._plan(lm, nodes, documents, query)
        size = lm.embedder.config.chunk_size
        chosen = dict(zip(documents, planned.documents, strict=True))
        handed = {at: plan for at, plan in chosen.items() if plan.fidelity not in ("raw", "dropped")}
        ratios = {at: lm.builder.stored_ratio(documents[at], plan) for at, plan in handed.items()}
        for ratio in sorted({ratio for ratio in ratios.values() if isinstance(ratio, int)}):
            lm.compress(
                [documents[at] for at, stored_ratio in ratios.items() if stored_ratio == ratio],
                ratio=ratio,
                batch_size=self.batch_size,
                show_progress=False,
            )
        marks = lm.refs.put(
            *(documents[at] for at in handed),
            finest=[None if plan.spans else plan.fidelity for plan in handed.values()],  # type: ignore[misc]
            spans=[plan.spans or None for plan in handed.values()],
        )
        of_node = dict(zip(handed, marks, strict=True))
        made: dict[int, BaseNode] = {}
        for at, document in documents.items():
            tokens, mark, plan = lm.builder.n_tokens(document), of_node.get(at), chosen[at]
            read_at = plan.fidelity if mark else "raw"
            even = compressed_positions(tokens, read_at if isinstance(read_at, int) else 1, size)
            made[at] = extensible(
                nodes[at].node,
                document,
                mark=mark,
                ratio=read_at,
                tokens=tokens,
                positions=sum(span.positions(size) for span in plan.spans) if plan.spans else even,
            )
        dropped = [at for at, plan in chosen.items() if plan.fidelity == "dropped" and plan.n_tokens]
        if dropped := sorted([*dropped, *too_many]):
            by_rank = not any(chosen[at].spans for at in dropped if at in chosen)
            self._warn_of(dropped, nodes, planned.budget, by_rank)
        return [
            scored.model_copy(update={"node": made[at]}) if at in made else scored
            for at, scored in enumerate(nodes)
            if at not in dropped
        ]

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return await until_cancelled(lambda _cancelled: self._postprocess_nodes(nodes, query_bundle))

    def _warn_of(self, dropped: list[int], nodes: list[NodeWithScore], budget: int, by_rank: bool) -> None:
        worst = min((scored.get_score() for at, scored in enumerate(nodes) if at not in dropped), default=math.inf)
        misplaced = by_rank and any(nodes[at].get_score() > worst for at in dropped)
        logger.warning(
            "%d of %d nodes dropped: no room in budget=%s: %s%s",
            len(dropped), len(nodes), budget, ", ".join(nodes[at].node_id for at in dropped),
            "; the order of the nodes is their rank: what reorders them otherwise, such as LongContextReorder, goes "
            "behind this postprocessor" if misplaced else "",
        )  # fmt: skip

    def _mode(self, lm: ExtensibleLM, query: str) -> Mode:
        """Return how nodes are planned for a query."""
        plan = self.plan
        if plan is None and self.ratio == "auto":
            plan = "even" if self.top_raw else getattr(self.llm, "plan", None)
        mode = mode_of(plan, self.ratio, query, lm.embedder.config)
        return mode if query.strip() else "even"

    def _plan(
        self, lm: ExtensibleLM, nodes: list[NodeWithScore], documents: dict[int, Document], query: str
    ) -> tuple[Plan, list[int]]:
        """Plan what becomes of the nodes that are text, each with its metadata as overhead.

        Returns:
            The plan, and those of the other nodes, which stay as they are, that do not fit beside these.
        """
        config = lm.embedder.config
        others = {
            at: len(lm.llm.encode(without_lone_surrogates(scored.node.get_content(MetadataMode.LLM))))
            for at, scored in enumerate(nodes)
            if at not in documents
        }
        tokens = [lm.builder.n_tokens(document) for document in documents.values()]
        overhead = [len(lm.llm.encode(heading_of(nodes[at].node))) for at in documents]
        for index, document in enumerate(documents.values()):
            if not document.text.strip():  # only metadata: nothing to compress
                whole = tokens[index] + overhead[index]
                tokens[index] = min(1, whole)
                overhead[index] = whole - tokens[index]
        coarsest = self.ratio if isinstance(self.ratio, int) else 1 if self.ratio == "raw" else config.plan_ratios[-1]
        needed = others | {
            at: compressed_positions(count, coarsest, config.chunk_size) + more
            for at, count, more in zip(documents, tokens, overhead, strict=True)
        }
        if self.budget is not None:
            budget = self.budget
        elif self.ratio == "auto":
            llm_budget = getattr(self.llm, "budget", None)
            aim = lm.llm.context_window // 2 if llm_budget is None else min(llm_budget, lm.llm.context_window // 2)
            budget = max(aim, sum(needed.values()))
        else:
            budget = sum(tokens) + sum(overhead) + sum(others.values())
        too_many = [at for at in _beyond(needed, budget) if at in others]
        room = budget - sum(others[at] for at in others.keys() - too_many)
        if (mode := self._mode(lm, query)) != "even":
            plan = _plan_sentences(lm, [*documents.values()], tokens, overhead, room, query, mode)
            return replace(plan, budget=budget), too_many
        plan = plan_context(
            tokens,
            room,
            ratio=self.ratio,  # type: ignore[arg-type]
            ratios=config.ratios,
            auto_ratios=config.plan_ratios,
            chunk_size=config.chunk_size,
            raw_below=self.min_tokens,
            overhead=overhead,
            keep_raw=[
                at < self.top_raw or count <= self.min_tokens for at, count in zip(documents, tokens, strict=True)
            ],
        )
        return replace(plan, budget=budget), too_many


def _beyond(needed: Mapping[int, int], budget: int) -> list[int]:
    """List the nodes, by rank, from the first on that does not fit the budget beside those before it."""
    ranked = sorted(needed)
    taken = accumulate(needed[at] for at in ranked)
    return [at for at, _ in dropwhile(lambda pair: pair[1] <= budget, zip(ranked, taken, strict=True))]


def _plan_sentences(
    lm: ExtensibleLM,
    documents: Sequence[Document],
    tokens: Sequence[int],
    overhead: Sequence[int],
    room: int,
    query: str,
    mode: Mode,
) -> Plan:
    """Plan documents for a query; those without text, which are only overhead, share what the others leave."""
    texts = [at for at, document in enumerate(documents) if document.text.strip()]
    others = [at for at, document in enumerate(documents) if not document.text.strip()]
    planned = lm.builder.plan(
        [documents[at] for at in texts],
        room,
        "auto",
        question=query,
        plan=mode,
        overhead=[overhead[at] for at in texts],
    )
    left = plan_context(
        [tokens[at] for at in others],
        room - planned.positions,
        ratio="raw",
        overhead=[overhead[at] for at in others],
    )
    plans = {
        at: plan for made, of in ((planned, texts), (left, others)) for at, plan in zip(of, made.documents, strict=True)
    }
    return replace(planned, documents=tuple(replace(plans[at], index=at) for at in range(len(documents))), budget=room)

"""Compress retrieved nodes on their way to the response synthesizer."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle
from pydantic import Field, field_validator

from extemb_core.context.planning import Plan, plan_context
from extemb_core.errors import ConfigError
from extemb_core.frameworks.aio import until_cancelled
from extemb_core.frameworks.settings import Budget, ModelSettings
from extemb_core.models.chunks import compressed_positions
from llama_index.postprocessor.extemb.node import extensible, heading_of, text_of, to_document

if TYPE_CHECKING:
    from extemb_core.documents import Document
    from extemb_core.lm import ExtensibleLM

logger = logging.getLogger(__name__)


class CompressionSettings(ModelSettings):
    """LLM that will read what is compressed: its weights compress, into its store."""

    llm: Any = Field(default=None, exclude=True)
    """The `ExtensibleLLM` that will read the nodes; in its place, `model`, `embedder` and `store`."""
    batch_size: int | None = Field(default=None, ge=1)
    """Chunks per forward pass; by the device when not given."""

    @field_validator("llm")
    @classmethod
    def _reads_embeddings(cls, llm: Any) -> Any:
        if llm is not None and not hasattr(type(llm), "lm"):  # of the object it would load weights
            raise ConfigError(
                f"a {type(llm).__name__} reads text alone; pass an ExtensibleLLM, or model=, or leave it out"
            )
        return llm

    def _model_elsewhere(self) -> str | None:
        return super()._model_elsewhere() if self.llm is None else "llm"

    def __getstate__(self) -> dict[Any, Any]:
        if self.llm is not None:
            self.llm.__getstate__()  # LlamaIndex would leave out one that cannot be pickled
        return super().__getstate__()

    @property
    def lm(self) -> ExtensibleLM:
        """Model; it is loaded now if it was not."""
        if self.llm is not None:
            lm: ExtensibleLM = self.llm.lm
            return lm
        return super().lm


class ExtensibleEmbeddingPostprocessor(CompressionSettings, BaseNodePostprocessor):
    """Sends nodes to the LLM as embeddings; `source_nodes` keep text, scores, ids, metadata and relationships.

    ```python
    index.as_query_engine(llm=llm, node_postprocessors=[ExtensibleEmbeddingPostprocessor(llm=llm, budget=1024)])
    ```

    The nodes' order is their rank: those ranked higher are never read coarser (`extemb_core.context.planning`).
    Metadata that the LLM is to see stays text. Only an `ExtensibleLLM` of the same model and store can read the result;
    anything else that asks a node for its text gets its text.
    """

    budget: Budget = None
    """Positions of the window that the nodes may take together, with their metadata. What does not fit is dropped, the
    worst ranked first, with a warning. When not given, "auto" aims at the LLM's own budget or half of the window, and
    nothing is dropped: LlamaIndex asks several times then."""
    min_tokens: int = Field(default=64, ge=0)
    """Nodes of at most so many tokens stay text, as far as the budget allows."""
    top_raw: int = Field(default=0, ge=0)
    """So many of the best ranked nodes stay text, as far as the budget allows; the best comes first."""

    @classmethod
    def class_name(cls) -> str:
        return "ExtensibleEmbeddingPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        lm = self.lm
        texts = {at: text for at, scored in enumerate(nodes) if (text := text_of(scored.node)) is not None}
        documents = {at: to_document(nodes[at].node, text) for at, text in texts.items()}
        chosen = dict(zip(documents, self._plan(lm, nodes, documents).documents, strict=True))
        ratios = {at: plan.fidelity for at, plan in chosen.items() if isinstance(plan.fidelity, int)}
        for ratio in sorted(set(ratios.values())):
            lm.compress(
                [documents[at] for at, chosen_ratio in ratios.items() if chosen_ratio == ratio],
                ratio=ratio,
                batch_size=self.batch_size,
                show_progress=False,
            )
        marks = lm.refs.put(*(documents[at] for at in ratios), finest=list(ratios.values()))
        of_node = dict(zip(ratios, marks, strict=True))
        made: dict[int, BaseNode] = {}
        for at, document in documents.items():
            tokens = lm.builder.n_tokens(document)
            positions = compressed_positions(tokens, ratios.get(at, 1), lm.embedder.config.chunk_size)
            made[at] = extensible(
                nodes[at].node,
                document,
                mark=of_node.get(at),
                ratio=ratios.get(at),
                tokens=tokens,
                positions=positions,
            )
        dropped = [at for at, plan in chosen.items() if plan.fidelity == "dropped" and plan.n_tokens]
        if dropped:
            self._warn_of(dropped, nodes)
        return [
            scored.model_copy(update={"node": made[at]}) if at in made else scored
            for at, scored in enumerate(nodes)
            if at not in dropped
        ]

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return await until_cancelled(lambda _cancelled: self._postprocess_nodes(nodes, query_bundle))

    def _warn_of(self, dropped: list[int], nodes: list[NodeWithScore]) -> None:
        worst = min((scored.get_score() for at, scored in enumerate(nodes) if at not in dropped), default=math.inf)
        misplaced = any(nodes[at].get_score() > worst for at in dropped)
        logger.warning(
            "%d of %d nodes dropped: no room in budget=%s: %s%s",
            len(dropped), len(nodes), self.budget, ", ".join(nodes[at].node_id for at in dropped),
            "; the order of the nodes is their rank: what reorders them otherwise, such as LongContextReorder, goes "
            "behind this postprocessor" if misplaced else "",
        )  # fmt: skip

    def _plan(self, lm: ExtensibleLM, nodes: list[NodeWithScore], documents: dict[int, Document]) -> Plan:
        """Plan the fidelity of the nodes that are text, each with its metadata as overhead."""
        config = lm.embedder.config
        tokens = [lm.builder.n_tokens(document) for document in documents.values()]
        overhead = [len(lm.llm.encode(heading_of(nodes[at].node))) for at in documents]
        for index, document in enumerate(documents.values()):
            if not document.text.strip():  # its metadata is all there is to it: nothing to compress
                whole = tokens[index] + overhead[index]
                tokens[index] = min(1, whole)
                overhead[index] = whole - tokens[index]
        if self.budget is not None:
            room = self.budget
        elif self.ratio == "auto":
            llm_budget = getattr(self.llm, "budget", None)
            aim = lm.llm.context_window // 2 if llm_budget is None else min(llm_budget, lm.llm.context_window // 2)
            coarsest = [compressed_positions(count, config.plan_ratios[-1], config.chunk_size) for count in tokens]
            room = max(aim, sum(coarsest) + sum(overhead))
        else:
            room = sum(tokens) + sum(overhead)
        return plan_context(
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

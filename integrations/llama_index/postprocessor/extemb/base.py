"""What retrieval returned, compressed on its way to the response synthesizer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from pydantic import Field

from extemb_core.context.planning import Fidelity, compressed_positions, plan_context
from llama_index.postprocessor.extemb.node import extensible, text_of, to_document
from llama_index.postprocessor.extemb.reader import ForReader

if TYPE_CHECKING:
    from extemb_core.lm import ExtensibleLM

logger = logging.getLogger(__name__)


class ExtensibleEmbeddingPostprocessor(ForReader, BaseNodePostprocessor):
    """Nodes go to the LLM as extensible embeddings; `source_nodes` keep text, scores, ids, metadata and relationships.

    ```python
    index.as_query_engine(llm=llm, node_postprocessors=[ExtensibleEmbeddingPostprocessor(llm=llm, budget=1024)])
    ```

    The nodes' order is their rank: those ranked higher are never read coarser (`extemb_core.context.planning`).
    Metadata that the LLM is to see stays text. Only an `ExtensibleLLM` of the same model and store can read the result;
    anything else that asks a node for its text gets its text.
    """

    budget: int | None = None
    """Positions of the window that the nodes may take together. Those that do not fit are left out, with a warning.
    When not given, "auto" aims at half of the window, and nothing is left out: LlamaIndex asks several times then."""
    min_tokens: int = Field(default=64, ge=0)
    """Nodes of at most so many tokens stay text."""
    top_raw: int = Field(default=0, ge=0)
    """So many of the best ranked nodes stay text."""

    @classmethod
    def class_name(cls) -> str:
        return "ExtensibleEmbeddingPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        lm = self.lm
        texts = [text_of(found.node) for found in nodes]
        documents = {at: to_document(nodes[at].node, text) for at, text in enumerate(texts) if text and text.strip()}
        tokens = {at: len(lm.token_ids(one.text, one.ref)) for at, one in documents.items()}
        chosen = self._chosen(lm, nodes, tokens)
        ratios = {at: fidelity for at, fidelity in chosen.items() if isinstance(fidelity, int)}
        for ratio in sorted(set(ratios.values())):
            lm.compress([documents[at] for at, one in ratios.items() if one == ratio], ratio=ratio, show_progress=False)
        marks = lm.refs.put(*(documents[at] for at in ratios), finest=list(ratios.values()))
        made: dict[int, BaseNode] = {}
        for (at, ratio), mark in zip(ratios.items(), marks, strict=True):
            positions = compressed_positions(tokens[at], ratio, lm.embedder.config.chunk_size)
            made[at] = extensible(
                nodes[at].node, documents[at], mark=mark, ratio=ratio, tokens=tokens[at], positions=positions
            )
        dropped = [at for at, fidelity in chosen.items() if fidelity == "dropped"]
        if dropped:
            logger.warning(
                "%d of %d nodes are left out, as budget=%s does not hold them: %s",
                len(dropped), len(nodes), self.budget, ", ".join(nodes[at].node_id for at in dropped),
            )  # fmt: skip
        return [
            found.model_copy(update={"node": made[at]}) if at in made else found
            for at, found in enumerate(nodes)
            if at not in dropped
        ]

    def _chosen(self, lm: ExtensibleLM, nodes: list[NodeWithScore], tokens: dict[int, int]) -> dict[int, Fidelity]:
        """The fidelity of each node that has text."""
        headings = {at: len(lm.llm.encode(nodes[at].node.get_metadata_str(MetadataMode.LLM))) for at in tokens}
        as_text = {at for at, count in tokens.items() if at < self.top_raw or count <= self.min_tokens}
        planned = [at for at in tokens if at not in as_text]
        taken = sum(tokens[at] + headings[at] for at in as_text)
        everything = sum(tokens[at] + headings[at] for at in planned)
        if self.budget is not None:
            room = self.budget - taken
        else:
            room = lm.llm.window // 2 - taken if self.ratio == "auto" else everything
        config = lm.embedder.config
        plan = plan_context(
            [tokens[at] for at in planned],
            max(0, room),
            ratio=self.ratio,  # type: ignore[arg-type]
            ratios=config.ratios,
            chunk_size=config.chunk_size,
            raw_below=self.min_tokens,
            overhead=[headings[at] for at in planned],
        )
        chosen: dict[int, Fidelity] = dict.fromkeys(sorted(tokens), "raw")
        for at, document in zip(planned, plan.documents, strict=True):
            forced = document.fidelity == "dropped" and self.budget is None
            chosen[at] = config.ratios[-1] if forced else document.fidelity
        return chosen

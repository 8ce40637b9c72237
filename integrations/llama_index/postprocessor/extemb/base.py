"""What retrieval returned, compressed on its way to the response synthesizer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from pydantic import Field

from extemb_core.context.planning import Fidelity, plan_context
from extemb_core.documents import Document
from extemb_core.frameworks import LoadedWhenNeeded
from llama_index.postprocessor.extemb.node import ExtensibleNode, text_of, to_document

if TYPE_CHECKING:
    from extemb_core.lm import ExtensibleLM

logger = logging.getLogger(__name__)


class ExtensibleEmbeddingPostprocessor(LoadedWhenNeeded, BaseNodePostprocessor):
    """Nodes go to the LLM as extensible embeddings; `source_nodes` keep text, scores, ids, metadata and relationships.

    ```python
    index.as_query_engine(llm=llm, node_postprocessors=[ExtensibleEmbeddingPostprocessor(llm=llm, budget=1024)])
    ```

    The nodes' order is their rank: those ranked higher are never read coarser (`extemb_core.context.planning`).
    Metadata that the LLM is to see stays text. Only an `ExtensibleLLM` of the same model and store can read the result;
    anything else that asks a node for its text gets its text.
    """

    llm: Any = Field(default=None, exclude=True)
    """The `ExtensibleLLM` that will read the nodes; in its place, `model`, `embedder` and `store`."""
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

    @property
    def lm(self) -> ExtensibleLM:
        """The model; it is loaded now if it was not."""
        if self.llm is not None:
            lm: ExtensibleLM = self.llm.lm
            return lm
        return super().lm

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        lm = self.lm
        texts = [text_of(found.node) for found in nodes]
        documents = {at: to_document(nodes[at].node, text) for at, text in enumerate(texts) if text and text.strip()}
        tokens = {at: len(lm.token_ids(one.text, one.ref)) for at, one in documents.items()}
        chosen = self._chosen(lm, nodes, tokens)
        for ratio in sorted({ratio for ratio in chosen.values() if isinstance(ratio, int)}):
            lm.compress([documents[at] for at, one in chosen.items() if one == ratio], ratio=ratio, show_progress=False)
        places = [at for at, ratio in chosen.items() if isinstance(ratio, int)]
        marks = lm.refs.put(*(documents[at] for at in places), finest=[_ratio(chosen[at]) for at in places])
        marked = dict(zip(places, marks, strict=True))
        dropped = [at for at, fidelity in chosen.items() if fidelity == "dropped"]
        if dropped:
            logger.warning(
                "%d of %d nodes are left out, as budget=%s does not hold them: %s",
                len(dropped), len(nodes), self.budget, ", ".join(nodes[at].node_id for at in dropped),
            )  # fmt: skip
        return [
            found.model_copy(update={"node": self._replaced(lm, found, documents[at], chosen[at], marked[at])})
            if at in marked
            else found
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

    def _replaced(
        self, lm: ExtensibleLM, found: NodeWithScore, document: Document, ratio: Fidelity, mark: str
    ) -> ExtensibleNode:
        node = found.node
        own = {name: getattr(node, name) for name in ExtensibleNode.model_fields if hasattr(node, name)}
        own |= {
            "text": document.text,
            "extemb_mark": mark,
            "extemb_ref": document.ref,
            "extemb_ratio": ratio,
            "extemb_tokens": len(lm.token_ids(document.text, document.ref)),
            "extemb_positions": lm.positions_of(lm.refs.find(mark)),
        }
        return ExtensibleNode.model_construct(**own)


def _ratio(fidelity: Fidelity) -> int:
    assert isinstance(fidelity, int)
    return fidelity

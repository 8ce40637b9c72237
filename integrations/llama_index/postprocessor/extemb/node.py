"""A node that gives a ref of its embeddings to the LLM, and its text to everything else."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from llama_index.core.base.llms.types import TextBlock
from llama_index.core.schema import (
    DEFAULT_TEXT_NODE_TMPL,
    BaseNode,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    TextNode,
)

from extemb_core.documents import FILE_KEYS, Document, text_ref, without_lone_surrogates

_SOURCES = ("source", *FILE_KEYS, "title")


class ExtensibleNode(TextNode):
    """Node whose text the LLM reads as extensible embeddings, or as text if that is short or everything fits.

    Everything else stays as it was, its text included.

    Attributes:
        extemb_mark: Mark that the LLM gets in place of the text (see `extemb_core.frameworks.refs`); None for the text.
        extemb_ref: Ref of the text that the mark stands for: if the node's text is changed, it is read as text again.
        extemb_ratio: Tokens per embedding, "raw", or "mixed": some of its sentences are text.
        extemb_tokens: Length of the text in tokens.
        extemb_positions: Positions of the LLM's window that it takes, without its metadata.
    """

    extemb_mark: str | None
    extemb_ref: str
    extemb_ratio: int | Literal["raw", "mixed"]
    extemb_tokens: int
    extemb_positions: int

    @classmethod
    def class_name(cls) -> str:
        return "ExtensibleNode"

    def get_content(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> str:
        """Return the node's content; in LLM mode, with the mark in place of the text."""
        if metadata_mode != MetadataMode.LLM or self.extemb_mark is None or not self.stands:
            return super().get_content(metadata_mode)
        metadata = self.get_metadata_str(mode=metadata_mode).strip()
        if not metadata:
            return self.extemb_mark
        return self.text_template.format(content=self.extemb_mark, metadata_str=metadata).strip()

    def get_content_blocks(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> list[Any]:
        """Return `get_content` as blocks of a chat message."""
        if metadata_mode != MetadataMode.LLM or self.extemb_mark is None or not self.stands:
            return super().get_content_blocks(metadata_mode)
        metadata = self.get_metadata_str(mode=metadata_mode).strip()
        return [TextBlock(text=text) for text in (metadata, self.extemb_mark) if text]

    @property
    def stands(self) -> bool:
        """Return whether the text is still what the mark stands for."""
        return text_ref(self.text) == self.extemb_ref


def text_of(node: BaseNode) -> str | None:
    """Return the text of a node that is only text; None for images, index nodes and the like."""
    if isinstance(node, TextNode):  # also a subclass, unless it makes its own content
        own = type(node).get_content not in (TextNode.get_content, ExtensibleNode.get_content)
        return None if own or isinstance(node, ImageNode | IndexNode) else node.text
    resources = ("image_resource", "audio_resource", "video_resource")
    if isinstance(node, Node) and isinstance(node.text_resource, MediaResource):
        return node.text_resource.text if not any(getattr(node, name, None) for name in resources) else None
    return None


def heading_of(node: BaseNode) -> str:
    """Return the metadata that an LLM sees around the node's text; empty if there is none."""
    metadata = node.get_metadata_str(mode=MetadataMode.LLM).strip()
    template = getattr(node, "text_template", DEFAULT_TEXT_NODE_TMPL)
    return without_lone_surrogates(template.format(content="", metadata_str=metadata)) if metadata else ""


def to_document(node: BaseNode, text: str) -> Document:
    """Convert a node to our document, which cites the node's source or else its id."""
    named = next((node.metadata[key] for key in _SOURCES if node.metadata.get(key)), node.node_id)
    return Document(without_lone_surrogates(text), metadata={"source": str(named)})


def extensible(
    node: BaseNode, document: Document, *, mark: str | None, ratio: int | str, tokens: int, positions: int
) -> ExtensibleNode:
    """Return the node with a mark for the LLM, if it gets one; its fields are not copied or validated again."""
    kind = _extensible_kind(type(node))
    fields = {name: getattr(node, name) for name in kind.model_fields if hasattr(node, name)}
    fields |= {
        "text": document.text,
        "extemb_mark": mark,
        "extemb_ref": document.ref,
        "extemb_ratio": ratio,
        "extemb_tokens": tokens,
        "extemb_positions": positions,
    }
    return kind.model_construct(**fields)


@cache
def _extensible_kind(kind: type[BaseNode]) -> type[ExtensibleNode]:
    """Return the class of nodes with marks for a class of nodes; a subclass of `TextNode` keeps its own members."""
    if issubclass(kind, ExtensibleNode):
        return kind
    if kind is TextNode or not issubclass(kind, TextNode):
        return ExtensibleNode
    members = {"__module__": kind.__module__, "__reduce__": lambda node: (_empty, (kind,), node.__getstate__())}
    return type(f"Extensible{kind.__name__}", (ExtensibleNode, kind), members)


def _empty(kind: type[BaseNode]) -> ExtensibleNode:
    """Return an empty node of a class that is not in any module, from which copies and unpickled nodes are made."""
    return ExtensibleNode.__new__(_extensible_kind(kind))

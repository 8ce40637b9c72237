"""Make the forms in which an LLM gets a text, one for each arm of question answering.

    none             nothing
    full             the whole text
    truncated/k      the text's first tokens: as many positions as ratio k takes
    chosen/k         the sentences that share words with the question, as many (`choose_sentences`)
    lingua/k         its most informative tokens, as many (`select_tokens`)
    extensible/k     extensible embeddings at ratio k
    focus/k          the sentences that say most about the question in full, and the rest compressed if they are few
                     (`plan_focus`)
    random/k         random vectors in their place, of the same norms
    wrong/k          the extensible embeddings of another text

Where embeddings enter above layer 0, each stands in the place of an anchor, the last token of its group. There random/k
has random anchors and wrong/k the other text's, and two more controls show what anchors and states are worth:

    anchors/k        the anchors alone, ordinary tokens with nothing in their place
    random_states/k  the text's anchors, and random states of the same norms in their place
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extemb_core.context.assembly import Part
from extemb_core.context.builder import parts_of
from extemb_core.context.focus import SplitDocument
from extemb_core.context.sentence_planner import SentencePlanner
from extemb_core.context.spans import Sentences, split_into_sentences
from extemb_core.errors import ConfigError
from extemb_core.evaluation import baselines
from extemb_core.evaluation.baselines import Ids
from extemb_core.evaluation.settings import CONTROLS
from extemb_core.models.compressed import Compressed
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.entry import AnchoredStates
from extemb_core.models.llm import LLM

_WITHOUT_RATIO = ("none", "streaming", "full")
_NEED = {
    "random": 1,
    "wrong": 1,
    "focus": 2,
    "anchors": 2,
    "random_states": 2,
}  # 1: needs an embedder; 2: one that enters above layer 0


def arm_name(kind: str, ratio: int) -> str:
    """Return the name of the arm of a kind at a ratio; some kinds have no ratio."""
    return kind if kind in _WITHOUT_RATIO else f"{kind}/{ratio}"


def arm_names(kinds: Sequence[str], ratios: Sequence[int]) -> list[str]:
    """List the arms of some kinds in the order in which they are shown."""
    return list(dict.fromkeys(arm_name(kind, ratio) for kind in kinds for ratio in ratios))


def compress_at_ratios(
    embedder: ExtensibleEmbedder | None, texts: Sequence[Ids], ratios: Sequence[int]
) -> dict[int, list[Tensor | AnchoredStates]]:
    """Compress texts once, for all ratios; {} without an embedder or a ratio.

    Args:
        embedder: Embedder that compresses them.
        texts: (T,) ids each.
        ratios: Each a multiple of the finest.

    Returns:
        Ratio -> a part of a prompt for each text.
    """
    if embedder is None or not ratios:
        return {}
    return parts_at_ratios(embedder.compress_ids(texts, ratio=min(ratios), show_progress=False), ratios)


def parts_at_ratios(texts: Sequence[Compressed], ratios: Sequence[int]) -> dict[int, list[Tensor | AnchoredStates]]:
    """List the parts of a prompt for each text, by ratio."""
    return {ratio: [text.at_ratio(ratio).part for text in texts] for ratio in ratios}


def controls_for(embedder: ExtensibleEmbedder | None, asked: Sequence[str] | None = None) -> tuple[str, ...]:
    """List the controls to measure beside an embedder.

    Args:
        embedder: The embedder; None if only controls are measured.
        asked: Some of `CONTROLS`; None for all that are possible.

    Raises:
        ConfigError: A control that is asked for is not possible.
    """
    have = 0 if embedder is None else 1 + (embedder.config.entry_layer > 0)
    for name in asked or ():
        if _NEED.get(name, 0) > have:
            wanted = ("", "an embedder", "an embedder with an entry layer above 0")[_NEED[name]]
            actual = "there is none" if embedder is None else "this one's is 0"
            raise ConfigError(f"controls={name!r} needs {wanted}, and {actual}; leave it out or pass another embedder")
    return tuple(name for name in CONTROLS if (asked is None or name in asked) and _NEED.get(name, 0) <= have)


@dataclass(eq=False)
class Forms:
    """Makes every arm's form of some passages.

    Attributes:
        llm: LLM that reads them.
        embedder: The embedder; None for the controls alone.
        texts: Name -> text.
        separator: Text between two passages.
        ratios: Ratios of the arms that have one.
        controls: Controls to make; "none" and "full" are always made.
        seed: Random seed of everything drawn.
    """

    llm: LLM
    embedder: ExtensibleEmbedder | None
    texts: Mapping[str, str]
    separator: str
    ratios: Sequence[int]
    controls: Sequence[str]
    seed: int
    _ids: dict[str, Ids] = field(init=False, default_factory=dict)
    _sentences: dict[tuple[str, int], Sentences] = field(init=False, default_factory=dict)
    _recent: list[str] = field(init=False, default_factory=list)
    _recent_forms: dict[str, list[Part]] = field(init=False, default_factory=dict)
    _recent_texts: list[Compressed] = field(init=False, default_factory=list)
    _positions: dict[int, int] = field(init=False, default_factory=dict)
    _planner: SentencePlanner | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.embedder is not None:
            self._planner = SentencePlanner(self.llm, self.embedder)

    def of(self, passages: Sequence[str], question: str) -> dict[str, list[Part]]:
        """Make the form of each arm, as parts of a prompt; "full" is not truncated.

        Args:
            passages: Names of texts. Forms of the last call's passages are reused.
            question: The question about them.
        """
        if self._recent != list(passages):
            self._recent, self._recent_forms = list(passages), self._of_passages(passages)
        forms = dict(self._recent_forms)
        text = self.separator.join(self.texts[name] for name in passages)
        for ratio, n in self._positions.items():
            if "chosen" in self.controls:
                forms[f"chosen/{ratio}"] = [baselines.choose_sentences(self.llm, text, question, n)]
            if "focus" in self.controls:
                forms[f"focus/{ratio}"] = self._focused(passages, question, n)
        return forms

    def tokens(self, passages: Sequence[str]) -> list[Ids]:
        """Encode passages, with the separator's ids between them."""
        for name in passages:
            if name not in self._ids:
                self._ids[name] = self.llm.encode(self.texts[name])
        return self._separated([self._ids[name] for name in passages])

    def wrong(self, passages: Sequence[str]) -> list[str]:
        """Find for each passage the other text nearest to it in length; one text may serve twice.

        Raises:
            ConfigError: There is no other text.
        """
        lengths = {name: len(text) for name, text in self.texts.items()}
        others = lengths.keys() - set(passages)
        if not others:
            raise ConfigError(f"all {len(self.texts)} texts are used as passages; pass more rows or fewer --passages")
        return [min(others, key=lambda name: (abs(lengths[name] - lengths[passage]), name)) for passage in passages]

    @torch.no_grad()
    def _of_passages(self, passages: Sequence[str]) -> dict[str, list[Part]]:
        """Make the forms that do not depend on the question, and count the positions that each ratio takes."""
        raw = self.tokens(passages)
        flat: Ids = np.concatenate(raw)
        forms: dict[str, list[Part]] = {"none": [], "full": list(raw)}
        others = self._compressed(self.wrong(passages)) if "wrong" in self.controls else {}
        ours = self._compressed(passages)
        for ratio in self.ratios:
            n = sum(map(len, ours[ratio])) if ours else sum(-(-len(part) // ratio) for part in raw)
            self._positions[ratio] = n
            if "truncated" in self.controls:
                forms[f"truncated/{ratio}"] = [baselines.head(flat, n)]
            if "lingua" in self.controls:
                forms[f"lingua/{ratio}"] = [baselines.select_tokens(self.llm, flat, n)]
            if ours:
                forms[f"extensible/{ratio}"] = ours[ratio]
            for kind in ("random", "random_states", "anchors"):
                if kind in self.controls:
                    controls = [self._control(kind, part, self.seed + at) for at, part in enumerate(ours[ratio])]
                    forms[f"{kind}/{ratio}"] = controls
            if others:
                forms[f"wrong/{ratio}"] = others[ratio]
        return forms

    def _focused(self, passages: Sequence[str], question: str, budget: int) -> list[Part]:
        """Make the form that a plan by sentences gives for a question."""
        assert self.embedder is not None
        assert self._planner is not None
        config, separator = self.embedder.config, self.llm.encode(self.separator)
        ids = [self._ids[name] for name in passages]
        longest = self._planner.max_sentence_tokens(sum(map(len, ids)))
        for name in passages:
            if (name, longest) not in self._sentences:
                text = self.texts[name]
                ends = self.llm.encode_with_ends(text)[1]
                self._sentences[name, longest] = split_into_sentences(text, ends, max_tokens=longest)
        documents = [
            SplitDocument(self._sentences[name, longest], config.kept_ratio, config.chunk_size, len(separator))
            for name in passages
        ]
        plans = self._planner.plan(question, documents, budget + len(separator), lambda: self._recent_texts).documents
        parts = [
            parts_of(plan.spans, tokens, text)
            for plan, tokens, text in zip(plans, ids, self._recent_texts, strict=True)
            if plan.fidelity != "dropped"
        ]
        return [part for content in parts for part in (separator, *content)][1:]

    def _compressed(self, passages: Sequence[str]) -> dict[int, list[Part]]:
        """Compress each passage by itself: ratio -> parts, with the separator between them."""
        if self.embedder is None or not self.ratios:
            return {}
        finest = min(*self.ratios, self.embedder.config.kept_ratio)
        self._recent_texts = self.embedder.compress_ids(self.tokens(passages)[::2], ratio=finest, show_progress=False)
        parts = parts_at_ratios(self._recent_texts, self.ratios)
        return {ratio: self._separated(of_ratio) for ratio, of_ratio in parts.items()}

    def _control(self, kind: str, part: Part, seed: int) -> Part:
        """Replace the text in a compressed part, or only its anchors or states, as `kind` says; separators stay."""
        if isinstance(part, Tensor):
            return baselines.random_embeddings(part, seed)
        if not isinstance(part, AnchoredStates):
            return part
        if kind == "anchors":
            return part.anchors
        anchors = baselines.random_tokens(self.llm, len(part), seed) if kind == "random" else part.anchors
        return AnchoredStates(anchors, baselines.random_embeddings(part.states, seed), part.layer)

    def _separated(self, parts: Sequence[Any]) -> list[Any]:
        separator = self.llm.encode(self.separator)
        return [item for part in parts for item in (separator, part)][1:]

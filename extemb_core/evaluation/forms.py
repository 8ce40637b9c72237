"""The forms in which question answering gives an LLM a text, one for each arm.

    none             nothing
    full             the whole text
    truncated/k      the text's first tokens: as many positions as ratio k takes
    chosen/k         the sentences that share words with the question, as many (`choose_sentences`)
    lingua/k         its most informative tokens, as many (`select_tokens`)
    extensible/k     extensible embeddings at ratio k
    random/k         random vectors in their place, of the same norms
    wrong/k          the extensible embeddings of another text

Where embeddings enter above layer 0, each stands in the place of an anchor, the last token of its group. There random/k
has random anchors and `wrong/k` the other text's, and two controls more tell what anchors and states are worth:

    anchors/k        the anchors alone, ordinary tokens with nothing in their place
    random_states/k  the text's anchors, and random states of the same norms in their place
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extemb_core.context.assembly import Part
from extemb_core.errors import ConfigError
from extemb_core.evaluation.baselines import choose_sentences, head, random_embeddings, random_tokens, select_tokens
from extemb_core.evaluation.settings import CONTROLS
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.entry import AnchoredStates
from extemb_core.models.llm import LLM

Ids = np.ndarray[Any, Any]

_NEED = {"random": 1, "wrong": 1, "anchors": 2, "random_states": 2}  # an embedder; one that enters above layer 0


def controls_for(embedder: ExtensibleEmbedder | None, asked: Sequence[str] | None = None) -> tuple[str, ...]:
    """List the controls to measure beside an embedder.

    Args:
        embedder: None where only controls are measured.
        asked: Some of `CONTROLS`; None for all that can be made.

    Raises:
        ConfigError: One that is asked for cannot be made.
    """
    have = 0 if embedder is None else 1 + (embedder.config.entry_layer > 0)
    for name in asked or ():
        if _NEED.get(name, 0) > have:
            wanted = ("", "an embedder", "an embedder with an entry layer above 0")[_NEED[name]]
            given = "there is none" if embedder is None else "this one's is 0"
            raise ConfigError(f"controls={name!r} needs {wanted}, and {given}; leave it out or pass another embedder")
    return tuple(name for name in CONTROLS if (asked is None or name in asked) and _NEED.get(name, 0) <= have)


class Forms:
    """Make every arm's form of some passages.

    Args:
        llm: Reads them.
        embedder: None for the controls alone.
        texts: Name -> text.
        separator: Stands between two passages.
        ratios: Of the arms that have one.
        controls: Those to make; "none" and "full" always are.
        seed: Of what is drawn.
    """

    def __init__(
        self,
        llm: LLM,
        embedder: ExtensibleEmbedder | None,
        texts: Mapping[str, str],
        *,
        separator: str,
        ratios: Sequence[int],
        controls: Sequence[str],
        seed: int,
    ) -> None:
        self._llm = llm
        self._embedder = embedder
        self._texts = texts
        self._separator = separator
        self._ratios = ratios
        self._controls = controls
        self._seed = seed
        self._ids: dict[str, Ids] = {}
        self._recent: list[str] = []
        self._recent_forms: dict[str, list[Part]] = {}
        self._positions: dict[int, int] = {}

    def of(self, passages: Sequence[str], question: str) -> dict[str, list[Part]]:
        """Make the form of each arm, as parts of a prompt; "full" is not cut.

        Args:
            passages: Names of texts. Those of the last call are not read again.
            question: What is asked about them.
        """
        if self._recent != list(passages):
            self._recent, self._recent_forms = list(passages), self._of_passages(passages)
        if "chosen" not in self._controls:
            return dict(self._recent_forms)
        text = self._separator.join(self._texts[name] for name in passages)
        return self._recent_forms | {
            f"chosen/{ratio}": [choose_sentences(self._llm, text, question, n)] for ratio, n in self._positions.items()
        }

    def tokens(self, passages: Sequence[str]) -> list[Ids]:
        """Encode passages, with the separator's ids between them."""
        for name in passages:
            if name not in self._ids:
                self._ids[name] = self._llm.encode(self._texts[name])
        return self._separated([self._ids[name] for name in passages])

    def wrong(self, passages: Sequence[str]) -> list[str]:
        """For each passage, find the text nearest to it in length that is none of them; one may come twice.

        Raises:
            ConfigError: There is no other text.
        """
        names = [name for name in self._texts if name not in passages]
        if not names:
            raise ConfigError(f"all {len(self._texts)} texts are used as passages; pass more rows or fewer --passages")
        lengths = {name: len(self._texts[name]) for name in self._texts}
        return [min(names, key=lambda name: (abs(lengths[name] - lengths[own]), name)) for own in passages]

    @torch.no_grad()
    def _of_passages(self, passages: Sequence[str]) -> dict[str, list[Part]]:
        """Make what does not depend on the question, and count the positions that each ratio takes."""
        raw = self.tokens(passages)
        flat: Ids = np.concatenate(raw)
        forms: dict[str, list[Part]] = {"none": [], "full": list(raw)}
        ours = self._compressed(passages)
        others = self._compressed(self.wrong(passages)) if "wrong" in self._controls else {}
        for ratio in self._ratios:
            n = sum(map(len, ours[ratio])) if ours else sum(-(-len(part) // ratio) for part in raw)
            self._positions[ratio] = n
            if "truncated" in self._controls:
                forms[f"truncated/{ratio}"] = [head(flat, n)]
            if "lingua" in self._controls:
                forms[f"lingua/{ratio}"] = [select_tokens(self._llm, flat, n)]
            if ours:
                forms[f"extensible/{ratio}"] = ours[ratio]
            for kind in ("random", "random_states", "anchors"):
                if kind in self._controls:
                    forms[f"{kind}/{ratio}"] = [
                        self._control(kind, part, self._seed + at) for at, part in enumerate(ours[ratio])
                    ]
            if others:
                forms[f"wrong/{ratio}"] = others[ratio]
        return forms

    def _compressed(self, passages: Sequence[str]) -> dict[int, list[Part]]:
        """Compress each passage on its own: ratio -> parts, with the separator between them."""
        if self._embedder is None:
            return {}
        ids = self.tokens(passages)[::2]
        compressed = self._embedder.compress_ids(ids, ratio=min(self._ratios), show_progress=False)
        return {ratio: self._separated([each.at_ratio(ratio).part for each in compressed]) for ratio in self._ratios}

    def _control(self, kind: str, part: Part, seed: int) -> Part:
        """Take the text out of a compressed part, or the part of it that `kind` says; separators stay."""
        if isinstance(part, Tensor):
            return random_embeddings(part, seed)
        if not isinstance(part, AnchoredStates):
            return part
        if kind == "anchors":
            return part.anchors
        anchors = random_tokens(self._llm, len(part), seed) if kind == "random" else part.anchors
        return AnchoredStates(anchors, random_embeddings(part.states, seed), part.layer)

    def _separated(self, parts: Sequence[Any]) -> list[Any]:
        separator = self._llm.encode(self._separator)
        return [each for part in parts for each in (separator, part)][1:]

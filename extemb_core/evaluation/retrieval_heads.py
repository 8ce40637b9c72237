"""Find the attention heads of an LLM that look, in compressed text, at the sentence that answers a question.

Each text is read compressed, with its question, and for every head it is noted whether the sentence to which it attends
most, at the position from which the answer comes, contains the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from extemb_core.context.retrieval_heads import RetrievalHeads, of_sentences
from extemb_core.context.scoring import bm25_scores
from extemb_core.context.spans import split_into_sentences
from extemb_core.errors import ConfigError
from extemb_core.evaluation.plan_losses import DrawnQuestions
from extemb_core.evaluation.runs import Sample
from extemb_core.evaluation.settings import HeadsConfig
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.questions import Question

N_HEADS = 8
_MIN_SENTENCES = 3
_MAX_HOLDING_SHARE = 1 / 3  # of the sentences: an answer in more of them does not show where a head looks


class HeadsExperiment(DrawnQuestions):
    """Reads texts with their questions, and ranks the heads.

    Raises:
        ConfigError: The embedder enters at layer 0, or the LLM does not attend to all of a text alike.
    """

    kind: ClassVar[str] = "heads"

    def __init__(self, config: HeadsConfig, llm: LLM, embedder: ExtensibleEmbedder | None) -> None:
        super().__init__(config, llm, embedder)
        if not llm.reads_in_parts:
            raise ConfigError(f"{llm.name} does not attend to all of a text alike; plans go by words with it")
        self._heads = RetrievalHeads(llm, self._embedder.config.entry_layer)

    def measure(self, group: Sequence[str]) -> Iterator[Sample]:
        for name in group:
            yield {"id": name, **self._looked_at(self._rows[self._questions[name]])}

    def _looked_at(self, question: Question) -> dict[str, Any]:
        """Note which heads look at a sentence with the answer; nothing if none or many have it, or the text is long."""
        (ratio,), size = self.config.ratios, self._embedder.config.chunk_size
        ids, ends = self.llm.encode_with_ends(question.context)
        sentences = split_into_sentences(question.context, ends)
        texts = [text.casefold() for text in sentences.texts]
        answers = [answer.strip().casefold() for answer in question.answers]
        holds = np.array([any(answer in text for answer in answers) for text in texts])
        enough = len(texts) >= _MIN_SENTENCES and 0 < holds.sum() <= _MAX_HOLDING_SHARE * len(texts)
        if not enough or len(ids) > ratio * self.llm.context_window // 2:
            return {"sentences": len(texts), "holding": 0}
        (compressed,) = self._embedder.compress_ids([ids], ratio=ratio, show_progress=False)
        shares = of_sentences(self._heads.look(question.question, [compressed.part]), [sentences], ratio, size)
        words = np.array(bm25_scores(question.question, sentences.texts))
        return {
            "sentences": len(texts),
            "holding": int(holds.sum()),
            "by_words": bool(holds[words.argmax()]),
            "heads": np.flatnonzero(holds[shares.argmax(-1)]).tolist(),
        }

    def summarise(self, samples: Sequence[Sample]) -> dict[str, Any]:
        usable = [sample for sample in samples if sample["holding"]]
        if not usable:
            raise ConfigError(
                "no answer stands in a few of at least three sentences of its text; pass questions whose answers are "
                "words of the text"
            )
        counts = np.bincount([at for sample in usable for at in sample["heads"]], minlength=len(self._heads.heads))
        best = np.argsort(-counts, kind="stable")[:N_HEADS].tolist()
        return {
            "heads": [list(self._heads.heads[at]) for at in best],
            "found": [round(float(counts[at]) / len(usable), 4) for at in best],
            "found_by_words": round(float(np.mean([sample["by_words"] for sample in usable])), 4),
            "found_by_chance": round(float(np.mean([one["holding"] / one["sentences"] for one in usable])), 4),
            "questions": len(usable),
        }

"""Fit what an answer loses when a sentence is read in less detail: the table with which `plan_focus` weighs.

Each question is asked with its text several times, each time under another random plan: either every sentence at a
fidelity of its own, or the best few in full and the rest at one ratio. The cost of such a plan, compared with the full
text, is fitted as a sum over its sentences of w(trust, class) g(fidelity): how much a sentence matters, by its rank,
times how much of it is lost. Both are fitted by least squares in turn; w is not negative and g falls with detail.

The cost is half the loss of the right answer and half the fall of the whole answer's probability, each divided by its
own mean. The loss alone would favour compressing everything a little; but an answer that is nearly right is not right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np

from extemb_core.context.assembly import Part, assemble_chat
from extemb_core.context.builder import parts_of
from extemb_core.context.focus import FIDELITIES, SentenceLosses, SplitDocument, added_by_second
from extemb_core.context.retrieval_heads import heads_of, max_sentence_tokens
from extemb_core.context.scoring import bm25_scores, ranks
from extemb_core.context.spans import Array, split_into_sentences
from extemb_core.errors import ConfigError
from extemb_core.evaluation.runs import Experiment, Sample, groups_of
from extemb_core.evaluation.settings import CommonConfig, PlanConfig
from extemb_core.models.compressed import Compressed
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.generation import turn_end
from extemb_core.models.llm import LLM
from extemb_core.questions import Question, read_questions, template_for, templates

RANKS = (1, 2, 3, 6)
_MIN_SENTENCES = 3
_MAX_LOSS, _MIN_LOSS = 4.0, -1.0  # limits of a plan's loss beyond the full text's, in nats per token
_RANDOM = (0.12, 0.15, 0.13, 0.18, 0.17, 0.10, 0.15)  # probability of each fidelity, if drawn independently
_MAX_BEST, _MAX_NEXT = 4, 3  # maximum of sentences in full, and of those that follow at a finer ratio
_RANKS_BY_TRUST = 2  # ranks whose sentences matter differently by level of trust
_NEAR = 0.02  # shares of loss as close as this count as equal; resampling 296 questions moves one by 0.05 to 0.12
_STEP = 0.001
_TURNS = 60
_RIDGE, _ROUNDS = 1.0, 400  # of each least squares


class DrawnQuestions(Experiment):
    """Draws up to `limit` questions, the same number from each source (the id up to its colon) while it has some.

    Raises:
        ConfigError: The embedder enters at layer 0.
    """

    def __init__(self, config: CommonConfig, llm: LLM, embedder: ExtensibleEmbedder | None) -> None:
        if embedder is None or not embedder.config.entry_layer:
            raise ConfigError("a plan of spans needs an embedder that enters above layer 0; pass one with --embedder")
        super().__init__(config, llm, embedder)
        self._embedder = embedder
        self._rows = read_questions(config.data, unique=False)
        by_source: dict[str, list[int]] = defaultdict(list)
        for at in np.random.default_rng(config.seed).permutation(len(self._rows)).tolist():
            by_source[self._rows[at].id.split(":")[0]].append(at)
        turns = zip_longest(*[rows for _, rows in sorted(by_source.items())])
        drawn = [at for turn in turns for at in turn if at is not None][: config.limit]
        self._questions = {f"{at} {self._rows[at].id}": at for at in drawn}

    def groups(self) -> list[list[str]]:
        return groups_of([*self._questions], self.config.batch_size)


class PlanExperiment(DrawnQuestions):
    """Asks questions under random plans, and fits the table.

    Raises:
        ConfigError: The embedder enters at layer 0, or no text has several sentences and fits the window.
    """

    kind: ClassVar[str] = "plan"

    def __init__(self, config: PlanConfig, llm: LLM, embedder: ExtensibleEmbedder | None) -> None:
        super().__init__(config, llm, embedder)
        self._heads = heads_of(llm, self._embedder)

    def measure(self, group: Sequence[str]) -> Iterator[Sample]:
        for name in group:
            at = self._questions[name]
            draw = np.random.default_rng([self.config.seed, at])
            others = draw.integers(len(self._rows), size=draw.integers(self.config.passages))
            texts = [self._rows[at].context, *(self._rows[other].context for other in others)]
            text = "\n\n".join(texts[number] for number in draw.permutation(len(texts)))
            yield {"id": name, **self._measured(self._rows[at], text, draw)}

    def _measured(self, question: Question, text: str, draw: np.random.Generator) -> dict[str, Any]:
        """Score the answer under plans drawn for the text; no plans if the text is too short or too long."""
        llm, size = self.llm, self._embedder.config.chunk_size
        ids, ends = llm.encode_with_ends(text)
        sentences = split_into_sentences(text, ends, max_tokens=max_sentence_tokens(self._heads, len(ids)))
        document = SplitDocument(sentences, self._embedder.config.kept_ratio, size)
        texts = document.sentences.texts
        if len(texts) < _MIN_SENTENCES:
            return {"plans": []}
        (compressed,) = self._embedder.compress_ids([ids], ratio=document.finest, show_progress=False)
        scores = self._scores(question.question, document, compressed)
        plans = [self._drawn(scores, number, draw) for number in range(self.config.plans)]
        template = templates()[template_for(question.answers)]
        after = template["after"].replace("{question}", question.question)
        parts: list[list[Part]] = [parts_of(document.grid.spans(FIDELITIES, plan), ids, compressed) for plan in plans]
        parts.append([ids])
        prompts = [
            assemble_chat(llm, [{"role": "user", "content": [template["before"], *each, after]}]).inputs(llm)
            for each in parts
        ]
        answer = np.append(llm.encode(question.answers[0].strip()), np.int32(turn_end(llm)))
        if max(map(len, prompts)) + len(answer) > llm.context_window:
            return {"plans": []}
        losses = [round(-float(part.sum()), 4) for part in llm.log_probs(prompts, [answer] * len(prompts))]
        return {
            "n_tokens": np.diff(document.sentences.borders).tolist(),
            "scores": scores.round(4).tolist(),
            "added": round(added_by_second(question.question, texts, scores), 4),
            "plans": [plan.tolist() for plan in plans],
            "answer_tokens": len(answer),
            "losses": losses,
        }

    def _scores(self, question: str, document: SplitDocument, compressed: Compressed) -> Array:
        """Score sentences as plans do: with retrieval heads if the embedder names any."""
        ratios = self.config.ratios
        scorer = self._heads and self._heads.scorer([document], document.n_tokens, ratios, lambda: [compressed])
        return np.array((scorer or bm25_scores)(question, document.sentences.texts))

    def _drawn(self, scores: Array, number: int, draw: np.random.Generator) -> Array:
        """Draw the fidelity of each sentence, alternately independently and by rank."""
        if number % 2 == 0:
            return draw.choice(len(FIDELITIES), len(scores), p=_RANDOM)
        rank = ranks(scores)
        best, following = draw.integers(0, _MAX_BEST + 1), draw.integers(0, _MAX_NEXT + 1)
        plan = np.full(len(scores), draw.integers(0, len(FIDELITIES) - 2))
        plan[rank < best + following] = draw.integers(3, len(FIDELITIES) - 1)
        plan[rank < best] = len(FIDELITIES) - 1
        return plan

    def summarise(self, samples: Sequence[Sample]) -> dict[str, Any]:
        usable = [sample for sample in samples if sample["plans"]]
        if len(usable) < 2:
            raise ConfigError("fewer than two texts have several sentences and fit the window; pass other questions")
        return fit(usable)


def fit(samples: Sequence[Sample]) -> dict[str, Any]:
    """Fit the table (see the module): JSON-able values, with the share of the cost's variance that it explains.

    Raises:
        ConfigError: Reading in less detail costs nothing.
    """
    added = np.array([sample["added"] for sample in samples])
    positive = added[added > 0]
    trust = (0.0, float(np.median(positive))) if len(positive) else (0.0,)
    blank = SentenceLosses(RANKS, trust, np.zeros((len(trust) + 1, len(RANKS) + 2, len(FIDELITIES))))
    features, nats, falls = [], [], []
    for sample in samples:
        lengths, scores = np.array(sample["n_tokens"]), np.array(sample["scores"])
        classes, amounts = blank.classes(scores, lengths)
        *losses, full = sample["losses"]
        for plan, loss in zip(sample["plans"], losses, strict=True):
            counted = np.zeros(blank.losses.shape)
            np.add.at(counted[np.searchsorted(trust, sample["added"])], (classes, plan), amounts)
            features.append(counted.reshape(-1, len(FIDELITIES)))
            nats.append(np.clip((loss - full) / sample["answer_tokens"], _MIN_LOSS, _MAX_LOSS))
            falls.append(np.exp(-full) - np.exp(-loss))
    if min(np.mean(nats), np.mean(falls)) <= 0:
        raise ConfigError(
            f"reading sentences in less detail made the right answers no less likely ({np.mean(nats):+.3f} nats per "
            "token on average), so that there is no cost to fit; pass other questions, or train the embedder first"
        )
    x, y = np.stack(features), np.array(nats) / np.mean(nats) + np.array(falls) / np.mean(falls)
    # One weight for each level and class; for classes of lower rank, with little data, one for all levels.
    levels, n_classes, _ = blank.losses.shape
    number = np.arange(n_classes)
    of_cell = np.where(
        number < _RANKS_BY_TRUST,
        number + _RANKS_BY_TRUST * np.arange(levels)[:, None],
        number + _RANKS_BY_TRUST * (levels - 1),
    ).ravel()
    shared = np.eye(of_cell.max() + 1)[of_cell]  # (levels x classes, weights)
    lost = 1 - np.linspace(0, 1, len(FIDELITIES))
    for _ in range(_TURNS):
        weights = shared @ _non_negative_least_squares((x * lost).sum(2) @ shared, y)
        steps = _non_negative_least_squares(np.cumsum((x * weights[:, None]).sum(1)[:, :-1], axis=1), y)
        lost = np.append(np.cumsum(steps[::-1])[::-1], 0)
        lost /= max(lost[0], 1e-9)
    # A whole text at ratio 32 takes as many positions as half of it at 16. If both are equally good, all of it is read.
    half = (lost[0] + lost[2]) / 2
    if lost[1] < half + _NEAR:
        lost[1] = max(lost[2], min(lost[1], half - _STEP))
    table = weights.reshape((*blank.losses.shape[:2], 1)) * lost
    explained = 1 - np.var(y - (x * weights[:, None] * lost).sum((1, 2))) / np.var(y)
    return {
        "fidelities": list(FIDELITIES), "ranks": list(RANKS), "trust": [round(border, 4) for border in trust],
        "losses": table.round(4).tolist(), "lost": lost.round(4).tolist(), "explained": round(float(explained), 4),
        "questions": len(samples), "plans": len(y),
    }  # fmt: skip


def _non_negative_least_squares(a: Array, b: Array) -> Array:
    """Solve min |a x - b|^2 + _RIDGE |x|^2 for x >= 0, one coordinate after another. a: (N, P), b: (N,) -> (P,)."""
    gram, target = a.T @ a + _RIDGE * np.eye(a.shape[1]), a.T @ b
    x = np.zeros(a.shape[1])
    for _ in range(_ROUNDS):
        for at in range(len(x)):
            x[at] = max(0.0, x[at] + (target[at] - gram[at] @ x) / gram[at, at])
    return x

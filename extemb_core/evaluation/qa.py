"""Question answering: what an LLM answers, by the form in which it is given the text.

Every arm fills the same prompt, through the LLM's own chat template, with another form of the same text:

    none            nothing
    full            the whole text; where it does not fit the window, its first tokens, and the sample says "cut"
    truncated/k     the text's first tokens: as many positions as ratio k takes
    lingua/k        its most informative tokens, as many (`select_tokens`)
    extensible/k    extensible embeddings at ratio k
    random/k        random vectors in their place, of the same norms
    wrong/k         the extensible embeddings of another text

With `passages` above 1 the text is that many passages: the question's own and others of the same files; the rank of
the question's own goes round, so that every rank has its share of the questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from extemb_core.context.assembly import Part, Prompt, assemble_chat
from extemb_core.errors import BudgetError, ConfigError
from extemb_core.evaluation import scoring
from extemb_core.evaluation.baselines import head, random_embeddings, select_tokens
from extemb_core.evaluation.runs import Measured, Sample
from extemb_core.evaluation.settings import CommonConfig, require_counts
from extemb_core.evaluation.statistics import mean_with_interval, share
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM, Sampling
from extemb_core.questions import Question, read_questions, template_for, templates
from extemb_core.rows import evenly

Ids = np.ndarray[Any, Any]

METRICS = {
    "em": scoring.exact_match,
    "f1": scoring.f1,
    "contained": scoring.contained,
    "rouge_l": scoring.rouge_l,
}
CONTROLS = ("none", "truncated", "lingua", "random", "wrong", "full")
_POSITIONS_AT_ONCE = 4096  # of one call, padding included: bounds memory, and the padding of unlike lengths


@dataclass(frozen=True, kw_only=True)
class QaConfig(CommonConfig):
    """How questions are put.

    Attributes:
        passages: Passages of the text: the question's own and others.
        template: A name in `templates.json`; "auto" goes by the reference answers.
        controls: Which other arms are measured; "none" and "full" always are.
    """

    passages: int = 1
    template: str = "auto"
    controls: tuple[str, ...] = CONTROLS

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "passages")
        if not self.data:
            raise ConfigError("data is empty; pass files of questions")
        for name, legal in (("template", ("auto", *templates())), ("controls", CONTROLS)):
            given = getattr(self, name)
            wrong = next((each for each in ([given] if name == "template" else given) if each not in legal), None)
            if wrong is not None:
                raise ConfigError(f"{name}={wrong!r} is not one of {', '.join(legal)}; pass one of them")


class QaExperiment(Measured):
    """See the module. Without an embedder only "none", "full", "truncated" and "lingua" are measured."""

    kind: ClassVar[str] = "qa"

    def __init__(self, config: QaConfig, llm: LLM, embedder: ExtensibleEmbedder | None = None) -> None:
        super().__init__(config, llm, embedder)
        self.config = config
        questions = read_questions(config.data)
        self._texts = {question.document: question.context for question in questions}
        if len(self._texts) < max(2, config.passages):
            raise ConfigError(
                f"the files hold {len(self._texts)} different texts and {max(2, config.passages)} are needed "
                "(one of them as the wrong one); pass more rows"
            )
        answers = [answer for question in questions for answer in question.answers]
        self.template_name = template_for(answers) if config.template == "auto" else config.template
        self.template = templates()[self.template_name]
        self._ranks = {question.id: at % config.passages for at, question in enumerate(questions)}
        self._questions = {question.id: question for question in evenly(questions, config.limit)}
        self._sampling = Sampling(max_new_tokens=self.template["max_new_tokens"])
        self._ids: dict[str, Ids] = {}
        self._recent: tuple[list[str], dict[str, list[Part]]] = ([], {})

    def questions(self) -> list[Question]:
        """Those that are put."""
        return list(self._questions.values())

    def groups(self) -> list[list[str]]:
        """Questions about one text side by side, and texts by length: little padding, and prefixes are shared."""
        ordered = sorted(self._questions.values(), key=lambda q: (len(q.context), q.document, self._ranks[q.id], q.id))
        size = self.config.batch_size
        return [[question.id for question in ordered[at : at + size]] for at in range(0, len(ordered), size)]

    def measure(self, group: Sequence[str]) -> Iterator[Sample]:
        questions = [self._questions[name] for name in group]
        forms = [self.forms(question) for question in questions]
        answered: list[dict[str, dict[str, Any]]] = [{arm: {} for arm in forms[0]} for _ in questions]
        prompts = {
            arm: [self.prompt(question, form[arm]) for question, form in zip(questions, forms, strict=True)]
            for arm in forms[0]
        }
        for batch in _batches({arm: max(map(len, made)) for arm, made in prompts.items()}, len(questions)):
            inputs = [prompt.inputs(self.llm) for arm in batch for prompt in prompts[arm]]
            texts = iter(self.llm.generate(inputs, self._sampling))
            for arm in batch:
                for row, (question, form) in enumerate(zip(questions, forms, strict=True)):
                    answered[row][arm] = self._scored(question, arm, next(texts).text.strip(), form[arm])
        for question, arms in zip(questions, answered, strict=True):
            yield {
                "id": question.id,
                "document": question.document,
                "rank": self._ranks[question.id] if self.config.passages > 1 else None,
                "question": question.question,
                "answers": list(question.answers),
                "arms": arms,
            }

    def _scored(self, question: Question, arm: str, prediction: str, parts: Sequence[Part]) -> dict[str, Any]:
        positions = sum(map(len, parts))
        scores = {name: round(METRICS[name](prediction, question.answers), 4) for name in self.template["metrics"]}
        cut = {"cut": True} if arm == "full" and self._was_cut(question, positions) else {}
        return {"positions": positions, "prediction": prediction, **scores, **cut}

    def forms(self, question: Question) -> dict[str, list[Part]]:
        """What each arm puts in the place of the text: parts of (T,) token ids and of (N, D) embeddings."""
        passages = self.passages(question)
        room = self.llm.window - len(self.prompt(question, [])) - self._sampling.max_new_tokens
        if self._recent[0] != passages:  # questions about one text come side by side
            self._recent = passages, self._forms_of(passages)
        forms = dict(self._recent[1])
        largest = max(sum(map(len, parts)) for arm, parts in forms.items() if arm != "full")
        if room < max(1, largest):
            raise BudgetError(
                f"question {question.id!r} leaves {room} positions and its text takes {largest} at the finest ratio; "
                "pass coarser --ratios, or drop its row"
            )
        return forms | {"full": [head(np.concatenate(forms["full"]), room)]}

    @torch.no_grad()
    def _forms_of(self, passages: list[str]) -> dict[str, list[Part]]:
        """Every arm's form of some passages; "full" is not cut."""
        raw = self._joined([self._tokens(passage) for passage in passages])
        flat: Ids = np.concatenate(raw)
        forms: dict[str, list[Part]] = {"none": [], "full": list(raw)}
        ours = self._compressed(passages)
        others = self._compressed(self._wrong(passages)) if "wrong" in self.config.controls else {}
        for ratio in self.config.ratios:
            positions = sum(-(-len(part) // ratio) for part in raw)
            if ours:
                positions = sum(len(part) for part in ours[ratio])
                forms[f"extensible/{ratio}"] = ours[ratio]
            if "truncated" in self.config.controls:
                forms[f"truncated/{ratio}"] = [head(flat, positions)]
            if "lingua" in self.config.controls:
                forms[f"lingua/{ratio}"] = [select_tokens(self.llm, flat, positions)]
            if "random" in self.config.controls and ours:
                forms[f"random/{ratio}"] = [
                    random_embeddings(part, self.config.seed + at) if isinstance(part, Tensor) else part
                    for at, part in enumerate(ours[ratio])
                ]
            if others:
                forms[f"wrong/{ratio}"] = others[ratio]
        return forms

    def prompt(self, question: Question, parts: Sequence[Part]) -> Prompt:
        """The chat prompt with these parts in the place of the text."""
        after = self.template["after"].replace("{question}", question.question)
        return assemble_chat(self.llm, [{"role": "user", "content": [self.template["before"], *parts, after]}])

    def passages(self, question: Question) -> list[str]:
        """The names of the texts that the question is put with, its own at its rank."""
        chosen = self._others(question, self.config.passages - 1)
        chosen.insert(self._ranks[question.id], question.document)
        return chosen

    def summarise(self, samples: Sequence[Sample]) -> dict[str, Any]:
        names = [arm for arm in self._arm_names() if all(arm in sample["arms"] for sample in samples)]
        groups = np.array([sample["document"] for sample in samples])
        metrics = list(self.template["metrics"])
        seed = self.config.seed

        def values(arm: str, metric: str) -> np.ndarray[Any, Any]:
            return np.array([sample["arms"][arm][metric] for sample in samples], dtype=float)

        def compared(arm: str, other: str) -> dict[str, Any]:
            return {m: mean_with_interval(values(arm, m) - values(other, m), groups, seed) for m in metrics}

        arms = {
            arm: {
                "n": len(samples),
                "positions": round(float(values(arm, "positions").mean()), 1),
                "cut": sum(bool(sample["arms"][arm].get("cut")) for sample in samples),
                **{metric: mean_with_interval(values(arm, metric), groups, seed) for metric in metrics},
            }
            for arm in names
        }
        summary: dict[str, Any] = {"template": self.template_name, "metrics": metrics, "arms": arms}
        ours = [ratio for ratio in self.config.ratios if f"extensible/{ratio}" in names]
        summary["minus"] = {
            str(ratio): {
                control: compared(f"extensible/{ratio}", arm)
                for control in CONTROLS
                if (arm := control if control in ("none", "full") else f"{control}/{ratio}") in names
            }
            for ratio in ours
        }
        none, full = values("none", "f1"), values("full", "f1")
        summary["retained"] = {
            str(ratio): share(values(f"extensible/{ratio}", "f1") - none, full - none, groups, seed) for ratio in ours
        }
        summary["by_rank"] = {}
        for rank in sorted({sample["rank"] for sample in samples} - {None}):
            at = np.array([sample["rank"] == rank for sample in samples])
            summary["by_rank"][str(rank)] = {
                arm: {"n": int(at.sum()), **{metric: float(values(arm, metric)[at].mean()) for metric in metrics}}
                for arm in names
            }
        return summary

    # -- texts ------------------------------------------------------------------------------------------------

    def _tokens(self, document: str) -> Ids:
        if document not in self._ids:
            self._ids[document] = self.llm.encode(self._texts[document])
        return self._ids[document]

    def _joined(self, parts: Sequence[Ids]) -> list[Ids]:
        """Parts with the separator's ids between them."""
        separator = self.llm.encode(self.template["separator"])
        joined: list[Ids] = []
        for part in parts:
            joined += [separator, part] if joined else [part]
        return joined

    def _compressed(self, passages: Sequence[str]) -> dict[int, list[Part]]:
        """Ratio -> the passages as embeddings, each compressed on its own, with the separator between them."""
        if self.embedder is None:
            return {}
        ids = [self._tokens(passage) for passage in passages]
        made = self.embedder.compress_ids(ids, ratio=min(self.config.ratios), show_progress=False)
        separator = self.llm.encode(self.template["separator"])
        parts: dict[int, list[Part]] = {}
        for ratio in self.config.ratios:
            parts[ratio] = []
            for each in made:
                parts[ratio] += [separator] if parts[ratio] else []
                parts[ratio].append(each.at_ratio(ratio).embeddings)
        return parts

    def _others(self, question: Question, count: int) -> list[str]:
        """Other texts than the question's, drawn by the seed and the question's id."""
        names = [name for name in self._texts if name != question.document]
        draw = np.random.default_rng([self.config.seed, int.from_bytes(question.id.encode()[-6:], "big")])
        return [names[int(at)] for at in draw.permutation(len(names))[:count]]

    def _wrong(self, passages: Sequence[str]) -> list[str]:
        """For each passage the text nearest to it in length that is none of them; one may come twice."""
        names = [name for name in self._texts if name not in passages]
        if not names:
            raise ConfigError(f"all {len(self._texts)} texts are used as passages; pass more rows or fewer --passages")
        lengths = {name: len(self._texts[name]) for name in self._texts}
        return [min(names, key=lambda name: (abs(lengths[name] - lengths[own]), name)) for own in passages]

    def _was_cut(self, question: Question, positions: int) -> bool:
        return positions < sum(map(len, self._joined([self._tokens(p) for p in self.passages(question)])))

    def _arm_names(self) -> list[str]:
        """The arms in the order in which they are shown."""
        kinds = ("random", "wrong", "truncated", "lingua", "extensible")
        return ["none", *(f"{kind}/{ratio}" for kind in kinds for ratio in self.config.ratios), "full"]


def _batches(lengths: Mapping[str, int], rows: int) -> Iterator[list[str]]:
    """Arms that are answered in one call, the short ones together: a step costs little more for more rows.

    Args:
        lengths: Arm -> positions of its longest prompt.
        rows: Prompts of each arm.
    """
    batch: list[str] = []
    for arm in sorted(lengths, key=lambda arm: lengths[arm]):
        if batch and (len(batch) + 1) * rows * lengths[arm] > _POSITIONS_AT_ONCE:
            yield batch
            batch = []
        batch.append(arm)
    if batch:
        yield batch

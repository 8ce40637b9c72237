"""Measure question answering: what an LLM answers, and how likely the right answer is, by the form of the text.

Every arm fills the same prompt, through the LLM's own chat template, with another form of the same text: see `forms`.
If the whole text does not fit the window, "full" has its first tokens, and the sample says "cut".

With `passages` above 1 the text is that many passages: the question's own and others of the same files. The rank of the
question's own rotates over the questions asked, so that every rank has its share at any limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from extemb_core.context.assembly import Part, Prompt, assemble_chat
from extemb_core.errors import BudgetError, ConfigError
from extemb_core.evaluation.baselines import Ids, head
from extemb_core.evaluation.forms import Forms, arm_name, arm_names, controls_for
from extemb_core.evaluation.metrics import METRICS
from extemb_core.evaluation.runs import Experiment, Sample, groups_of
from extemb_core.evaluation.settings import CONTROLS, QaConfig
from extemb_core.evaluation.statistics import mean_with_interval, share
from extemb_core.models.bulk import positions_at_once
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.entry import PromptInputs
from extemb_core.models.generation import Sampling, turn_end
from extemb_core.models.llm import LLM, MIN_FULL
from extemb_core.questions import Question, read_questions, template_for, templates
from extemb_core.utils.batches import padded_batches
from extemb_core.utils.jsonl import evenly
from extemb_core.utils.validation import require_one_of

_ARMS = (
    "none",
    "random",
    "random_states",
    "wrong",
    "anchors",
    "truncated",
    "lingua",
    "chosen",
    "extensible",
    "focus",
    "full",
)

_CACHED = 8  # so many times the positions of an ordinary pass, if most of them are a prefix that is read once
_Key = tuple[str, int]  # arm, and number of the question


class QaExperiment(Experiment):
    """Asks questions. Without an embedder only "none", "full", "truncated", "chosen" and "lingua" are measured.

    Raises:
        ConfigError: There are too few texts, or a control is asked for that the embedder does not allow, or `remeasure`
            names an arm that is not measured.
    """

    kind: ClassVar[str] = "qa"

    def __init__(self, config: QaConfig, llm: LLM, embedder: ExtensibleEmbedder | None = None) -> None:
        super().__init__(config, llm, embedder)
        self.config = replace(config, controls=controls_for(embedder, config.controls))
        self.remeasure = config.remeasure or ()
        arms = ["none", "full", *(self.config.controls or ()), *(["extensible"] if embedder else [])]
        for arm in self.remeasure:
            require_one_of(arm, "remeasure", arms)
        questions = read_questions(config.data)
        self._texts = {question.document: question.context for question in questions}
        wrong = "wrong" in (self.config.controls or ())
        if len(self._texts) < (needed := max(1 + wrong, config.passages)):
            raise ConfigError(
                f"the files hold {len(self._texts)} different texts and {needed} are needed"
                f"{' (one of them as the wrong one)' if wrong else ''}; pass more rows"
            )
        answers = [answer for question in questions for answer in question.answers]
        self.template_name = template_for(answers) if config.template == "auto" else config.template
        self.template = templates()[self.template_name]
        self.metrics = [*(self.template["metrics"] if config.generate else ()), "loss"]
        if config.one_per_text:
            questions = draw_one_per_text(questions, config.seed)
        self._questions = {question.id: question for question in evenly(questions, config.limit)}
        self._ranks = {name: at % config.passages for at, name in enumerate(self._questions)}
        self._sampling = Sampling(max_new_tokens=self.template["max_new_tokens"])
        self._forms = Forms(
            llm, embedder, self._texts, separator=self.template["separator"], ratios=config.ratios,
            controls=[name for name in self.config.controls or () if name in (self.remeasure or CONTROLS)],
            seed=config.seed,
        )  # fmt: skip

    def questions(self) -> list[Question]:
        """Return the questions that are asked."""
        return list(self._questions.values())

    def groups(self) -> list[list[str]]:
        """Group questions about one text, and texts by length, to share prefixes and need little padding."""
        ordered = sorted(self._questions.values(), key=lambda q: (len(q.context), q.document, self._ranks[q.id], q.id))
        return groups_of([question.id for question in ordered], self.config.batch_size)

    def measure(self, group: Sequence[str]) -> Iterator[Sample]:
        questions = [self._questions[name] for name in group]
        forms = [self.forms(question) for question in questions]
        references = [self.reference(question) for question in questions]
        tables: list[dict[str, dict[str, Any]]] = [
            {arm: {"positions": sum(map(len, parts))} for arm, parts in form.items()} for form in forms
        ]
        inputs = {
            (arm, at): self.prompt(question, parts).inputs(self.llm)
            for at, (question, form) in enumerate(zip(questions, forms, strict=True))
            for arm, parts in form.items()
        }
        same = _of_same_text(inputs)
        first = {key: inputs[key] for key in same}
        for batch in self._batches(first, [tuple(self.passages(question)) for question in questions]):
            answers, scores = self._answers([inputs[key] for key in batch], [references[at] for _, at in batch])
            for key, answer, log_probs in zip(batch, answers, scores, strict=True):
                found: dict[str, Any] = {}
                if answer is not None:
                    found["prediction"] = answer
                    for name in self.template["metrics"]:
                        found[name] = round(METRICS[name](answer, questions[key[1]].answers), 4)
                found["loss"] = round(-float(log_probs.mean()), 6)
                for arm, at in same[key]:
                    tables[at][arm] |= found
        for question, reference, arms in zip(questions, references, tables, strict=True):
            full = arms.get("full")
            if full and full["positions"] < sum(map(len, self._forms.tokens(self.passages(question)))):
                full["cut"] = True
            yield {
                "id": question.id,
                "document": question.document,
                "rank": self._rank(question.id),
                "question": question.question,
                "answers": list(question.answers),
                "answer_tokens": len(reference),
                "arms": arms,
            }

    def is_current(self, sample: Sample) -> bool:
        return sample["id"] not in self._ranks or sample["rank"] == self._rank(sample["id"])

    def _rank(self, name: str) -> int | None:
        """Return the rank of a question's own passage, which depends on the limit; None if it is the only one."""
        return self._ranks[name] if self.config.passages > 1 else None

    def _batches(self, inputs: Mapping[_Key, PromptInputs], texts: Sequence[tuple[str, ...]]) -> Iterator[list[_Key]]:
        """Group prompts, named by arm and question, into passes.

        Prompts of one arm about one text begin with the same form of it, which is read once if that pays; the other
        passes stay small, with little padding.
        """
        alike: dict[tuple[str, tuple[str, ...]], list[_Key]] = {}
        for arm, at in inputs:
            alike.setdefault((arm, texts[at]), []).append((arm, at))
        lengths = {key: len(prompt) + self._sampling.max_new_tokens for key, prompt in inputs.items()}
        limit, single = positions_at_once(self.llm), dict(lengths)
        for keys in alike.values():
            if len(keys) > 1 and self.llm.shares_prefix([inputs[key] for key in keys]):
                # With a shared prefix only the cache grows with the number of questions.
                yield from padded_batches({key: single.pop(key) for key in keys}, _CACHED * limit)
        yield from padded_batches(single, limit, at_least=MIN_FULL)

    def _answers(self, prompts: list[PromptInputs], references: list[Ids]) -> tuple[Sequence[str | None], list[Tensor]]:
        """Let the LLM answer, if asked to, and compute the log-probabilities of the reference answers, in one pass."""
        if not self.config.generate:
            return [None] * len(prompts), self.llm.log_probs(prompts, references, at_once=True)
        answers, scores = self.llm.generate_and_score(prompts, references, self._sampling)
        return [answer.text.strip() for answer in answers], scores

    def forms(self, question: Question) -> dict[str, list[Part]]:
        """Make the form of the text, as parts of a prompt, for each arm.

        Raises:
            BudgetError: The text does not fit the window at the finest ratio.
        """
        passages = self.passages(question)
        forms = self._forms.of(passages, question.question)
        answer = max(self._sampling.max_new_tokens, len(self.reference(question)))
        room = self.llm.context_window - len(self.prompt(question, [])) - answer
        largest = max(sum(map(len, parts)) for arm, parts in forms.items() if arm != "full")
        if room < max(1, largest):
            raise BudgetError(
                f"question {question.id!r} leaves {room} positions and its text takes {largest} at the finest ratio; "
                "pass coarser --ratios, or drop its row"
            )
        forms["full"] = [head(np.concatenate(self._forms.tokens(passages)), room)]
        return {arm: parts for arm, parts in forms.items() if arm.split("/")[0] in (self.remeasure or _ARMS)}

    def reference(self, question: Question) -> Ids:
        """Encode the first reference answer and the end of the assistant's turn: the tokens that training scores."""
        return np.append(self.llm.encode(question.answers[0].strip()), np.int32(turn_end(self.llm)))

    def prompt(self, question: Question, parts: Sequence[Part]) -> Prompt:
        """Make the chat prompt with these parts in the place of the text."""
        after = self.template["after"].replace("{question}", question.question)
        return assemble_chat(self.llm, [{"role": "user", "content": [self.template["before"], *parts, after]}])

    def passages(self, question: Question) -> list[str]:
        """Draw the texts with which a question is asked, by the seed and its id; its own stands at its rank."""
        names = [name for name in self._texts if name != question.document]
        draw = np.random.default_rng([self.config.seed, int.from_bytes(question.id.encode()[-6:], "big")])
        chosen = [names[int(at)] for at in draw.permutation(len(names))[: self.config.passages - 1]]
        chosen.insert(self._ranks[question.id], question.document)
        return chosen

    def summarise(self, samples: Sequence[Sample]) -> dict[str, Any]:
        measured_arms = set.intersection(*(set(sample["arms"]) for sample in samples))
        names = [arm for arm in arm_names(_ARMS, self.config.ratios) if arm in measured_arms]
        groups = np.array([sample["document"] for sample in samples])
        metrics, seed = self.metrics, self.config.seed
        # In a score each question counts the same, in the loss each token.
        weights = dict.fromkeys(metrics, np.ones(len(samples)))
        weights["loss"] = np.array([sample["answer_tokens"] for sample in samples], dtype=float)

        def values(arm: str, metric: str) -> Ids:
            return np.array([sample["arms"][arm][metric] for sample in samples], dtype=float)

        def mean(numbers: Ids, metric: str) -> dict[str, Any]:
            return mean_with_interval(numbers, groups, seed, weights[metric])

        def minus(arm: str, ratio: int) -> dict[str, Any]:
            others = {other: arm_name(other, ratio) for other in ("extensible", *CONTROLS)}
            return {
                name: {metric: mean(values(arm, metric) - values(other, metric), metric) for metric in metrics}
                for name, other in others.items()
                if other in names and other != arm
            }

        arms = {
            arm: {
                "n": len(samples),
                "positions": round(float(values(arm, "positions").mean()), 1),
                "cut": sum(bool(sample["arms"][arm].get("cut")) for sample in samples),
                **{metric: mean(values(arm, metric), metric) for metric in metrics},
            }
            for arm in names
        }
        summary: dict[str, Any] = {"template": self.template_name, "metrics": metrics, "arms": arms}
        ours = [ratio for ratio in self.config.ratios if f"extensible/{ratio}" in names]
        summary["minus"] = {str(ratio): minus(f"extensible/{ratio}", ratio) for ratio in ours}
        focused = [ratio for ratio in self.config.ratios if f"focus/{ratio}" in names]
        summary["focus_minus"] = {str(ratio): minus(f"focus/{ratio}", ratio) for ratio in focused}
        for name, metric, sign in (("retained", "f1", 1), ("retained_loss", "loss", -1)):
            if metric in metrics:
                worth = {arm: sign * weights[metric] * values(arm, metric) for arm in names}
                gains = {arm: value - worth["none"] for arm, value in worth.items()}
                summary[name] = {
                    str(ratio): share(gains[f"extensible/{ratio}"], gains["full"], groups, seed) for ratio in ours
                }
        summary["by_rank"] = {}
        for rank in sorted({sample["rank"] for sample in samples} - {None}):
            at = np.array([sample["rank"] == rank for sample in samples])
            summary["by_rank"][str(rank)] = {
                arm: {"n": int(at.sum())}
                | {m: float(np.average(values(arm, m)[at], weights=weights[m][at])) for m in metrics}
                for arm in names
            }
        return summary


def _of_same_text(inputs: Mapping[_Key, PromptInputs]) -> dict[_Key, list[_Key]]:
    """Group the prompts of a question that are the same text, such as chosen sentences at ratio 1 and the full text."""
    groups: dict[Any, list[_Key]] = {}
    for key, prompt in inputs.items():
        groups.setdefault((key[1], tuple(prompt)) if isinstance(prompt, list) else key, []).append(key)
    return {keys[0]: keys for keys in groups.values()}


def draw_one_per_text(questions: Sequence[Question], seed: int) -> list[Question]:
    """Draw one of the questions about each text, independently of the other texts."""
    by_text: dict[str, list[Question]] = {}
    for question in questions:
        by_text.setdefault(question.document, []).append(question)
    return [
        about[int(np.random.default_rng([seed, int(document, 16)]).integers(len(about)))]
        for document, about in by_text.items()
    ]

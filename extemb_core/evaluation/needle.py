"""Measure how well an LLM finds one thing in a long text: a pass key, or the value of one key among many.

A haystack has exactly the given number of tokens, and its needle stands at a depth from 0 (first) to 1 (last):

    passkey      running text, and one sentence in it that holds a pass key of five digits
    key_value    lines of `key: value`, all of made-up words; the needle is one of them

Each arm puts another form of the same haystack into the same prompt:

    none            nothing
    truncated/k     its first tokens: as many positions as ratio k takes
    chosen/k        sentences that share words with the question, as many positions
    lingua/k        its most informative tokens, as many (only if asked for)
    extensible/k    extensible embeddings at ratio k
    focus/k         a plan for the question, as many positions: how an answer is made by default
    full            all of it

An arm that does not fit the window, beside the prompt and the answer, is absent; see `forms` for how each is made. A
haystack depends on the seed and on its own task, length, depth and trial, not on which others are measured. Its text
is encoded anew to be read: if a file's text was cut within a character, that may be a few tokens more or fewer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from extemb_core.context.assembly import Part, Prompt, assemble_chat
from extemb_core.errors import BudgetError, ConfigError, DocumentError
from extemb_core.evaluation.baselines import Ids
from extemb_core.evaluation.forms import Forms, arm_name, arm_names, controls_for
from extemb_core.evaluation.metrics import contained
from extemb_core.evaluation.runs import Experiment, Sample, groups_of
from extemb_core.evaluation.settings import NEEDLE_CONTROLS, TASKS, NeedleConfig
from extemb_core.evaluation.statistics import differences, mean_with_interval, paired
from extemb_core.models.bulk import POSITIONS_AT_ONCE
from extemb_core.models.chunks import compressed_positions
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.generation import Sampling
from extemb_core.models.llm import LLM
from extemb_core.training.data import read_texts
from extemb_core.utils.batches import padded_batches
from extemb_core.utils.jsonl import evenly

PROMPTS: Mapping[str, Mapping[str, str]] = {
    "passkey": {
        "before": "A pass key is hidden in the following text. Find it and remember it.\n\nText:\n",
        "needle": " The pass key is {answer}; remember it.",
        "after": "\n\nWhat is the pass key in the text? Answer with its five digits only.",
    },
    "key_value": {
        "before": "Each of the following lines holds a key and its value.\n\nLines:\n",
        "needle": "{key}: {answer}\n",
        # The smallest LLMs manage to copy the line; asked for the value alone, they invent one.
        "after": "\n\nWhich line begins with {key}? Copy that line.",
    },
}
_SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]

_ARMS = ("none", "truncated", "lingua", "chosen", "extensible", "focus", "full")

SENTENCES = tuple(Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True)
class Case:
    """One haystack to be made; `id` is the name of its sample."""

    task: str
    tokens: int
    depth: float
    trial: int

    @property
    def id(self) -> str:
        return f"{self.task}:{self.tokens}:{self.depth:g}:{self.trial}"


@dataclass(frozen=True)
class Haystack:
    """One text as (T,) `ids`; the needle's first token is at `at`. `question` comes after the text."""

    task: str
    ids: Ids
    at: int
    question: str
    answer: str


class NeedleExperiment(Experiment):
    """Measures haystacks. Without an embedder only "none", "full", "truncated", "chosen" and "lingua" are measured.

    Raises:
        ConfigError: A control is asked for that the embedder does not allow.
        DocumentError: There is no text in the files.
    """

    kind: ClassVar[str] = "needle"

    def __init__(self, config: NeedleConfig, llm: LLM, embedder: ExtensibleEmbedder | None = None) -> None:
        super().__init__(config, llm, embedder)
        controls = [name for name in controls_for(embedder, config.controls) if name in NEEDLE_CONTROLS]
        if config.controls is None:
            controls.remove("lingua")  # reads a whole haystack anew for each ratio
        self.config = replace(config, controls=tuple(controls))
        self._texts = read_filler(llm, config.data)
        self._sampling = Sampling(max_new_tokens=config.max_new_tokens)
        depths = np.linspace(0, 1, config.depths).round(4).tolist() if config.depths > 1 else [0.5]
        cases = [
            Case(task, tokens, depth, trial)
            for tokens in sorted(config.tokens)
            for task in config.tasks
            for depth in depths
            for trial in range(config.trials)
        ]
        self._cases = {case.id: case for case in evenly(cases, config.limit)}

    def groups(self) -> list[list[str]]:
        """List one haystack per group: its arms are one sample."""
        return groups_of(list(self._cases), 1)

    def measure(self, group: Sequence[str]) -> Iterator[Sample]:
        for name in group:
            case = self._cases[name]
            haystack = self.haystack(case)
            forms = self.forms(haystack)
            prompts = {arm: self.prompt(haystack, parts) for arm, parts in forms.items()}
            lengths = {arm: len(prompt) for arm, prompt in prompts.items()}
            arms: dict[str, dict[str, Any]] = {arm: {"positions": sum(map(len, parts))} for arm, parts in forms.items()}
            for batch in padded_batches(lengths, POSITIONS_AT_ONCE, self.config.batch_size):
                generated = self.llm.generate([prompts[arm].inputs(self.llm) for arm in batch], self._sampling)
                for arm, prediction in zip(batch, (answer.text.strip() for answer in generated), strict=True):
                    correct = bool(contained(prediction, [haystack.answer]))
                    arms[arm] |= {"prediction": prediction, "correct": correct}
            yield {"id": name, **asdict(case), "at": haystack.at, "answer": haystack.answer, "arms": arms}

    def haystack(self, case: Case) -> Haystack:
        """Make the haystack of a case, with its needle in the gap nearest to the depth."""
        draw = np.random.default_rng(
            [self.config.seed, TASKS.index(case.task), case.tokens, round(case.depth * 10_000), case.trial]
        )
        words = PROMPTS[case.task]
        if case.task == "passkey":
            key, answer = "", str(draw.integers(10_000, 100_000))
        else:
            pairs = _pairs(draw)
            key, answer = next(pairs)
        needle = self.llm.encode(words["needle"].format(key=key, answer=answer))
        size = case.tokens - len(needle)
        if case.task == "passkey":
            hay, gaps = filler(self.llm, size, draw, self._texts)
        else:
            lines = (self.llm.encode(words["needle"].format(key=other, answer=value)) for other, value in pairs)
            hay, gaps = _fill(lines, size)
        at = int(gaps[np.abs(gaps - case.depth * size).argmin()])
        ids = np.concatenate([hay[:at], needle, hay[at:]])
        return Haystack(case.task, ids, at, words["after"].format(key=key), answer)

    def forms(self, haystack: Haystack) -> dict[str, list[Part]]:
        """Make the form of the text, as parts of a prompt, for each arm that fits."""
        prompt = len(self.prompt(haystack, []))
        room = self.llm.context_window - prompt - self.config.max_new_tokens
        if room < 0:
            raise BudgetError(
                f"the question of {haystack.task} takes {prompt} positions and its answer up to "
                f"{self.config.max_new_tokens}, more than the {self.llm.context_window} of {self.llm.name}; "
                "lower max_new_tokens or use an LLM with a longer window"
            )
        ratios = [k for k in self.config.ratios if positions_at(len(haystack.ids), k, self.embedder) <= room]
        forms = Forms(
            self.llm, self.embedder, {"": self.llm.decode(haystack.ids.tolist())}, separator="", ratios=ratios,
            controls=self.config.controls or (), seed=self.config.seed,
        ).of([""], haystack.question.strip())  # fmt: skip
        fitting = {arm: parts for arm, parts in forms.items() if sum(map(len, parts)) <= room}
        return {arm: fitting[arm] for arm in arm_names(_ARMS, self.config.ratios) if arm in fitting}

    def prompt(self, haystack: Haystack, parts: Sequence[Part]) -> Prompt:
        """Make the chat prompt with these parts in place of the text; the ids around them are always the same."""
        content = [PROMPTS[haystack.task]["before"], *(parts or [haystack.ids[:0]]), haystack.question]
        return assemble_chat(self.llm, [{"role": "user", "content": content}])

    def summarise(self, samples: Sequence[Sample]) -> dict[str, Any]:
        cells = []
        arms: dict[str, dict[str, Any]] = {}
        minus: dict[str, dict[str, dict[str, Any]]] = {"extensible": {}, "focus": {}}
        for task in self.config.tasks:
            of_task = [sample for sample in samples if sample["task"] == task]
            rows, groups = [sample["arms"] for sample in of_task], np.arange(len(of_task))
            for arm in arm_names(_ARMS, self.config.ratios):
                (correct,), haystacks = paired(rows, groups, "correct", arm)
                if not len(haystacks):
                    continue
                mean = mean_with_interval(correct, haystacks, self.config.seed)
                arms.setdefault(task, {})[arm] = {"n": mean.pop("n"), "correct": mean}
                places = [(of_task[at]["tokens"], of_task[at]["depth"]) for at in haystacks]
                for tokens, depth in sorted(set(places)):
                    in_cell = correct[[place == (tokens, depth) for place in places]]
                    cell = {"task": task, "arm": arm, "tokens": tokens, "depth": depth}
                    cells.append(cell | {"n": len(in_cell), "correct": float(in_cell.mean())})
            for ours, by_task in minus.items():
                for ratio in self.config.ratios:
                    others = {kind: arm_name(kind, ratio) for kind in _ARMS if kind != ours}
                    arm = f"{ours}/{ratio}"
                    if compared := differences(rows, groups, "correct", arm, others, self.config.seed):
                        by_task.setdefault(task, {})[str(ratio)] = compared
        return {"cells": cells, "arms": arms, "minus": minus["extensible"], "focus_minus": minus["focus"]}


# -- texts ----------------------------------------------------------------------------------------------------


def read_filler(llm: LLM, files: Sequence[str]) -> Ids | None:
    """Read all texts of some files as (T,) ids, with an empty line between two; None if there are no files.

    Raises:
        DocumentError: There is no text in them.
    """
    if not files:
        return None
    between = llm.encode("\n\n")
    texts = [llm.encode(text) for file in files for text in read_texts(Path(file)) if text.strip()]
    if not texts:
        raise DocumentError(f"data={tuple(files)!r} holds no text; pass files that do, or none")
    return np.concatenate([part for text in texts for part in (text, between)][:-1])


def filler(llm: LLM, count: int, draw: np.random.Generator, texts: Ids | None = None) -> tuple[Ids, Ids]:
    """Make running text of exactly `count` tokens, and find where a sentence may be put into it.

    Args:
        llm: LLM whose tokenizer encodes the sentences.
        count: Number of tokens.
        draw: Chooses where in `texts` to begin, or the order of the sentences.
        texts: (T,) ids to take it from, continuing at their start after their end; SENTENCES when not given.

    Returns:
        (count,) ids, and ascending offsets from 0 to `count`: between any two tokens of `texts`, or between two
        sentences.
    """
    if texts is None:
        return _fill(_shuffled(llm, draw), count)
    start = int(draw.integers(len(texts)))
    return np.take(texts, np.arange(start, start + count), mode="wrap"), np.arange(count + 1)


def positions_at(n_tokens: int, ratio: int, embedder: ExtensibleEmbedder | None) -> int:
    """Count the positions that `n_tokens` tokens take at a ratio; the tail of each chunk takes one, too."""
    size = embedder.config.chunk_size if embedder is not None else max(1, n_tokens)
    return compressed_positions(n_tokens, ratio, size)


def _fill(pieces: Iterable[Ids], count: int) -> tuple[Ids, Ids]:
    """Join pieces into exactly `count` ids, and return the offsets between the pieces too.

    Surplus ids are cut from the start, so that at every depth a whole piece comes before the needle.
    """
    taken: list[Ids] = []
    total = 0
    for piece in pieces:
        taken.append(piece)
        total += len(piece)
        if total >= count:
            break
    else:
        raise ConfigError(
            f"{count:,} tokens of lines are more than words were made up for; pass tokens up to {total:,}"
        )
    surplus = total - count
    ends = np.cumsum([len(piece) for piece in taken]) - surplus
    return np.concatenate(taken)[surplus:], np.array([0, *ends[ends > 0]])


def _shuffled(llm: LLM, draw: np.random.Generator) -> Iterator[Ids]:
    """Yield SENTENCES endlessly, each round in another random order."""
    encoded = [llm.encode(f" {sentence}") for sentence in SENTENCES]
    while True:
        for at in draw.permutation(len(encoded)):
            yield encoded[at]


def _pairs(draw: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Yield keys and values, no word twice: pronounceable words of three syllables without meaning."""
    size = len(_SYLLABLES)
    numbers = map(int, draw.permutation(size**3))
    words = ("".join(_SYLLABLES[number // size**digit % size] for digit in range(3)) for number in numbers)
    return zip(words, words, strict=False)

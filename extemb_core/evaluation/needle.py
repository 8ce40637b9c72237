"""Measure how well an LLM finds one thing in much text: a pass key, or the value of one key among many.

A haystack has exactly so many tokens, and its needle stands at a depth from 0 (first) to 1 (last):

    passkey      running text, and one sentence in it that holds a pass key of five digits
    key_value    lines of `key: value`, all of made-up words; the needle is one of them

Each arm puts another form of the same haystack into the same prompt:

    none            nothing
    truncated/k     its first tokens: as many positions as ratio k takes
    extensible/k    extensible embeddings at ratio k
    full            all of it

An arm that does not fit the window, beside the prompt and the answer, is absent. A haystack depends on the seed and
on its own task, length, depth and trial: not on which others are measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from extemb_core.context.assembly import Prompt, Segment, assemble_chat
from extemb_core.errors import BudgetError, ConfigError, DocumentError
from extemb_core.evaluation.baselines import Ids, head
from extemb_core.evaluation.forms import arm_name, arm_names, compress_at_ratios
from extemb_core.evaluation.runs import Measured, Sample, batches_by_length, groups_of
from extemb_core.evaluation.scoring import contained
from extemb_core.evaluation.settings import TASKS, NeedleConfig
from extemb_core.evaluation.statistics import mean_with_interval
from extemb_core.models.downscaling import chunk_lengths, n_embeddings
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.generation import Sampling
from extemb_core.models.llm import LLM
from extemb_core.training.data import read_texts
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
        # Copying the line is what the smallest LLMs manage; asked for the value alone they make one up.
        "after": "\n\nWhich line begins with {key}? Copy that line.",
    },
}
_SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]

SENTENCES = (
    "The baker opens his shop before the street lamps go out.",
    "A grey cat sleeps on the wall between the two gardens.",
    "On Mondays the market sells apples, onions and fresh bread.",
    "My aunt keeps her buttons in an old biscuit tin.",
    "The bus to the harbour leaves every half hour.",
    "Rain ran down the window and made small rivers in the dust.",
    "He put the kettle on and looked for a clean cup.",
    "Two children were drawing boats with chalk on the pavement.",
    "The carpenter measured the shelf twice and cut it once.",
    "In winter the pond behind the school freezes from the edge inwards.",
    "She folded the letter and laid it under the clock.",
    "A bicycle without a bell leaned against the fence.",
    "The soup needs a little salt and another ten minutes.",
    "Nobody could say who had left the gate open.",
    "The librarian pushed her trolley slowly past the tall shelves.",
    "Swallows return to the barn when the cherry trees have flowered.",
    "They painted the kitchen yellow because it gets so little sun.",
    "The dog waits by the door until somebody finds his lead.",
    "A train crossed the valley and its sound came a moment later.",
    "Grandfather grows beans along strings tied to the shed.",
    "The lift was out of order, so we took the stairs.",
    "Someone had mended the broken chair with a piece of wire.",
    "At noon the bells ring and the pigeons leave the roof.",
    "The tailor chalks a line on the cloth and reaches for his scissors.",
    "By evening the wind had dropped and the washing was dry.",
)


@dataclass(frozen=True)
class Case:
    """One haystack that is to be made."""

    task: str
    tokens: int
    depth: float
    trial: int

    @property
    def id(self) -> str:
        """Return the name of its sample."""
        return f"{self.task}:{self.tokens}:{self.depth:g}:{self.trial}"


@dataclass(frozen=True)
class Haystack:
    """One text as (T,) `ids`; the needle's first token is at `at`. `question` comes after the text."""

    task: str
    ids: Ids
    at: int
    question: str
    answer: str


class NeedleExperiment(Measured):
    """Measures haystacks. Without an embedder only "none", "truncated" and "full" are measured."""

    kind: ClassVar[str] = "needle"

    def __init__(self, config: NeedleConfig, llm: LLM, embedder: ExtensibleEmbedder | None = None) -> None:
        super().__init__(config, llm, embedder)
        self.config = config
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
        """List one haystack a group: its arms are one sample."""
        return groups_of(list(self._cases), 1)

    def measure(self, group: Sequence[str]) -> Iterator[Sample]:
        for name in group:
            case = self._cases[name]
            haystack = self.haystack(case)
            forms = self.forms(haystack)
            predictions = self._answers({arm: self.prompt(haystack, form) for arm, form in forms.items()})
            yield {
                "id": name,
                **asdict(case),
                "at": haystack.at,
                "answer": haystack.answer,
                "arms": {
                    arm: {
                        "positions": len(form),
                        "prediction": predictions[arm],
                        "correct": bool(contained(predictions[arm], [haystack.answer])),
                    }
                    for arm, form in forms.items()
                },
            }

    def haystack(self, case: Case) -> Haystack:
        """Make the haystack of a case: its needle is in that of the gaps which is nearest to the depth."""
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

    def forms(self, haystack: Haystack) -> dict[str, Segment]:
        """Make what each arm that fits puts in the place of the text: (T,) token ids, or compressed text."""
        ids = haystack.ids
        prompt = len(self.prompt(haystack, ids[:0]))
        room = self.llm.context_window - prompt - self.config.max_new_tokens
        if room < 0:
            raise BudgetError(
                f"the question of {haystack.task} takes {prompt} positions and its answer up to "
                f"{self.config.max_new_tokens}, more than the {self.llm.context_window} of {self.llm.name}; "
                "lower max_new_tokens or use an LLM with a longer window"
            )
        positions = {ratio: positions_at(len(ids), ratio, self.embedder) for ratio in self.config.ratios}
        fitting = [ratio for ratio in self.config.ratios if positions[ratio] <= room]
        forms: dict[str, Segment] = {"none": ids[:0]}
        forms |= {f"truncated/{ratio}": head(ids, positions[ratio]) for ratio in fitting}
        compressed = compress_at_ratios(self.embedder, [ids], fitting)
        forms |= {f"extensible/{ratio}": part for ratio, (part,) in compressed.items()}
        if len(ids) <= room:
            forms["full"] = ids
        return forms

    def prompt(self, haystack: Haystack, form: Segment) -> Prompt:
        """Make the chat prompt with this form in the place of the text; around it, every form has the same ids."""
        content = [PROMPTS[haystack.task]["before"], form, haystack.question]
        return assemble_chat(self.llm, [{"role": "user", "content": content}])

    def summarise(self, samples: Sequence[Sample]) -> dict[str, Any]:
        cells = []
        arms: dict[str, dict[str, Any]] = {}
        minus: dict[str, dict[str, Any]] = {}
        for task in self.config.tasks:
            of_task = [sample for sample in samples if sample["task"] == task]
            for arm in arm_names(("none", "truncated", "extensible", "full"), self.config.ratios):
                having = [sample for sample in of_task if arm in sample["arms"]]
                for tokens, depth in sorted({(sample["tokens"], sample["depth"]) for sample in having}):
                    right = [s["arms"][arm]["correct"] for s in having if (s["tokens"], s["depth"]) == (tokens, depth)]
                    cell = {"task": task, "arm": arm, "tokens": tokens, "depth": depth}
                    cells.append(cell | {"n": len(right), "correct": sum(right) / len(right)})
                if having:
                    mean = self._mean([sample["arms"][arm]["correct"] for sample in having])
                    arms.setdefault(task, {})[arm] = {"n": mean.pop("n"), "correct": mean}
            compared = {str(ratio): self._compared(of_task, ratio) for ratio in self.config.ratios}
            if any(compared.values()):
                minus[task] = {ratio: controls for ratio, controls in compared.items() if controls}
        return {"cells": cells, "arms": arms, "minus": minus}

    def _compared(self, samples: Sequence[Sample], ratio: int) -> dict[str, Any]:
        """Compute the extensible arm less each control, on the haystacks that both read."""
        ours = arm_name("extensible", ratio)
        differences = {}
        for control in ("none", "truncated", "full"):
            arm = arm_name(control, ratio)
            both = [sample["arms"] for sample in samples if ours in sample["arms"] and arm in sample["arms"]]
            if both:
                differences[control] = self._mean([row[ours]["correct"] - row[arm]["correct"] for row in both])
        return differences

    def _mean(self, values: Sequence[int]) -> dict[str, Any]:
        return mean_with_interval(np.array(values, dtype=float), np.arange(len(values)), self.config.seed)

    def _answers(self, prompts: Mapping[str, Prompt]) -> dict[str, str]:
        """Have the LLM answer each arm's prompt; short ones are read together."""
        answers: dict[str, str] = {}
        lengths = {arm: len(prompt) for arm, prompt in prompts.items()}
        for batch in batches_by_length(lengths, batch_size=self.config.batch_size):
            generated = self.llm.generate([prompts[arm].inputs(self.llm) for arm in batch], self._sampling)
            answers |= {arm: answer.text.strip() for arm, answer in zip(batch, generated, strict=True)}
        return answers


# -- texts ----------------------------------------------------------------------------------------------------


def read_filler(llm: LLM, files: Sequence[str]) -> Ids | None:
    """Read all texts of some files as (T,) ids, an empty line between two; None where there are no files.

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
    """Make running text of exactly so many tokens, and find where a sentence may be put into it.

    Args:
        llm: Encodes the sentences.
        count: Tokens.
        draw: Chooses where in `texts` to begin, or the order of the sentences.
        texts: (T,) ids to take it from, going on at their start after their end; SENTENCES when not given.

    Returns:
        (count,) ids, and ascending offsets from 0 to `count`: between any two tokens of `texts`, or between two
        sentences.
    """
    if texts is None:
        return _fill(_shuffled(llm, draw), count)
    start = int(draw.integers(len(texts)))
    return np.take(texts, np.arange(start, start + count), mode="wrap"), np.arange(count + 1)


def positions_at(n_tokens: int, ratio: int, embedder: ExtensibleEmbedder | None) -> int:
    """Count the positions that so many tokens take at a ratio: the tail of each chunk takes one too."""
    size = embedder.config.chunk_size if embedder is not None else max(1, n_tokens)
    return sum(n_embeddings(length, ratio) for length in chunk_lengths(n_tokens, size))


def _fill(pieces: Iterable[Ids], count: int) -> tuple[Ids, Ids]:
    """Join as many pieces as make exactly `count` ids, and return the offsets between them too.

    What is too much is cut from the start: so whatever the depth, a piece that is whole comes before the needle.
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
    """Yield SENTENCES in a random order, then all of them again in another, without end."""
    encoded = [llm.encode(f" {sentence}") for sentence in SENTENCES]
    while True:
        for at in draw.permutation(len(encoded)):
            yield encoded[at]


def _pairs(draw: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Yield keys and values, no word twice."""
    words = map(_word, map(int, draw.permutation(len(_SYLLABLES) ** 3)))
    while pair := tuple(islice(words, 2)):
        yield pair[0], pair[1]


def _word(number: int) -> str:
    """Make a word of three syllables that can be said and means nothing."""
    size = len(_SYLLABLES)
    return "".join(_SYLLABLES[number // size**digit % size] for digit in range(3))

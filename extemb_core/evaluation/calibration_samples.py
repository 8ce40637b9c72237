"""Make the samples by which an entry layer is chosen for an LLM: texts to be continued, and questions about texts.

A task has samples, and each sample a text, a prompt around any form of it, and target tokens after that prompt. Every
arm puts another form of the text into the same prompt:

    none            nothing
    truncated/k     raw tokens, as many positions as ratio k takes: the last ones before what continues a text, the
                    first ones of a text that is asked about
    full            the whole text
    NAME/k          an embedder's, by its name, at ratio k
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from extemb_core.context.assembly import Part, Prompt, assemble_text
from extemb_core.errors import ConfigError
from extemb_core.evaluation.baselines import Ids, nearest
from extemb_core.evaluation.forms import compress_at_ratios
from extemb_core.evaluation.perplexity import spread_windows
from extemb_core.evaluation.qa import QaExperiment
from extemb_core.evaluation.settings import QaConfig
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.utils.jsonl import evenly

Losses = dict[str, float]

CONTEXT_TOKENS, CONTINUED_TOKENS = 512, 128


@dataclass(frozen=True, eq=False)
class Reading:
    """One sample, ready to be read.

    Attributes:
        text: (T,) ids of the text to compress.
        controls: Arm -> the form of the text that it reads.
        prompt: Makes the prompt around a form.
        target: (S,) ids whose loss is measured after it.
    """

    text: Ids
    controls: Mapping[str, list[Part]]
    prompt: Callable[[list[Part]], Prompt]
    target: Ids


class Task(Protocol):
    """One kind of sample; `names` lists all samples, those of similar length side by side."""

    names: list[str]

    def reading(self, name: str) -> Reading:
        """Prepare a sample."""


class Continuations:
    """Texts that continue a compressed context, in windows evenly spread over some documents.

    Args:
        llm: LLM that reads them.
        texts: Documents; no window crosses two of them.
        ratios: Ratios of the truncated texts.
        limit: Maximum number of windows, evenly from all.

    Raises:
        ConfigError: No text is long enough for a sample, or the LLM's window is too short.
    """

    def __init__(self, llm: LLM, texts: Iterable[str], ratios: Sequence[int], limit: int | None = None) -> None:
        size = CONTEXT_TOKENS + CONTINUED_TOKENS
        if size + (llm.bos_token_id is not None) > llm.context_window:
            raise ConfigError(
                f"the window of {llm.name} has {llm.context_window} positions, and text is measured in {size} tokens; "
                "use an LLM with a larger window"
            )
        self._llm, self._ratios = llm, ratios
        self._documents = [llm.encode(text) for text in texts]
        lengths = [len(document) for document in self._documents]
        windows = spread_windows(lengths, max(lengths, default=0), (CONTEXT_TOKENS,), CONTINUED_TOKENS)
        if not windows:
            longest = max(lengths, default=0)
            raise ConfigError(f"no text has the {size} tokens of a sample, the longest has {longest}; pass longer text")
        self._windows = {f"{window.document}:{window.start}": window for window in evenly(windows, limit)}
        self.names = list(self._windows)

    def reading(self, name: str) -> Reading:
        window = self._windows[name]
        document, start = self._documents[window.document], window.start
        context, following = document[start - CONTEXT_TOKENS : start], document[start : start + CONTINUED_TOKENS]
        cut: dict[int, list[Part]] = {ratio: [nearest(context, -(-len(context) // ratio))] for ratio in self._ratios}
        # Without a context the first token follows nothing: so it is given, and not scored.
        prompt: Callable[[list[Part]], Prompt] = lambda form: assemble_text(self._llm, [*form, following[:1]])  # noqa: E731
        return Reading(context, _controls([], cut, [context]), prompt, following[1:])


class Answers:
    """Reference answers to questions about compressed texts, one question a text, put as `extemb eval qa` does.

    Args:
        llm: LLM that reads them.
        files: Files of questions.
        ratios: Ratios of the truncated texts.
        limit: Maximum number of questions, evenly from all.
        seed: Random seed of the draw from the questions about one text.

    Raises:
        ConfigError, DocumentError: See `QaExperiment` and `read_questions`.
    """

    def __init__(
        self, llm: LLM, files: Sequence[str], ratios: Sequence[int], limit: int | None = None, seed: int = 0
    ) -> None:
        config = QaConfig(
            llm=llm.name, data=tuple(files), ratios=tuple(ratios), limit=limit, seed=seed, controls=("truncated",),
            generate=False, one_per_text=True, batch_size=1,
        )  # fmt: skip
        self._llm, self._ratios = llm, ratios
        self._qa = QaExperiment(config, llm)
        self._questions = {question.id: question for question in self._qa.questions()}
        self.names = [name for group in self._qa.groups() for name in group]

    def reading(self, name: str) -> Reading:
        question = self._questions[name]
        forms = self._qa.forms(question)
        cut = {ratio: forms[f"truncated/{ratio}"] for ratio in self._ratios}
        text = self._llm.encode(question.context)
        controls = _controls(forms["none"], cut, forms["full"])
        return Reading(text, controls, partial(self._qa.prompt, question), self._qa.reference(question))


def arm_losses(
    llm: LLM, readings: Sequence[Reading], embedders: Mapping[str, ExtensibleEmbedder], ratios: Sequence[int]
) -> list[Losses]:
    """Measure every arm of one or more samples of a task.

    Returns:
        For each sample, arm -> the mean loss of its target tokens, in nats.
    """
    losses: list[Losses] = [{} for _ in readings]
    targets = [reading.target for reading in readings]
    forms = {arm: [reading.controls[arm] for reading in readings] for arm in readings[0].controls}
    for name, embedder in embedders.items():
        compressed = compress_at_ratios(embedder, [reading.text for reading in readings], ratios)
        forms |= {f"{name}/{ratio}": [[part] for part in parts] for ratio, parts in compressed.items()}
    for arm, arm_forms in forms.items():  # one arm at a time: prompts of similar length need little padding
        prompts = [reading.prompt(form).inputs(llm) for reading, form in zip(readings, arm_forms, strict=True)]
        for by_arm, scores in zip(losses, llm.log_probs(prompts, targets), strict=True):
            by_arm[arm] = round(-float(scores.mean()), 6)
    return losses


def _controls(none: list[Part], cut: Mapping[int, list[Part]], full: list[Part]) -> dict[str, list[Part]]:
    """Gather the controls by arm. At ratio 1 nothing is truncated: that is the full text."""
    return {"none": none} | {f"truncated/{ratio}": form for ratio, form in cut.items() if ratio > 1} | {"full": full}

"""Settings of each kind of measurement, from which the command line makes its options.

Nothing here may need torch: `extemb --help` imports this file, and shows the first sentence on each attribute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from extemb_core.errors import ConfigError
from extemb_core.utils.validation import check_seed, is_count, paths_as_text, require_one_of, whole_number

CONTROLS = ("none", "truncated", "chosen", "focus", "lingua", "anchors", "random", "random_states", "wrong", "full")
NEEDLE_CONTROLS = ("truncated", "chosen", "focus", "lingua")
TASKS = ("passkey", "key_value")
_MIN_TOKENS = 64  # in a haystack: more than any needle has characters


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """Settings that all measurements have.

    Attributes:
        llm: Name, path or hub id of the frozen LLM.
        embedder: Folder or hub id of its embedder; None measures the controls alone.
        data: Data files.
        ratios: Ratios to measure. The controls take as many positions.
        limit: Maximum number of samples, evenly from all.
        seed: Random seed of the bootstrap and of everything drawn.
        batch_size: Samples per batch.
        device: auto (CUDA, then CPU), cpu, cuda or cuda:N.
        dtype: Data type of the LLM: auto (bfloat16 on CUDA, float32 elsewhere), float32, bfloat16 or float16.
    """

    llm: str
    embedder: str | None = None
    data: tuple[str, ...] = ()
    ratios: tuple[int, ...] = (4, 8, 16, 32)
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        paths_as_text(self, "llm", "embedder", files=("data",))
        require_counts(self, "ratios", "batch_size", *(("limit",) if self.limit is not None else ()))
        require_some(self, ratios="at least one ratio")
        check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(CommonConfig):
    """Settings of perplexity after contexts of several lengths. Lengths are in tokens.

    Attributes:
        data: Held-out text: .jsonl[.zst] with a "text" field, .txt, .md.
        contexts: Lengths of context, in tokens (C).
        target: Tokens after the context that are predicted (S). All but the first are scored.
        windows: Windows per document, evenly spread.
        window: Positions that the LLM may use. None is its own window.
        sinks: First tokens that the streaming arm keeps.
    """

    contexts: tuple[int, ...] = (1024, 2048, 4096)
    target: int = 512
    windows: int = 1
    window: int | None = None
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "contexts", "target", "windows")
        require_some(self, contexts="at least one length", data="held-out documents")
        whole_number(self.sinks, "sinks", 0)
        if self.window is not None:
            whole_number(self.window, "window", remedy="positions, or None")
        if self.target < 2:
            raise ConfigError(f"target={self.target}: the first target token is not scored; pass at least 2")


@dataclass(frozen=True, kw_only=True)
class QaConfig(CommonConfig):
    """Settings of question answering.

    Attributes:
        data: Questions: .jsonl[.zst] with id, context, question, answers.
        passages: Passages per question: its own and others.
        template: auto (by the reference answers), short, yes_no or long. They are in `question_templates.json`.
        controls: Besides none and full: truncated, chosen, lingua, random, wrong; above entry layer 0 focus, anchors
            and random_states too. None measures all possible ones.
        generate: Let the LLM answer, or only measure the loss of the right answers, which is faster.
        one_per_text: Ask one question about each text, drawn by the seed.
        remeasure: Measure these arms anew in a finished record and leave its others: controls, or extensible. For a
            change that affects these arms alone. None measures whatever is not measured yet.
    """

    passages: int = 1
    template: str = "auto"
    controls: tuple[str, ...] | None = None
    generate: bool = True
    one_per_text: bool = False
    remeasure: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "passages")
        require_some(self, data="files of questions")
        from extemb_core.questions import templates  # needs numpy

        require_one_of(self.template, "template", ("auto", *templates()))
        for control in self.controls or ():
            require_one_of(control, "controls", CONTROLS)
        for arm in self.remeasure or ():
            require_one_of(arm, "remeasure", ("extensible", *CONTROLS))


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(CommonConfig):
    """Settings of finding the attention heads that look at what answers a question.

    Attributes:
        data: Questions: .jsonl[.zst] with id, context, question, answers. Never those that plans are judged by.
        limit: Maximum number of questions, the same from each source (the id up to its colon) while it has some.
    """

    ratios: tuple[int, ...] = (8,)  # at which heads look at texts

    def __post_init__(self) -> None:
        super().__post_init__()
        require_some(self, data="files of questions")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(CommonConfig):
    """Settings of fitting what reading sentences in less detail costs.

    Attributes:
        data: Questions: .jsonl[.zst] with id, context, question, answers. Never those that plans are judged by.
        passages: Passages per question at most: its own and others.
        plans: Random plans per question.
        limit: Maximum number of questions, the same from each source (the id up to its colon) while it has some.
    """

    ratios: tuple[int, ...] = (2, 4, 8, 16, 32)  # all plans use these
    passages: int = 4
    plans: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "passages", "plans")
        require_some(self, data="files of questions")


@dataclass(frozen=True, kw_only=True)
class NeedleConfig(CommonConfig):
    """Settings of finding one thing in a long text.

    Attributes:
        data: Text to hide pass keys in. `SENTENCES` of `needle.py` when there is none.
        controls: Besides none and full: truncated, chosen, lingua, and above entry layer 0 focus. None measures all
            possible ones but lingua.
        tasks: Tasks to measure, of passkey and key_value.
        tokens: Lengths of text, in tokens.
        depths: Number of depths, evenly from the start of the text to its end. A single one is in the middle.
        trials: Texts per task, length and depth.
        max_new_tokens: Maximum tokens of an answer.
    """

    controls: tuple[str, ...] | None = None
    tasks: tuple[str, ...] = TASKS
    tokens: tuple[int, ...] = (1024, 4096, 16384, 65536, 102400)
    depths: int = 5
    trials: int = 1
    max_new_tokens: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "tokens", "depths", "trials", "max_new_tokens")
        if not self.tokens or min(self.tokens) < _MIN_TOKENS:
            raise ConfigError(
                f"tokens={self.tokens!r}: a haystack must hold its needle; pass lengths from {_MIN_TOKENS}"
            )
        if not self.tasks or not set(self.tasks) <= set(TASKS) or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"tasks={self.tasks!r} must be distinct ones of {', '.join(TASKS)}; pass one or more")
        for control in self.controls or ():
            require_one_of(control, "controls", NEEDLE_CONTROLS)


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(CommonConfig):
    """Settings of timing answers.

    Attributes:
        data: Text to read. A short one is repeated; without any, text is made up.
        tokens: Lengths of text, in tokens.
        rounds: Rounds per length. Each measures every side once.
        new_tokens: Tokens of the answer.
    """

    tokens: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 102400)
    rounds: int = 3
    new_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "tokens", "rounds", "new_tokens")
        require_some(self, tokens="at least one length")
        if self.new_tokens < 2:
            raise ConfigError(f"new_tokens={self.new_tokens}: decoding begins with the second token; pass at least 2")


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(CommonConfig):
    """Settings of finding an entry layer.

    Attributes:
        data: Questions to choose by: .jsonl[.zst] with id, context, question, answers. Without any, text alone decides.
        text: Text to continue: .jsonl[.zst] with a "text" field, .txt, .md. Without any, the Python reference, which
            ships with Python.
        layers: Candidate layers. Without any, those of `candidate_layers`.
        ratios: Ratios to measure, powers of two. One is above 1.
        weighting: Weight of a token in its group: uniform, rank or frequency. See `models/pooling.py`.
        counts: Text to count tokens in, for the weighting "frequency".
        limit: Maximum number of windows of text, and of questions.
    """

    text: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    ratios: tuple[int, ...] = (1, 2, 4, 8)
    weighting: str = "rank"
    counts: tuple[str, ...] = ()
    limit: int | None = 16
    batch_size: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "layers")
        for ratio in self.ratios:
            if ratio & (ratio - 1):
                raise ConfigError(f"ratio={ratio} is not a power of two; pass ratios such as (1, 2, 4, 8)")
        if max(self.ratios) == 1:
            raise ConfigError("ratios=(1,) has none above 1, and at 1 layers do not differ; pass e.g. (1, 2, 4, 8)")
        if (self.weighting == "frequency") != bool(self.counts):
            raise ConfigError(
                f"weighting={self.weighting!r} came with {len(self.counts)} files to count tokens in; pass "
                "weighting='frequency' and counts together, or neither"
            )


def require_counts(config: Any, *names: str) -> None:
    """Raise `ConfigError` unless these fields are positive whole numbers, or tuples or lists of distinct ones."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, list):
            object.__setattr__(config, name, value := tuple(value))
        if not isinstance(value, tuple):
            whole_number(value, name)
        elif not all(is_count(number) for number in value) or len(set(value)) != len(value):
            raise ConfigError(f"{name}={value!r} must be distinct positive whole numbers; pass e.g. (4, 8)")


def require_some(config: Any, **remedies: str) -> None:
    """Raise `ConfigError` for a field that is empty; its remedy says what to pass."""
    for name, remedy in remedies.items():
        if not getattr(config, name):
            raise ConfigError(f"{name} is empty; pass {remedy}")

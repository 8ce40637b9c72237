"""Find the entry layer that suits an LLM for which nothing was trained.

Every candidate layer reads the same samples at the same ratios: texts that continue a compressed context and, if there
are any, questions about compressed texts. `calibration_rule` has the rule.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from extemb_core.errors import ConfigError, DocumentNotFoundError, MissingExtraError, WeightsCorruptError
from extemb_core.evaluation.calibration_plot import plot_losses
from extemb_core.evaluation.calibration_rule import choose_layer
from extemb_core.evaluation.calibration_samples import Answers, Continuations, Task, arm_losses
from extemb_core.evaluation.runs import Experiment, Sample, groups_of, run
from extemb_core.evaluation.settings import CalibrationConfig
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.entry import decoder_layers, default_entry_layer
from extemb_core.models.llm import LLM
from extemb_core.training.data import read_texts
from extemb_core.utils.files import refuse_foreign
from extemb_core.utils.validation import path_of

RECORD, PLOT = "calibration.json", "calibration.png"
_EMBEDDER = ("model.safetensors", "config.json")  # config.json is written last, and shows that there is an embedder
_OURS = {RECORD, f"{RECORD}.partial", PLOT, *_EMBEDDER}
_DEPTHS = (1 / 5, 3 / 10, 2 / 5, 1 / 2, 2 / 3)  # shares of all layers; two fifths is `default_entry_layer`


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Result of a calibration.

    Attributes:
        layer: The entry layer.
        reason: Why this layer, as a phrase to follow "entry layer N: ".
        embedder: The untrained embedder that enters there, as loaded from `folder`.
        folder: Folder to pass as `embedder=`; the record and the plot are there too.
        plot: File of the plot; None if matplotlib is not installed.
        record: Settings, tables and every sample, as in `calibration.json`.
    """

    layer: int
    reason: str
    embedder: ExtensibleEmbedder
    folder: Path
    plot: Path | None
    record: Mapping[str, Any]


class CalibrationExperiment(Experiment):
    """Measures all candidates on each sample. See the module.

    Raises:
        ConfigError: A layer or ratio is not the LLM's, or there are fewer than two samples.
    """

    kind: ClassVar[str] = "calibration"
    embedder = None  # there are several

    def __init__(self, config: CalibrationConfig, llm: LLM) -> None:
        layers = tuple(sorted(config.layers)) or candidate_layers(llm)
        available = len(decoder_layers(llm.model, llm.name))
        if layers[-1] >= available:
            raise ConfigError(
                f"layer {layers[-1]} is beyond the {available} layers of {llm.name}; pass 1 to {available - 1}"
            )
        files, texts = _text(config.text)
        self.llm = llm
        self.config = replace(
            config, layers=layers, data=(*config.data, *files, *config.counts), dtype=str(llm.dtype).split(".")[-1],
            text=tuple(Path(file).name for file in files), counts=tuple(Path(file).name for file in config.counts),
        )  # fmt: skip
        counts = count_tokens(llm, config.counts) if config.counts else None
        self.embedders = {
            layer: ExtensibleEmbedder.untrained(llm, layer, token_weighting=config.weighting, token_counts=counts)
            for layer in layers
        }
        for ratio in config.ratios:
            self.embedders[layers[0]].config.require_ratio(ratio)
        self.tasks: dict[str, Task] = {"text": Continuations(llm, texts, config.ratios, config.limit)}
        if config.data:
            self.tasks["answers"] = Answers(llm, config.data, config.ratios, config.limit, config.seed)
        for name, task in self.tasks.items():
            if len(task.names) < 2:
                raise ConfigError(
                    f"there is 1 sample of {name}, and comparing layers takes 2 or more; pass more {name} or a higher "
                    "limit"
                )

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the deepest candidate, which depends on everything that the others depend on."""
        return self.embedders[max(self.embedders)].fingerprint

    def groups(self) -> list[list[str]]:
        return [
            group
            for kind, task in self.tasks.items()
            for group in groups_of([f"{kind}:{name}" for name in task.names], self.config.batch_size)
        ]

    def measure(self, group: Sequence[str]) -> Iterator[Sample]:
        kind = group[0].split(":")[0]
        readings = [self.tasks[kind].reading(name.removeprefix(f"{kind}:")) for name in group]
        embedders = {str(layer): embedder for layer, embedder in self.embedders.items()}
        losses = arm_losses(self.llm, readings, embedders, self.config.ratios)
        for name, reading, arms in zip(group, readings, losses, strict=True):
            yield {"id": name, "task": kind, "target_tokens": len(reading.target), "arms": arms}

    def summarise(self, samples: Sequence[Sample]) -> dict[str, Any]:
        tasks = {kind: [sample for sample in samples if sample["task"] == kind] for kind in self.tasks}
        return choose_layer(tasks, self.config.layers, self.config.ratios, self.config.seed)


def candidate_layers(llm: LLM) -> tuple[int, ...]:
    """Choose entry layers spread over an LLM, from a fifth to two thirds of its layers.

    Raises:
        ConfigError: It has a single layer, or none that can be shared.
    """
    default_entry_layer(llm)
    available = len(decoder_layers(llm.model, llm.name))
    return tuple(sorted({min(max(1, round(depth * available)), available - 1) for depth in _DEPTHS}))


def count_tokens(llm: LLM, files: Sequence[str]) -> Tensor:
    """Count how often each token occurs in some files of text, (V,)."""
    counts = np.zeros(int(llm.model.get_input_embeddings().num_embeddings), dtype=np.int64)
    for file in files:
        for text in read_texts(Path(file)):
            counts += np.bincount(llm.encode(text), minlength=len(counts))
    return torch.from_numpy(counts)


def calibrate(
    config: CalibrationConfig,
    output: str | os.PathLike[str],
    *,
    llm: LLM | None = None,
    command: Sequence[str] = (),
    resume: bool = True,
    show_progress: bool | None = None,
) -> Calibration:
    """Find the entry layer of an LLM, and write an untrained embedder that enters there.

    A call that was stopped goes on where it was when it is repeated.

    Args:
        config: Settings of the measurement.
        output: A new or empty folder, or that of an earlier call.
        llm: The LLM, if it is loaded already.
        command: The words of the command line, for the record.
        resume: Keep samples of an earlier call with the same settings; otherwise they are measured anew.
        show_progress: Show a bar; None shows it on a terminal.

    Raises:
        ConfigError: See `CalibrationExperiment`; or the folder holds other files, or a call with other settings.
        DocumentError: A file cannot be read.
        WeightsCorruptError: The embedder in the folder is not what was written there.
    """
    output = path_of(output)
    _check_folder(output)
    llm = llm or LLM.from_pretrained(config.llm, device=config.device, dtype=config.dtype)
    experiment = CalibrationExperiment(config, llm)
    record = run(experiment, output / RECORD, command=command, resume=resume, show_progress=show_progress)
    layer, reason = record["summary"]["layer"], record["summary"]["reason"]
    plot: Path | None = output / PLOT
    try:
        plot_losses(record, output / PLOT)
    except MissingExtraError:
        plot = None
    embedder = _write_embedder(experiment.embedders[layer], output)
    return Calibration(layer=layer, reason=reason, embedder=embedder, folder=output, plot=plot, record=record)


def _text(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Read the files of text, or without any the Python reference. Returns their names, and the documents in them."""
    if files:
        return list(files), [text for file in files for text in read_texts(Path(file))]
    try:
        from pydoc_data import topics
    except ImportError as error:  # some distributions leave it out
        raise DocumentNotFoundError(
            "this Python comes without pydoc_data.topics, the text that is measured by default; pass files as text"
        ) from error
    return [str(topics.__file__)], list(topics.topics.values())


def _check_folder(output: Path) -> None:
    """Raise `ConfigError` unless a folder is new, empty, or from an earlier call."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file, and an embedder is a folder; pass the name of a new one")
    names = {path.name for path in output.glob("[!.]*")}  # hidden files are left by a killed call
    foreign = names - _OURS if names & {RECORD, f"{RECORD}.partial"} else names
    refuse_foreign(output, foreign, "a calibration's", ConfigError)


def _write_embedder(embedder: ExtensibleEmbedder, output: Path) -> ExtensibleEmbedder:
    """Write an embedder's files, whole or not at all, and return the embedder loaded from them."""
    hidden = output / ".embedder"
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        embedder.save_pretrained(hidden)
        loaded = ExtensibleEmbedder.from_pretrained(hidden, llm=embedder.llm)
        if loaded.fingerprint != embedder.fingerprint:
            raise WeightsCorruptError(f"{output} does not give back the embedder written there; check the disk")
        for name in _EMBEDDER:
            (hidden / name).replace(output / name)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return loaded

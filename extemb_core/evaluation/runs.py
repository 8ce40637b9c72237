"""Measure samples one by one into a journal, then write everything into one JSON record.

A run that is stopped goes on where it was: each finished sample is a line of `OUT.partial`, on disk before the next
group begins, and is not measured again. The record keeps every sample, so that any table can be recomputed.

Some arms of a finished record can be measured anew, after a change that affects no others: see `Experiment.remeasure`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from extemb_core.errors import ConfigError, DocumentError, DocumentNotFoundError
from extemb_core.evaluation.provenance import provenance
from extemb_core.evaluation.settings import CommonConfig
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.utils.files import atomic_write_text, parse_json, sha256_of
from extemb_core.utils.journal import Journal, require_same_run, to_json
from extemb_core.utils.progress import progress
from extemb_core.utils.validation import path_of
from extemb_core.weights.resolve import short_name

Sample = dict[str, Any]

RECORD_VERSION = 2  # version 1, written without a number, had neither an embedder's kind nor an answer's loss
# Settings that may differ between the parts of one run: the number of samples, and how they are computed.
_FREE = ("limit", "batch_size", "device")
_EMBEDDER_SETTINGS = (
    "entry_layer", "num_layers", "adaptation", "downscaling", "token_weighting", "connector", "chunk_size", "llm_name",
)  # fmt: skip
_REMEDY = "write the result elsewhere, or pass --no-resume to replace it"


class Experiment:
    """One kind of measurement, ready to run, of an LLM with an embedder or without one.

    Attributes:
        kind: "ppl", "qa", "needle", "speed", "plan", "heads" or "calibration".
        hardware: Properties of the machine on which the samples depend, which all parts of a run must share; values
            that JSON can hold, or None.
        config: A frozen dataclass of settings that JSON can hold, with `data` (paths) and `limit` among them.
        remeasure: Kinds of arms that are measured anew in a finished record, whose other arms stay; () for all arms.
    """

    kind: ClassVar[str]
    config: Any
    hardware: dict[str, Any] | None = None
    remeasure: Sequence[str] = ()

    def __init__(self, config: CommonConfig, llm: LLM, embedder: ExtensibleEmbedder | None) -> None:
        self.config = config
        self.llm = llm
        self.embedder = embedder
        if embedder is not None:
            for ratio in config.ratios:
                embedder.config.require_ratio(ratio)

    @property
    def fingerprint(self) -> str | None:
        """Return the embedder's fingerprint; None when only the controls are measured."""
        return self.embedder.fingerprint if self.embedder is not None else None

    @property
    def llm_digest(self) -> str:
        """Return a hash that tells the LLM from others of the same name."""
        return self.llm.weights_digest()

    @property
    def embedder_settings(self) -> dict[str, Any] | None:
        """Return the embedder's settings for the record; None without an embedder."""
        if self.embedder is None:
            return None
        return {name: getattr(self.embedder.config, name) for name in _EMBEDDER_SETTINGS}

    def groups(self) -> list[list[str]]:
        """List the ids of all samples, grouped as they are measured together."""
        raise NotImplementedError

    def measure(self, group: Sequence[str]) -> Iterator[Sample]:
        """Measure a group, or the rest of it after a stopped run; yields samples with their "id".

        With `remeasure`, a sample has only these "arms".
        """
        raise NotImplementedError

    def is_current(self, sample: Sample) -> bool:
        """Return whether a finished sample is what would be measured now, whatever limit it was measured under."""
        return True

    def summarise(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Make the tables; a pure function of the samples."""
        raise NotImplementedError


def groups_of(names: Sequence[str], size: int) -> list[list[str]]:
    """Split names into groups of `size`, in their order; the last may be smaller."""
    return [list(names[at : at + size]) for at in range(0, len(names), size)]


def run(
    experiment: Experiment,
    out: str | os.PathLike[str],
    *,
    command: Sequence[str] = (),
    resume: bool = True,
    show_progress: bool | None = None,
) -> dict[str, Any]:
    """Measure what is not yet measured and write the record.

    Args:
        experiment: The measurement.
        out: File of the record; finished samples are in `out` + ".partial" until the end.
        command: The words of the command line, for the record.
        resume: Keep samples of an earlier run with the same settings; otherwise they are measured anew.
        show_progress: Show a bar; None shows it on a terminal.

    Raises:
        ConfigError: There is nothing to measure; `out` is a folder, holds a run with other settings, finished samples
            that are not asked for, or, if arms are measured anew, other samples; another process writes it; or a loss
            is not finite.
        DocumentError: `out` is not such a record.
        DocumentNotFoundError: Arms are to be measured anew, but `out` does not exist.
    """
    out, identity = path_of(out), _identity(experiment)
    groups = experiment.groups()
    ids = [name for group in groups for name in group]
    if not ids:
        raise ConfigError("no sample fits these settings; pass longer documents or other lengths")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder, and a record is a file; pass a file's name, such as {out / 'a.json'}")
    finished = FinishedSamples(out, identity, experiment, ids, resume=resume)
    origin = provenance(command)
    with closing(finished.journal) as journal, progress(experiment.kind, len(ids), show_progress) as advance:
        advance(sum(name in finished.by_id for name in ids))
        for group in groups:
            if remaining := [name for name in group if name not in finished.by_id]:
                for sample in experiment.measure(remaining):
                    finished.add(sample)
                    advance(1)
                journal.sync()
        samples = [finished.whole(name) for name in ids]
        record = {
            "version": RECORD_VERSION,
            **identity,
            "config": identity["config"] | {name: getattr(experiment.config, name) for name in _FREE},
            "embedder": experiment.embedder_settings,
            **finished.origins(origin),
            "parts": finished.parts,
            "n": len(samples),
            "seconds": round(finished.seconds, 1),
            "summary": experiment.summarise(samples),
            "samples": samples,
        }
        write_record(record, out)
        journal.remove()
    return record


class FinishedSamples:
    """Finished samples of one run, by id, and the time that they took, from its record and its journal.

    If arms are measured anew, samples of the record do not count as finished, and those of the journal have only these
    arms.

    Raises:
        ConfigError: The record or the journal belongs to another run.
        DocumentError: The journal or the record is damaged.
    """

    def __init__(
        self,
        out: Path,
        identity: dict[str, Any],
        experiment: Experiment,
        ids: Sequence[str],
        *,
        resume: bool = True,
    ) -> None:
        file = out.with_name(out.name + ".partial")
        self.remeasure = remeasure = experiment.remeasure
        self.by_id: dict[str, Sample] = {}
        self.seconds = 0.0
        self._n_parts = 0  # parts in the record
        self._record: dict[str, Any] = {}
        self._earlier: dict[str, Sample] = {}
        anew = not resume or Journal.identity_in(file).get("anew")  # a run begun with --no-resume ignores the record
        if remeasure or (not anew and out.is_file()):  # a finished run may go on, with a higher limit
            self._record = read_record(out)
            require_same_run(self._record, identity, out, _REMEDY)
            with _undamaged(out):
                samples = filter(experiment.is_current, self._record["samples"])
                self._earlier = {sample["id"]: sample for sample in samples}
                self.seconds, self._n_parts = self._record["seconds"] + 0.0, self._record["parts"] + 0
        if not remeasure:
            self.by_id |= self._earlier
        elif self._earlier.keys() != set(ids):
            raise ConfigError(
                f"{out} holds {len(self._earlier)} samples and these settings ask for {len(ids)}, not the same ones; "
                f"pass the record's own --limit to measure {', '.join(remeasure)} anew in it"
            )
        marks = {"remeasure": list(remeasure) or None} | ({"anew": True} if anew else {})
        self.journal = Journal(file, identity | marks, _REMEDY, resume=resume)
        with _undamaged(file):
            rows = [row for row in self.journal.rows if row["sample"]["id"] not in self.by_id]
            self.by_id |= {row["sample"]["id"]: row["sample"] for row in rows if experiment.is_current(row["sample"])}
            self.seconds += sum(row["seconds"] for row in rows)
            self._part = 1 + max((row.get("part", 1) for row in rows), default=0)
        if dropped := len(self.by_id.keys() - set(ids)):
            if self.journal.rows:
                self.journal.close()
            else:
                self.journal.remove()
            raise ConfigError(
                f"{out} has {len(self.by_id)} finished samples, and {dropped} of them are not among the {len(ids)} "
                "that these settings ask for; pass twice the run's --limit less one, or no --limit, which keep them "
                f"all, or {_REMEDY}"
            )
        self._has_added = False
        self._last = time.perf_counter()

    @property
    def parts(self) -> int:
        """Number of parts in which the samples were measured."""
        return max(1, self._n_parts + self._part - (not self._has_added))

    def add(self, sample: Sample) -> None:
        """Add a finished sample to the journal, with the time since the last one."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        try:
            self.journal.add({"sample": sample, "seconds": round(seconds, 3), "part": self._part})
        except ValueError as error:
            raise ConfigError(
                f"the sample {sample['id']!r} has a number that is not finite ({error}); the LLM's values overflow: "
                "load it in another dtype, with --dtype float32"
            ) from error
        self.seconds += seconds
        self.by_id[sample["id"]] = sample
        self._has_added = True

    def whole(self, name: str) -> Sample:
        """Return a finished sample with all its arms."""
        sample = self.by_id[name]
        if not self.remeasure:
            return sample
        return self._earlier[name] | {"arms": self._earlier[name]["arms"] | sample["arms"]}

    def origins(self, origin: dict[str, Any]) -> dict[str, Any]:
        """Return the provenance of the samples, and of arms that were measured anew; `origin` is this run's."""
        anew = self._record.get("remeasured", {}) | dict.fromkeys(self.remeasure, origin)
        stays = self.remeasure or self.parts == self._record.get("parts")  # nothing has been measured since
        first = self._record["provenance"] if stays else origin
        return {"provenance": first} | ({"remeasured": anew} if anew else {})


@contextmanager
def _undamaged(file: Path) -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError) as error:
        raise DocumentError(f"{file} is damaged ({error!r}); measure it again with --no-resume") from error


def read_record(file: Path) -> dict[str, Any]:
    """Read a record and check that it is one of the current version.

    Raises:
        DocumentError: The file is missing, not JSON, not the record of a run, or one of another version.
    """
    text = _existing(file).read_bytes()
    try:
        record = parse_json(text)
    except ValueError as error:
        raise DocumentError(f"{file} is not JSON ({error}); measure it again") from error
    needed = ("kind", "config", "data", "fingerprint", "provenance", "parts", "n", "seconds", "summary", "samples")
    missing = [name for name in needed if not isinstance(record, dict) or name not in record]
    if missing:
        raise DocumentError(f"{file} is not the record of a run: it has no {missing[0]!r}; measure it again")
    version = record.get("version", 1)
    if version != RECORD_VERSION:
        raise DocumentError(
            f"{file} is a record of version {version!r}, and this extemb reads version {RECORD_VERSION}; "
            "measure it again with --no-resume, which replaces it"
        )
    return dict(record)


def write_record(record: dict[str, Any], file: Path) -> None:
    """Write a record whole or not at all; one line per sample, so that a diff shows what changed."""
    head = {name: value for name, value in record.items() if name != "samples"}
    lines = ",\n".join(to_json(sample, separators=(",", ":")) for sample in record["samples"])
    text = to_json(head, indent=1)
    atomic_write_text(file, f'{text[:-2]},\n "samples": [\n{lines}\n]\n}}\n')


def _identity(experiment: Experiment) -> dict[str, Any]:
    """Collect what must be equal for a sample of an earlier run to count in this one."""
    config = json.loads(json.dumps(asdict(experiment.config)))
    config |= {"llm": short_name(config["llm"]), "data": [Path(file).name for file in config["data"]]}
    config["embedder"] = short_name(config["embedder"]) if config["embedder"] else None
    return {
        "kind": experiment.kind,
        "config": {name: value for name, value in config.items() if name not in (*_FREE, "remeasure")},
        "data": [{"file": Path(file).name, "sha256": sha256_of(_existing(file))} for file in experiment.config.data],
        "fingerprint": experiment.fingerprint,
        "llm_digest": experiment.llm_digest,
        "hardware": experiment.hardware,
    }


def _existing(file: str | os.PathLike[str]) -> Path:
    path = Path(file)
    if not path.is_file():
        raise DocumentNotFoundError(f"{path} does not exist; check the name")
    return path

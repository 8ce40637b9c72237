"""The results page: Markdown tables and plots from the committed JSON records of evaluation runs, and nothing else.

The page holds no date or number of its own, so the same records always give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks.report import overview, plots
from benchmarks.report.cells import ABSENT, code, escaped, table
from benchmarks.report.sections import SECTIONS
from extemb_core.errors import ConfigError, DocumentError
from extemb_core.evaluation import runs

Record = Mapping[str, Any]

TITLES = {
    "ppl": "Perplexity of the text that follows",
    "qa": "Question answering",
    "speed": "Speed and memory",
    "needle": "Needle in a haystack",
}
OVERVIEW = Path("overview")
LEGEND = f"""\
# Results

Every number here is computed from a record that a command of this project wrote; each section names both. What the
LLM is given in the place of a text:

| arm | the LLM reads |
|---|---|
| `none` | nothing: what it knows without the text |
| `random/k` | random vectors, as many as `extensible/k` has; above entry layer 0 in the place of random tokens |
| `random_states/k` | above entry layer 0: random vectors in the place of the text's own anchors |
| `wrong/k` | the extensible embeddings of another text |
| `anchors/k` | above entry layer 0: the anchors (the last token of each group of k) alone, as ordinary tokens |
| `truncated/k` | the first raw tokens of the text, as many as `extensible/k` takes positions |
| `nearest/k` | the last raw tokens of the context, as many as `extensible/k` takes positions |
| `streaming` | the first few tokens and the most recent, as many as the window holds; `full` where that fits |
| `lingua/k` | the text's most informative tokens (LLMLingua's criterion), as many as `extensible/k` takes positions |
| `chosen/k` | the text's sentences that share most words with the question (BM25), as many tokens as that |
| `extensible/k` | extensible embeddings at ratio k: one position for k tokens |
| `focus/k` | what says most about the question raw, beside few sentences the rest compressed, in as many at most |
| `full` | the whole text: what there is to gain |
| `online/k`, `offline/k` | speed only: embeddings made while the user waits, or read from an earlier run |

- A small LLM hardly reads, whatever it is given: compare arms with the `none` and `full` rows of the same table only.
- [low, high] is a 95% interval from a bootstrap over documents (samples of one document are not independent; each
  haystack of the needle tasks is a document). It is missing where there are fewer than two documents.
- Differences carry a sign and are paired: both arms on the same samples. **Bold**: the interval of a difference, or
  of a share of a gain, excludes 0.
- Shares and scores are in percent, their differences in percentage points, losses in nats per token.
- {ABSENT}: not measured, for instance because it does not fit the LLM's window or the memory.
"""


def read_record(path: Path) -> dict[str, Any]:
    """Read the record of a run and check that it is of a kind that the page shows.

    Raises:
        DocumentError: The file is missing, not JSON, or not a record of this version and of these kinds.
    """
    record = runs.read_record(path)
    if record["kind"] not in TITLES:
        kinds = ", ".join(TITLES)
        raise DocumentError(f"{path} is of kind {record['kind']!r}, not one of {kinds}; leave it out of --records")
    return record


def markdown(records: Sequence[tuple[Path, Record]], links: Mapping[Path, Mapping[str, str]]) -> str:
    """Make the page.

    Args:
        records: File and record of each run, in any order; the page orders them itself.
        links: File of a record, or `OVERVIEW` -> what a plot shows -> link to the plot.
    """
    parts = [LEGEND, *overview.sections(records)]
    parts += [f"![{escaped(shows)}]({link})\n" for shows, link in links.get(OVERVIEW, {}).items()]
    for kind, title in TITLES.items():
        of_kind = sorted((entry for entry in records if entry[1]["kind"] == kind), key=_sort_key)
        if of_kind:
            parts.append(f"## {title}\n")
        for path, record in of_kind:
            names = [record["config"]["llm"], *_data_names(record)]
            parts.append(f"### {', '.join(code(name, cell=False) for name in names)} ({escaped(path.stem)})\n")
            parts.append(_origin_table(path, record))
            parts += [part for part in SECTIONS[kind](record["summary"]) if part]
            parts += [f"![{escaped(shows)}]({link})\n" for shows, link in links.get(path, {}).items()]
    return "\n".join(parts)


def write_report(files: Sequence[Path], output: Path, times: Path | None = None) -> list[Path]:
    """Write the page, and its plots into a folder beside it that has the page's name without ".md".

    Args:
        files: Records.
        output: The page.
        times: File from `benchmarks/first_token.py`, for sets that compare plans for the question with other ways.

    Returns:
        The files that were written, the page first.

    Raises:
        ConfigError: `output` is not a .md file, there is no record, or two have one name.
        DocumentError: A file is not the record of a run, or one of another version or kind; or holds no times.
        MissingExtraError: matplotlib is not installed.
    """
    if output.suffix != ".md":
        raise ConfigError(f"output={str(output)!r} is not a Markdown file; pass a name that ends in .md")
    stems = [file.stem for file in files]
    repeated = next((stem for stem in stems if stems.count(stem) > 1), None)
    if not stems or repeated is not None:
        problem = "there is no record" if repeated is None else f"two records are named {repeated!r}"
        raise ConfigError(f"{problem}; pass JSON files of runs, each with a name of its own")
    records = [(file, read_record(file)) for file in files]
    figures_by_record = {path: plots.figures(record) for path, record in records}  # all, before anything is written
    if sets := overview.compared(records):
        scored = {name: record for name, record in sets.items() if plots.main_score(record["summary"])}
        with_loss = {name: record for name, record in sets.items() if "loss" in record["summary"]["metrics"]}
        quality = {"quality": plots.overview(scored)} if scored else {}
        figures_by_record[OVERVIEW] = quality | ({"loss": plots.overview(with_loss, loss=True)} if with_loss else {})
        if times is not None and (timed := _times(times, scored)):
            figures_by_record[OVERVIEW]["time"] = plots.quality_by_time(scored, timed)
    folder = output.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    written = [output]
    links: dict[Path, dict[str, str]] = {}
    for path, figures in figures_by_record.items():
        links[path] = {}
        for name, figure in figures.items():
            file = folder / f"{path.stem}_{name}.png"
            plots.save(figure, file)
            written.append(file)
            links[path][figure.get_suptitle().replace("\n", "; ")] = quote(f"{folder.name}/{file.name}")
    output.write_bytes(markdown(records, links).encode())
    return written


def _times(file: Path, sets: Mapping[str, Record]) -> dict[str, Record]:
    """Read the times of the sets that are compared."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["sets"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DocumentError(f"{file} is not what benchmarks/first_token.py writes ({error}); measure it") from error
    return {name: found[name] for name in sets if name in found}


def _sort_key(entry: tuple[Path, Record]) -> tuple[str, list[str], str]:
    path, record = entry
    return str(record["config"]["llm"]), _data_names(record), path.name


def _data_names(record: Record) -> list[str]:
    """Return the names of the data files, without folders, even if an edited record has them."""
    return [Path(entry["file"]).name for entry in record["data"]]


def _origin_table(path: Path, record: Record) -> str:
    """Make the table of what a reader needs to repeat the measurement."""
    config, origin = record["config"], record["provenance"]
    embedder = "none: controls only"
    if record["fingerprint"] is not None:
        embedder = f"{code(str(config['embedder']))}, fingerprint {code(record['fingerprint'][:8])}"
        embedder += _embedder(record["embedder"] or {})  # not written by 0.1.0
    rows = [
        ["LLM", code(config["llm"])],
        ["embedder", embedder],
        ["data", ", ".join(map(code, _data_names(record))) or "made by the command"],
        ["n, seed", f"{record['n']:,}, {config['seed']}"],
        ["hardware", escaped(_hardware(origin["hardware"]))],
        ["date, revision", _when(origin)],
        ["command", code(origin["command"])],
        *(
            [f"{escaped(arm)} measured anew", f"{_when(origin)}, {code(origin['command'])}"]
            for arm, origin in record.get("remeasured", {}).items()
        ),
        ["record", code(path.name)],
    ]
    return table(["run", ""], rows, right=False)


def _when(origin: Record) -> str:
    git = origin["git"]
    revision = code(git["revision"][:8]) if git.get("revision") else "unknown revision"
    return f"{escaped(origin['date'])}, {revision}" + (" with uncommitted changes" if git.get("dirty") else "")


def _embedder(settings: Record) -> str:
    """Describe the kind of embedder in words; unknown settings are left out."""
    words = {"entry_layer": "entry layer {}", "adaptation": "adaptation {}", "downscaling": "pooling {}",
             "token_weighting": "weights {}"}  # fmt: skip
    if not settings.get("entry_layer"):
        del words["token_weighting"]  # has no meaning there
    return "".join(f", {escaped(form.format(settings[key]))}" for key, form in words.items() if key in settings)


def _hardware(machine: Record) -> str:
    """Describe the machine in words; unknown properties are left out."""
    words = {
        "cpu": "{}",
        "cpu_cores": "{} cores",
        "threads": "{} threads",
        "memory_gib": "{} GiB of memory",
        "accelerator": "{}",
        "system": "{}",
        "load_before": "load {} before the run",
    }
    known = dict(machine) | {"accelerator": machine.get("accelerator") or "no accelerator"}
    return ", ".join(form.format(known[key]) for key, form in words.items() if known.get(key) is not None)

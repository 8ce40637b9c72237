"""`extemb calibrate`: find the layer at which an LLM best reads compressed text without training."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from extemb_core.cli.allocation import keep_freed_memory
from extemb_core.cli.eval import ResumeOption, SeedOption, whole_numbers
from extemb_core.cli.options import DeviceOption, DtypeOption, JsonOption
from extemb_core.cli.output import library_output, print_json, print_note, reported
from extemb_core.cli.tables import show_table


@reported
def calibrate(
    llm: Annotated[
        str, typer.Option("--llm", metavar="NAME", help="The frozen LLM: a known name, a folder or a Hugging Face id.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", metavar="DIR", help="Folder for the embedder, the record and a plot; a new one."),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FILE...",
            help="Questions to choose by: .jsonl[.zst] with id, context, question, answers.",
            show_default="text alone decides",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="FILE...",
            help='Text that is continued: .jsonl[.zst] with a "text" field, .txt, .md.',
            show_default="the Python reference that ships with Python",
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers",
            metavar="N...",
            help="Candidates.",
            show_default="five, from a fifth to two thirds of all layers",
        ),
    ] = None,
    ratios: Annotated[
        list[str] | None,
        typer.Option("--ratios", metavar="N...", help="Ratios to measure, powers of two.", show_default="1 2 4 8"),
    ] = None,
    weighting: Annotated[
        str,
        typer.Option("--weighting", metavar="NAME", help="Weight of a token in its group: uniform, rank or frequency."),
    ] = "rank",
    counts: Annotated[
        list[str] | None,
        typer.Option("--counts", metavar="FILE...", help="Text to count tokens in, for --weighting frequency."),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", help="At most so many windows of text, and so many questions.")
    ] = 16,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    resume: ResumeOption = True,
    as_json: JsonOption = False,
) -> None:
    """Find the layer at which an LLM best reads compressed text, and write an embedder that enters there.

    Nothing is trained. Resumes if interrupted.
    """
    given = {
        "data": tuple(data or ()),
        "text": tuple(text or ()),
        "layers": whole_numbers("layers", layers or ()),
        "ratios": whole_numbers("ratios", ratios or ()),
        "counts": tuple(counts or ()),
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value}
    keep_freed_memory()
    with library_output():
        from extemb_core.evaluation.calibration import CalibrationConfig
        from extemb_core.evaluation.calibration import calibrate as find_layer

        config = CalibrationConfig(
            llm=llm, weighting=weighting, limit=limit, seed=seed, device=device, dtype=dtype, **settings
        )  # fmt: skip
        try:
            found = find_layer(config, output, command=["extemb", *sys.argv[1:]], resume=resume)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; the same command goes on from {output}") from None
    record = found.record
    if as_json:
        print_json(
            {
                "layer": found.layer,
                "reason": found.reason,
                "output": str(output),
                "fingerprint": found.embedder.fingerprint,
                "plot": str(found.plot) if found.plot else None,
                "seconds": record["seconds"],
                "summary": record["summary"],
            }
        )
        return
    remarks = dict.fromkeys(record["summary"]["unfit"], " (out)") | {str(found.layer): " (chosen)"}
    for kind, table in record["summary"]["tasks"].items():
        columns, rows = _table(kind, table, record["config"]["ratios"], remarks)
        show_table(columns, rows, numbers=columns[1:])
        typer.echo()
    typer.echo(f"entry layer {found.layer}: {found.reason}")
    print_note(f"{record['n']} samples in {record['seconds']:.0f} s; use it with --embedder {output}")
    if found.plot is None:
        print_note("no plot: it needs matplotlib; run: pip install 'extemb[eval]'")


def _table(
    kind: str, table: Mapping[str, Any], ratios: Sequence[int], remarks: Mapping[str, str]
) -> tuple[tuple[str, ...], list[list[str]]]:
    """Columns and rows: losses of one task by arm and ratio, and how the layers compare."""
    losses = {arm: value["mean"] for arm, value in table["arms"].items()}
    coarse = [ratio for ratio in sorted(ratios) if ratio > 1]
    average = f"mean of {', '.join(map(str, coarse))}"
    columns = (f"loss of {kind} (n = {table['n']})", *(f"ratio {ratio}" for ratio in ratios), average, "minus the best")

    def row(name: str, arm: str, difference: str = "") -> list[str]:
        """`arm` has a place for the ratio, or is the same at every one; at ratio 1 nothing is cut."""
        by_ratio = {ratio: losses.get(arm.format(ratio), losses["full"]) for ratio in ratios}
        mean = sum(by_ratio[ratio] for ratio in coarse) / len(coarse)
        return [name, *(f"{loss:.3f}" for loss in (*by_ratio.values(), mean)), difference]

    rows = [row("no text", "none"), row("cut to as many positions", "truncated/{}"), row("full text", "full")]
    for layer, own in table["layers"].items():
        low, high = own["minus_best"]["interval"]
        name = f"layer {layer}{remarks.get(layer, '')}"
        rows.append(row(name, f"{layer}/{{}}", f"{own['minus_best']['mean']:+.3f} ({low:+.3f} to {high:+.3f})"))
    return columns, rows

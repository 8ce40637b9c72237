"""`extemb calibrate`: find the layer at which an LLM best reads compressed text without training."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from extemb_core.cli.config_options import options_from
from extemb_core.cli.memory import keep_freed_memory
from extemb_core.cli.options import JsonOption, LlmOption, ResumeOption, option
from extemb_core.cli.output import explain_interrupt, goes_on_from, library_output, print_json, print_note, print_table
from extemb_core.evaluation.settings import CalibrationConfig


@options_from(
    CalibrationConfig,
    "data", "text", "layers", "ratios", "weighting", "counts", "limit", "seed", "device", "dtype",
    data="text alone decides",
    text="the Python reference that ships with Python",
    layers="five, from a fifth to two thirds of all layers",
)  # fmt: skip
def calibrate(
    llm: LlmOption,
    output: Annotated[str, option("--output", "DIR", "Folder for the embedder, the record and a plot; a new one.")],
    resume: ResumeOption = True,
    as_json: JsonOption = False,
    **settings: Any,
) -> None:
    """Find the layer at which an LLM best reads compressed text, and write an embedder that enters there.

    Nothing is trained. Resumes if interrupted.
    """
    keep_freed_memory()
    with library_output():
        from extemb_core.evaluation.calibration import calibrate as find_layer

        config = CalibrationConfig(llm=llm, **settings)
        with explain_interrupt(lambda: goes_on_from(output, resume=resume)):
            calibration = find_layer(config, Path(output), command=["extemb", *sys.argv[1:]], resume=resume)
    record = calibration.record
    if as_json:
        value = {"layer": calibration.layer, "reason": calibration.reason, "output": output}
        value |= {"fingerprint": calibration.embedder.fingerprint, "seconds": record["seconds"]}
        print_json(value | {"plot": calibration.plot and str(calibration.plot), "summary": record["summary"]})
        return
    remarks = dict.fromkeys(record["summary"]["unfit"], " (out)") | {str(calibration.layer): " (chosen)"}
    for kind, table in record["summary"]["tasks"].items():
        _print_losses(kind, table, record["config"]["ratios"], remarks)
        typer.echo()
    typer.echo(f"entry layer {calibration.layer}: {calibration.reason}")
    print_note(f"{record['n']} samples in {record['seconds']:.0f} s; use it with --embedder {output}")
    if calibration.plot is None:
        print_note("no plot: it needs matplotlib; run: pip install 'extemb[eval]'")


def _print_losses(kind: str, table: Mapping[str, Any], ratios: Sequence[int], remarks: Mapping[str, str]) -> None:
    """Print the losses of one task by arm and ratio, and how the layers compare."""
    losses = {arm: value["mean"] for arm, value in table["arms"].items()}
    coarse_ratios = [ratio for ratio in sorted(ratios) if ratio > 1]
    average = f"mean of {', '.join(map(str, coarse_ratios))}"
    columns = (f"loss of {kind} (n = {table['n']})", *(f"ratio {ratio}" for ratio in ratios), average, "minus the best")

    def row(name: str, arm: str, difference: str = "") -> list[object]:
        """Fill a row; `arm` may have a placeholder for the ratio; at ratio 1 nothing is truncated."""
        by_ratio = {ratio: losses.get(arm.format(ratio), losses["full"]) for ratio in ratios}
        mean = sum(by_ratio[ratio] for ratio in coarse_ratios) / len(coarse_ratios)
        return [name, *by_ratio.values(), mean, difference]

    rows = [row("no text", "none"), row("cut to as many positions", "truncated/{}"), row("full text", "full")]
    for layer, comparison in table["layers"].items():
        mean, (low, high) = comparison["minus_best"]["mean"], comparison["minus_best"]["interval"]
        name = f"layer {layer}{remarks.get(layer, '')}"
        rows.append(row(name, f"{layer}/{{}}", f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"))
    print_table(columns, rows, right=columns[-1:])

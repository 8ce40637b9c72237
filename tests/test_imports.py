"""The import graph: what a module needs is below it, and what is imported late has a reason."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "extemb_core"
MAX_ROOT_FILES = 9


def module_of(file: Path) -> str:
    """Name the module of a file."""
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports_of(file: Path) -> tuple[set[str], set[str]]:
    """List the modules of this package that a file imports: when it is imported, and inside its functions.

    Imports for type checkers alone are neither.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    early: set[str] = set()
    late: set[str] = set()

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            (late if inside else early).update(names & MODULES.keys())
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(tree, False)
    return early, late - early


GRAPH = {name: imports_of(file) for name, file in MODULES.items()}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of a circle, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_needs_one_that_needs_it() -> None:
    assert circle_in({name: early for name, (early, _) in GRAPH.items()}) == []


def test_imports_inside_functions_close_no_circle() -> None:
    assert circle_in({name: early | late for name, (early, late) in GRAPH.items()}) == []


def test_the_root_is_short() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_ROOT_FILES


def test_a_module_uses_no_private_name_of_another() -> None:
    private = []
    for name, file in MODULES.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        ours = {alias.asname or alias.name: alias.name for node in imported for alias in node.names
                if str(node.module).startswith("extemb_core")}  # fmt: skip
        used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
        names = [*ours.values(), *(node.attr for node in used if ast.unparse(node.value) in ours)]
        private += [f"{name}: {used}" for used in names if used.startswith("_") and not used.endswith("__")]
    assert private == []

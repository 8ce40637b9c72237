"""The tree drawn in errors.py is the tree of the classes."""

from __future__ import annotations

import builtins
import inspect
import pickle
import re

import pytest

from extemb_core import errors

DRAWN = re.findall(r"^( {4}[│├└─ ]*)(\w+Error)(?: \((\w+)\))?", errors.__doc__ or "", flags=re.MULTILINE)
CLASSES = {name: cls for name, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__}


def parents() -> dict[str, str | None]:
    """Each drawn class with the class it hangs from, by indentation."""
    above: list[tuple[int, str]] = []
    found: dict[str, str | None] = {}
    for indent, name, _ in DRAWN:
        while above and above[-1][0] >= len(indent):
            above.pop()
        found[name] = above[-1][1] if above else None
        above.append((len(indent), name))
    return found


def test_every_class_is_drawn_once() -> None:
    assert sorted(name for _, name, _ in DRAWN) == sorted(CLASSES)


@pytest.mark.parametrize(("name", "parent"), parents().items())
def test_a_class_inherits_the_one_it_hangs_from(name: str, parent: str | None) -> None:
    assert CLASSES[name].__bases__[0] is (CLASSES[parent] if parent else Exception)


@pytest.mark.parametrize(("name", "builtin"), [(name, builtin) for _, name, builtin in DRAWN])
def test_a_class_inherits_the_builtin_drawn_beside_it(name: str, builtin: str) -> None:
    own = {base.__name__ for base in CLASSES[name].__bases__ if base.__module__ == builtins.__name__}
    assert own - {"Exception"} == ({builtin} if builtin else set())


@pytest.mark.parametrize("cls", [cls for name, cls in CLASSES.items() if name != "MissingExtraError"])
def test_the_message_is_shown_as_written_and_survives_pickling(cls: type[errors.ExtembError]) -> None:
    error = cls("ratio=3 is not trained; pass 4")
    assert str(error) == "ratio=3 is not trained; pass 4"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_missing_extra_says_what_to_type() -> None:
    error = errors.MissingExtraError("pypdf", "documents", "reading a.pdf")
    assert str(error) == ("reading a.pdf needs pypdf, which is not installed; run: pip install 'extemb[documents]'")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    error = errors.MissingExtraError("s3fs", None, "reading s3://a")
    assert str(error) == "reading s3://a needs s3fs, which is not installed; run: pip install s3fs"

"""What `import extemb_core` offers, and that it is light."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import extemb_core


def test_all_names_exist_and_are_listed():
    for name in extemb_core.__all__:
        assert getattr(extemb_core, name) is not None
    assert set(extemb_core.__all__) <= set(dir(extemb_core))
    assert set(extemb_core._HOMES) == set(extemb_core.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Embeddings'"):
        _ = extemb_core.Embeddings


def test_importing_loads_neither_torch_nor_transformers():
    code = "import sys, extemb_core; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_version_is_the_distribution_s():
    from importlib.metadata import version

    assert version("extemb") == extemb_core.__version__


def test_the_changelog_s_last_release_is_this_version():
    changelog = (Path(__file__).resolve().parent.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)[0] == extemb_core.__version__

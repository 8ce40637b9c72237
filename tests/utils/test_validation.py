"""Checks of settings."""

from __future__ import annotations

import subprocess
import sys

import pytest

from extemb_core.utils.validation import is_count


@pytest.mark.parametrize("value", [1, 10**9])
def test_positive_whole_numbers_count(value):
    assert is_count(value)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", None])
def test_nothing_else_does(value):
    assert not is_count(value)


def test_configurations_and_plans_need_no_torch():
    modules = "training.config", "evaluation.settings", "context.planning"
    imports = ", ".join(f"extemb_core.{module}" for module in modules)
    code = f"import sys, {imports}; sys.exit(', '.join({{'torch', 'numpy'}} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

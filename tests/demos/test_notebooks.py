"""The notebooks as they are shipped: short, and with the outputs of one run from top to bottom."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

DEMOS = Path(__file__).resolve().parents[2] / "demos"


@pytest.mark.parametrize("path", sorted(DEMOS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_short_and_has_its_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert len(cells) <= 15
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    printing = [cell for cell in code if "print(" in "".join(cell["source"])]
    assert printing
    for cell in printing:
        assert cell["outputs"], cell["source"]
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert "stream" in kinds <= {"stream", "execute_result", "display_data"}
    assert not [output["text"] for cell in code for output in cell["outputs"] if output.get("name") == "stderr"]
    for cell in code:
        drawn = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
        assert len(drawn) == "".join(cell["source"]).count("plt.show()")
    assert "/root" not in path.read_text(encoding="utf-8")

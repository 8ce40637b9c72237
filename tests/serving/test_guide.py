"""The example of the server's guide, on the default model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from served import served

from extemb_core import ExtensibleLM

pytest.importorskip("faiss")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.real_model
@pytest.mark.usefixtures("real_weights_once", "shorter_guide")
@pytest.mark.allow_hosts(["127.0.0.1"])
def test_the_example_runs(tmp_path, capsys):
    guide = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- example -->\n```python\n(.*?)```", guide, re.DOTALL)
    with served(ExtensibleLM.from_pretrained(), tmp_path, name="smollm2-135m-joint") as server:
        variables = {}
        exec(compile(found[1].replace("http://127.0.0.1:8000", server.url), "server.md", "exec"), variables)
        variables["client"].close()
    answer, positions, fidelity = capsys.readouterr().out.strip().splitlines()
    assert "Python" in answer
    taken, _, _, n_tokens, *_ = positions.split()  # "418 positions for 2967 tokens of documents"
    assert 0 < int(taken) - int(n_tokens) / 8 < 100  # besides the document at ratio 8 a short question
    assert fidelity == "8"

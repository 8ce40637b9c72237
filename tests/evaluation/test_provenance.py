from __future__ import annotations

import json
import os

import torch

from extemb_core.evaluation.provenance import ROOT, git_revision, provenance


def test_no_folder_of_the_machine_is_named(tmp_path):
    inside = ROOT / "benchmarks" / "speed.py"
    command = ["python", str(inside), "--llm", "owner", f"--json={tmp_path}/x.json", str(tmp_path / "data.zst")]
    found = provenance(command)
    assert found["command"] == f"python benchmarks{os.sep}speed.py --llm owner --json=x.json data.zst"
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["threads"] == torch.get_num_threads()
    json.dumps(found, allow_nan=False)


def test_an_installed_package_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.setattr("extemb_core.evaluation.provenance.ROOT", tmp_path)
    assert git_revision() == {"revision": None, "dirty": None}

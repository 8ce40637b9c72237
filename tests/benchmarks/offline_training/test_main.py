"""The command: a training is packed, run and unpacked, and what cannot be done is one line on stderr."""

from __future__ import annotations

import re

import pytest
from tiny import SENTENCES, save_tiny

from benchmarks.ending import run as run_script
from benchmarks.offline_training.__main__ import main

RECIPE = """
embedder: {num_layers: 1, chunk_size: 16, ratios: [2, 4]}
stages: [{name: text, share: 1, sample_length: 48, batch_size: 1, objectives: {two_stream: 1}}]
"""


@pytest.fixture
def refused(capsys):
    """Return what is said about a command line that is refused, after checking that it is one line."""

    def call(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_script(lambda: main([str(word) for word in words]))
        assert caught.value.code == 2
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert (said.out, line[:7]) == ("", "error: ")
        return line

    return call


def test_a_training_is_packed_run_and_unpacked(tmp_path, capsys, refused):
    save_tiny(tmp_path)
    (tmp_path / "own.yaml").write_text(RECIPE)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{name} {SENTENCES}")
    bundle, left, result = (str(tmp_path / name) for name in ("bundle", "left", "result"))
    packing = ["pack", "--llm", tmp_path / "llm", "--recipe", tmp_path / "own.yaml", "--output", bundle, "--data",
               tmp_path / "a.txt", tmp_path / "b.txt", "--total-tokens", "96", "--dtype", "float32"]  # fmt: skip
    main([str(word) for word in packing])
    said = capsys.readouterr()
    assert said.out == f"{bundle}\n"
    assert re.search(r"1 slices, \d MiB; copy the folder, then there:\npython run.py", said.err)
    assert "exists; pass another folder" in refused(*packing)
    main(["run", bundle, "--output", left])
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == left
    assert f"unpack {left} --output DIR" in said.err
    main(["unpack", left, "--output", result])
    assert (tmp_path / "result" / "model.safetensors").is_file()
    (tmp_path / "left" / "state-000").unlink()
    assert "state-000" in refused("unpack", left, "--output", tmp_path / "again")
    assert "is not a size above 0" in refused(*packing[:6], tmp_path / "other", "--slice-size", "much")

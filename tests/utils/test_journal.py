"""A journal keeps whole rows of one run, and says of which it is."""

from __future__ import annotations

import json

import pytest

from extemb_core.errors import ConfigError, DocumentError
from extemb_core.utils import journal as journal_module
from extemb_core.utils.journal import Journal

RUN = {"kind": "count", "settings": {"limit": 3, "by": [1, 2]}}


def kept(file, run=RUN):
    journal = Journal(file, run, "remove it")
    journal.close()
    return journal.rows


def test_rows_are_there_when_a_run_goes_on(tmp_path):
    file = tmp_path / "new" / "rows.partial"
    journal = Journal(file, RUN, "remove it")
    journal.add({"n": 1, "text": "é\u2028"})
    assert json.loads(file.read_bytes().splitlines()[1]) == {"n": 1, "text": "é\u2028"}  # also while it is open
    with pytest.raises(ConfigError, match="is being written by another run; wait for that"):
        kept(file)
    journal.add({"n": 2})
    journal.close()
    assert [row["n"] for row in kept(file)] == [1, 2]


def test_what_is_dropped_or_removed_is_no_other_runs(tmp_path):
    file = tmp_path / "rows"
    first = Journal(file, RUN, "remove it")
    first.add({"n": 1})
    with pytest.raises(ConfigError, match="is being written by another run"):
        Journal(file, RUN, "remove it", resume=False)
    first.close()
    again = Journal(file, RUN | {"kind": "other"}, "remove it", resume=False)
    assert again.rows == []
    assert len(file.read_text().splitlines()) == 1
    again.remove()
    again.close()
    assert not file.exists()


@pytest.mark.parametrize("cut", [1, 5, 20, 60, 90])
def test_half_a_line_is_no_row(tmp_path, cut):
    file = tmp_path / "rows"
    for n in range(2):
        journal = Journal(file, RUN, "remove it")
        journal.add({"n": n})
        journal.close()
    file.write_bytes(file.read_bytes()[:-cut])
    before = kept(file)
    assert before == [{"n": n} for n in range(2)][: len(before)]
    journal = Journal(file, RUN, "remove it")
    journal.add({"n": 7})
    journal.close()
    assert kept(file) == [*before, {"n": 7}]
    assert all(json.loads(line) for line in file.read_text().splitlines())


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (RUN | {"kind": "sum"}, r"another kind \('count', now 'sum'\); remove it"),
        (RUN | {"settings": {"limit": 4, "by": [1, 2]}}, r"another limit \(3, now 4\)"),
        (RUN | {"settings": {"limit": 3, "by": [1]}}, "another by"),
        (RUN | {"new": 1}, r"another new \(None, now 1\)"),
    ],
)
def test_the_rows_of_another_run_are_refused_and_stay(tmp_path, run, said):
    file = tmp_path / "rows"
    kept(file)
    assert kept(file, run) == []  # where nothing was finished yet
    assert Journal.identity_in(file) == run
    file.unlink()
    journal = Journal(file, RUN, "remove it")
    journal.add({"n": 1})
    journal.close()
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=said):
        kept(file, run)
    assert file.read_bytes() == before


def test_what_another_run_writes_until_its_end_is_neither_cut_nor_lost(tmp_path, monkeypatch):
    """Both at the moment between this one's looking for the file and its lock."""
    file = tmp_path / "rows"
    other = Journal(file, RUN, "remove it")
    lock = journal_module.lock

    def late(handle):
        monkeypatch.setattr(journal_module, "lock", lock)
        other.add({"n": 1})
        other.close()
        return lock(handle)

    monkeypatch.setattr(journal_module, "lock", late)
    assert kept(file) == [{"n": 1}]

    def gone(handle):
        monkeypatch.setattr(journal_module, "lock", lock)
        file.unlink()
        return lock(handle)

    monkeypatch.setattr(journal_module, "lock", gone)
    journal = Journal(file, RUN, "remove it")
    journal.add({"n": 2})
    journal.close()
    assert kept(file) == [{"n": 2}]


@pytest.mark.parametrize(
    "content",
    ["[]\n", "7\n", "no JSON\n", '{"n": 1}\n', '{"identity": 7}\n', f'{{"identity": {json.dumps(RUN)}}}\n7\n'],
)
def test_a_damaged_file_is_an_error(tmp_path, content):
    file = tmp_path / "rows"
    file.write_text(content)
    with pytest.raises(DocumentError, match="is damaged .*; remove it to begin anew"):
        kept(file)
    assert file.read_text() == content


def test_a_folder_that_cannot_be_made_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file cannot be made \(.+\); name a file elsewhere"):
        kept(tmp_path / "file" / "rows")

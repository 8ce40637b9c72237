"""A run's record is whole, and a run that was stopped goes on without measuring anything twice."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import pytest
from anchored import untrained
from tiny import tiny_llm

from extemb_core.errors import ConfigError, DocumentError, DocumentNotFoundError
from extemb_core.evaluation.runs import RECORD_VERSION, Experiment, groups_of, read_record, run, write_record
from extemb_core.evaluation.settings import CommonConfig
from extemb_core.utils import journal
from extemb_core.utils.jsonl import evenly


@dataclass
class Squares:
    """Measures the squares of whole numbers, in groups of two; stops when told."""

    config: CommonConfig
    fingerprint: str | None = "f1"
    llm_digest: str | None = "l1"
    hardware: dict | None = None
    embedder_settings: dict | None = None
    stop_at: str = ""
    asked: list[str] = field(default_factory=list)
    kind = "squares"
    remeasure = ()
    is_current = Experiment.is_current

    def groups(self):
        ids = [str(number) for number in range(self.config.limit or 6)]
        return [ids[at : at + 2] for at in range(0, len(ids), 2)]

    def measure(self, group):
        for name in group:
            if name == self.stop_at:
                raise KeyboardInterrupt
            self.asked.append(name)
            yield {"id": name, "square": int(name) ** 2}

    def summarise(self, samples):
        return {"sum": sum(sample["square"] for sample in samples)}


@dataclass
class Powers(Squares):
    """Measures two arms of each number, by a rule that changes."""

    rule: str = "old"
    remeasure: tuple[str, ...] = ()

    def measure(self, group):
        for sample in super().measure(group):
            arms = {"square/2": {"is": sample["square"], "rule": self.rule}, "none": {"is": 0, "rule": self.rule}}
            kept = {arm: value for arm, value in arms.items() if arm.split("/")[0] in (self.remeasure or arm)}
            yield {"id": sample["id"], "arms": kept}

    def summarise(self, samples):
        return {arm: {sample["arms"][arm]["rule"] for sample in samples}.pop() for arm in ("square/2", "none")}


class MeasuredSquares(Experiment):
    """The same for an LLM and an embedder."""

    kind = "squares"
    groups, measure, summarise = Squares.groups, Squares.measure, Squares.summarise

    def __init__(self, config, llm, embedder):
        super().__init__(config, llm, embedder)
        self.config, self.stop_at, self.asked = config, "", []


@pytest.fixture
def config(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    return CommonConfig(llm=str(tmp_path / "models" / "tiny"), data=(str(data),))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results" / "squares.json"


def partial(out):
    return out.with_name(out.name + ".partial")


def test_a_record_keeps_every_sample_and_what_made_it(config, out, tmp_path):
    record = run(Squares(config), out, command=["extemb", "eval", f"--data={tmp_path}/rows.jsonl"])
    assert read_record(out) == json.loads(json.dumps(record))
    assert [sample["square"] for sample in record["samples"]] == [0, 1, 4, 9, 16, 25]
    assert (record["kind"], record["n"], record["parts"], record["summary"]) == ("squares", 6, 1, {"sum": 55})
    assert record["version"] == RECORD_VERSION
    assert record["data"][0]["file"] == "rows.jsonl"
    assert len(record["data"][0]["sha256"]) == 64
    assert record["provenance"]["command"] == "extemb eval --data=rows.jsonl"
    assert {"git", "versions", "hardware", "date"} <= set(record["provenance"])
    assert str(tmp_path) not in out.read_text()
    assert not partial(out).exists()
    assert not list(out.parent.glob("*.tmp"))


def test_a_stopped_run_goes_on(config, out):
    first = Squares(config, stop_at="3")
    with pytest.raises(KeyboardInterrupt):
        run(first, out)
    assert not out.exists()
    assert first.asked == ["0", "1", "2"]
    again = Squares(config)
    record = run(again, out)
    assert again.asked == ["3", "4", "5"]
    assert (record["n"], record["parts"], record["summary"]) == (6, 2, {"sum": 55})
    assert not partial(out).exists()


def test_half_a_line_of_a_killed_process_is_measured_again(config, out):
    with pytest.raises(KeyboardInterrupt):
        run(Squares(config, stop_at="3"), out)
    with partial(out).open("ab") as stream:
        stream.write(b'{"sample": {"id": "3", "squ')
    again = Squares(config)
    assert run(again, out)["summary"] == {"sum": 55}
    assert again.asked == ["3", "4", "5"]


def test_a_finished_run_is_not_measured_again_and_a_higher_limit_measures_the_rest(config, out):
    run(Squares(replace(config, limit=4)), out)
    before = read_record(out)
    before["provenance"]["date"] = "2020-01-01"
    write_record(before, out)
    again = Squares(replace(config, limit=4, batch_size=1))
    record = run(again, out, command=["later"])
    assert again.asked == []
    assert (record["parts"], record["provenance"]) == (1, before["provenance"]), "nothing was measured now"
    more = Squares(config)
    assert run(more, out)["n"] == 6
    assert more.asked == ["4", "5"]
    assert read_record(out)["parts"] == 2
    anew = Squares(config)
    run(anew, out, resume=False)
    assert len(anew.asked) == 6


def test_an_arm_is_measured_anew_in_a_record_whose_others_stay(config, out):
    run(Powers(config), out, command=["first"])
    first = out.read_bytes()
    stopped = Powers(config, rule="new", remeasure=("square",), stop_at="3")
    with pytest.raises(KeyboardInterrupt):
        run(stopped, out, command=["second"])
    assert out.read_bytes() == first
    with pytest.raises(ConfigError, match="another remeasure"):  # half a sample is none of an ordinary run's
        run(Powers(config), out)
    with pytest.raises(ConfigError, match="another remeasure"):
        run(Powers(config, remeasure=("none",)), out)
    again = Powers(config, rule="new", remeasure=("square",))
    record = run(again, out, command=["third"])
    assert again.asked == ["3", "4", "5"]
    assert read_record(out) == json.loads(json.dumps(record))
    assert record["summary"] == {"square/2": "new", "none": "old"}
    assert record["samples"][3] == {
        "id": "3",
        "arms": {"square/2": {"is": 9, "rule": "new"}, "none": {"is": 0, "rule": "old"}},
    }
    assert (record["n"], record["parts"]) == (6, 3)
    assert record["provenance"]["command"] == "first"
    assert {arm: origin["command"] for arm, origin in record["remeasured"].items()} == {"square": "third"}
    assert not partial(out).exists()
    more = run(Powers(replace(config, limit=8)), out)
    assert more["remeasured"].keys() == {"square"}
    assert "remeasured" not in run(Powers(config), out, resume=False)


def test_an_arm_is_measured_anew_only_in_the_record_of_the_same_samples(config, out):
    new = Powers(config, remeasure=("square",))
    with pytest.raises(DocumentNotFoundError):
        run(new, out)
    run(Powers(replace(config, limit=4)), out)
    before = out.read_bytes()
    with pytest.raises(
        ConfigError, match="holds 4 samples and these settings ask for 6.*own --limit to measure square anew"
    ):
        run(new, out)
    with pytest.raises(ConfigError, match="another fingerprint"):
        run(replace(new, fingerprint="f2"), out)
    assert out.read_bytes() == before
    assert new.asked == []


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_with_other_settings_is_refused_by_name(config, out, finished):
    if finished:
        run(Squares(config), out)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(Squares(config, stop_at="3"), out)
    before = (out if finished else partial(out)).read_bytes()
    with pytest.raises(ConfigError, match=r"another ratios \(\[4, 8, 16, 32\], now \[2\]\).*--no-resume"):
        run(Squares(replace(config, ratios=(2,))), out)
    with pytest.raises(ConfigError, match="another fingerprint"):
        run(Squares(config, fingerprint="f2"), out)
    assert (out if finished else partial(out)).read_bytes() == before


def test_another_llm_of_the_same_name_or_another_machine_where_that_counts_is_another_run(config, out):
    run(Squares(config, hardware={"cpu": "a"}), out)
    for other, said in (({"llm_digest": "l2"}, "another llm_digest"), ({"hardware": {"cpu": "b"}}, "another cpu")):
        with pytest.raises(ConfigError, match=said):
            run(Squares(config, **({"hardware": {"cpu": "a"}} | other)), out)
    record = read_record(out)
    write_record({name: record[name] for name in record if name not in ("llm_digest", "hardware")}, out)
    assert run(Squares(config), out)["n"] == 6, "a record of an earlier version did not say it"


def test_finished_samples_are_not_dropped_by_a_lower_limit(config, out):
    with pytest.raises(KeyboardInterrupt):
        run(Squares(config, stop_at="5"), out)
    before = partial(out).read_bytes()
    with pytest.raises(ConfigError, match=r"5 finished samples, and 3 of them are not among the 2 .*pass twice the"):
        run(Squares(replace(config, limit=2)), out)
    assert partial(out).read_bytes() == before
    run(Squares(config), out)
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="has 6 finished samples"):
        run(Squares(replace(config, limit=4)), out)
    assert out.read_bytes() == before
    assert not partial(out).exists()
    assert run(Squares(replace(config, limit=4)), out, resume=False)["n"] == 4


def test_finished_samples_are_not_dropped_by_a_higher_limit_either(config, out):
    class Evenly(Squares):
        def groups(self):
            return [evenly([str(number) for number in range(400)], self.config.limit)]

    run(Evenly(replace(config, limit=40)), out)
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="has 40 finished samples, and 30 of them are not among the 80 "):
        run(Evenly(replace(config, limit=80)), out)
    assert out.read_bytes() == before
    for limit, new in ((79, 39), (400, 321)):
        more = Evenly(replace(config, limit=limit))
        assert run(more, out)["n"] == limit
        assert len(more.asked) == new


def test_what_was_begun_anew_goes_on_without_the_samples_of_the_record(config, out):
    run(Powers(config), out)
    with pytest.raises(KeyboardInterrupt):
        run(Powers(config, rule="new", stop_at="3"), out, resume=False)
    again = Powers(config, rule="new")
    record = run(again, out)
    assert again.asked == ["3", "4", "5"]
    assert record["summary"] == {"square/2": "new", "none": "new"}
    assert record["parts"] == 2


@pytest.mark.parametrize("resume", [True, False])
def test_one_run_at_a_time_writes_a_record(config, out, resume):
    def refused():
        with pytest.raises(ConfigError, match="is being written by another run"):
            run(Squares(config), out, resume=resume)

    class Meanwhile(Squares):
        def measure(self, group):
            refused()
            yield from super().measure(group)

        def summarise(self, samples):
            refused()
            return super().summarise(samples)

    assert run(Meanwhile(config), out)["n"] == 6
    assert not partial(out).exists()


def test_parts_are_calls_that_measured_something_and_no_sample_counts_twice(config, out, monkeypatch):
    for stop_at in ("1", "3", "3", "5"):  # the third measures nothing
        with pytest.raises(KeyboardInterrupt):
            run(Squares(replace(config, batch_size=1), stop_at=stop_at), out)
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "remove", journal.Journal.close)  # as a kill leaves it
        run(Squares(config), out)
    record = read_record(out)
    assert record["parts"] == 4
    assert run(Squares(config), out) == record, "what the journal that stayed holds is in the record"


def test_what_cannot_become_a_record_is_told_before_or_with_the_sample(config, out):
    out.mkdir(parents=True)
    untouched = Squares(config)
    with pytest.raises(ConfigError, match=r"squares.json is a folder, .* pass a file's name"):
        run(untouched, out)
    assert untouched.asked == []
    out.rmdir()

    class Overflowing(Squares):
        def measure(self, group):
            yield from ({**sample, "loss": float("nan")} for sample in super().measure(group))

    with pytest.raises(ConfigError, match="the sample '0' has a number that is not finite .*--dtype float32"):
        run(Overflowing(config), out)
    record = run(Squares(config), out, command=["extemb", "--json", "r\udcff.json"])
    assert record["provenance"]["command"] == "extemb --json 'r\\xff.json'"


def test_changed_data_is_another_run(config, out):
    run(Squares(config), out)
    with open(config.data[0], "a") as stream:
        stream.write("{}\n")
    with pytest.raises(ConfigError, match="another data"):
        run(Squares(config), out)


@pytest.mark.parametrize("text", ["no json", "[]", '{"kind": "qa"}'])
def test_a_file_that_is_no_record_is_an_error(config, out, text):
    out.parent.mkdir(parents=True)
    out.write_text(text)
    with pytest.raises(DocumentError, match="squares.json is not"):
        run(Squares(config), out)
    assert out.read_text() == text


@pytest.mark.parametrize("version", [None, 1, RECORD_VERSION + 1, "2"])
def test_a_record_of_another_version_is_not_gone_on_from(config, out, version):
    run(Squares(replace(config, limit=4)), out)
    record = json.loads(out.read_text()) | {"version": version}
    if version is None:  # version 1 said none
        del record["version"]
    out.write_text(json.dumps(record))
    remedy = f"{out.name} is a record of version {version or 1!r}, and this extemb reads version {RECORD_VERSION}; "
    with pytest.raises(DocumentError, match=f"{remedy}measure it again with --no-resume"):
        run(Squares(config), out)
    assert json.loads(out.read_text()) == record
    assert run(Squares(config), out, resume=False)["version"] == RECORD_VERSION


@pytest.mark.parametrize(
    "change", [{"samples": 3}, {"samples": [3]}, {"samples": [{}]}, {"seconds": "x"}, {"parts": None}]
)
def test_a_damaged_record_is_an_error(config, out, change):
    run(Squares(replace(config, limit=4)), out)
    out.write_text(json.dumps(json.loads(out.read_text()) | change))
    with pytest.raises(DocumentError, match=f"{out.name} is damaged .*; measure it again with --no-resume"):
        run(Squares(config), out)
    partial(out).write_text('{"identity": {}}\n{"sample": 3, "seconds": 1}\n')
    with pytest.raises(DocumentError, match="is damaged"):
        run(Squares(config), out)


def test_a_damaged_journal_is_an_error(config, out):
    out.parent.mkdir(parents=True)
    partial(out).write_text('{"identity"\n')
    with pytest.raises(DocumentError, match="damaged.*remove it"):
        run(Squares(config), out)


def test_missing_data_and_nothing_to_measure(config, out):
    with pytest.raises(DocumentError, match="does not exist"):
        run(Squares(replace(config, data=("none.jsonl",))), out)
    empty = Squares(config)
    empty.groups = list
    with pytest.raises(ConfigError, match="no sample"):
        run(empty, out)


def test_what_was_added_is_on_disk_before_the_next_group(config, out, monkeypatch):
    synced = []
    monkeypatch.setattr(journal.os, "fsync", lambda handle: synced.append(len(partial(out).read_text().splitlines())))
    run(Squares(config), out)
    assert synced[:3] == [3, 5, 7]


def test_a_record_says_what_kind_of_embedder_was_measured(config, out):
    embedder = untrained(tiny_llm(), ratios=(4,), token_weighting="uniform")
    record = run(MeasuredSquares(replace(config, ratios=(4,)), tiny_llm(), embedder), out)
    assert record["fingerprint"] == embedder.fingerprint
    assert record["embedder"] == {
        "entry_layer": 1, "num_layers": 1, "adaptation": "none", "downscaling": "mean", "token_weighting": "uniform",
        "connector": "none", "chunk_size": 16, "llm_name": tiny_llm().name,
    }  # fmt: skip
    assert read_record(out)["embedder"] == record["embedder"]
    assert run(MeasuredSquares(config, tiny_llm(), None), out.with_name("controls.json"))["embedder"] is None


# -- groups ---------------------------------------------------------------------------------------------------


def test_groups_keep_the_order_and_the_last_may_be_smaller():
    assert groups_of(["a", "b", "c"], 2) == [["a", "b"], ["c"]]
    assert groups_of([], 2) == []

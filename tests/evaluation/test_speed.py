"""What is timed and what is not, against a clock made here; what each side reads, against an oracle."""

from __future__ import annotations

import mmap
from types import SimpleNamespace

import pytest
import torch
from anchored import LAYER, OwnStates, rows_of, untrained
from tiny import SENTENCES as TEXT
from tiny import RawEmbedder, random_embedder, tiny_model, tiny_tokenizer

from extemb_core.errors import ConfigError, RatioError
from extemb_core.evaluation import speed
from extemb_core.evaluation.runs import run
from extemb_core.evaluation.speed import SpeedConfig, SpeedExperiment, greedy, peak_mib
from extemb_core.models.generation import Sampling
from extemb_core.models.llm import LLM

WINDOW = 512


@pytest.fixture(scope="module")
def llm():
    return LLM(tiny_model("llama", max_position_embeddings=WINDOW), tiny_tokenizer(), name="tiny")


@pytest.fixture
def make(llm):
    def experiment(embedder=None, **changes):
        settings = {"tokens": (64,), "rounds": 2, "new_tokens": 3, "ratios": (4,)} | changes
        return SpeedExperiment(SpeedConfig(llm="tiny", **settings), llm, embedder)

    return experiment


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what is done on purpose."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def names(experiment):
    return [name for group in experiment.groups() for name in group]


def measured(experiment):
    return [sample for group in experiment.groups() for sample in experiment.measure(group)]


def test_the_plain_loop_chooses_what_generation_chooses(llm):
    ids = llm.encode(TEXT)[:40]
    chosen, times = greedy(llm, llm.embed(ids), 12)
    expected = llm.generate([llm.embed(ids)], Sampling(max_new_tokens=12))[0].token_ids
    assert len(chosen) == len(times) == 12
    assert times == sorted(times)
    assert chosen[: len(expected)] == expected
    assert len(expected) >= 6


def test_stop_tokens_do_not_stop_it(llm):
    ids = llm.encode(TEXT)[:40]
    likeliest = greedy(llm, llm.embed(ids), 1)[0][0]
    stopping = LLM(llm.model, llm.tokenizer)
    stopping.__dict__["stop_token_ids"] = [likeliest]
    assert stopping.generate([llm.embed(ids)], Sampling(max_new_tokens=5))[0].token_ids == []
    assert len(greedy(stopping, llm.embed(ids), 5)[0]) == 5


def test_every_side_of_a_perfect_embedder_reads_the_same(make, llm, monkeypatch):
    read = []
    plain = speed.greedy
    monkeypatch.setattr(speed, "greedy", lambda *how: read.append(how[1]) or plain(*how))
    sample = next(make(RawEmbedder(llm), ratios=(1,)).measure(["64:0"]))
    assert list(sample["sides"]) == ["full", "online/1", "offline/1"]
    assert {side["positions"] for side in sample["sides"].values()} == {64}
    full, *others = read[-3:]
    for other in others:
        torch.testing.assert_close(other, llm.embed(full))


def test_online_and_offline_read_the_same_embeddings(make, llm, monkeypatch):
    read = []
    plain = speed.greedy
    monkeypatch.setattr(speed, "greedy", lambda *how: read.append(how[1]) or plain(*how))
    experiment = make(random_embedder(llm), tokens=(70,), ratios=(2, 8))
    sample = next(experiment.measure(["70:0"]))
    assert list(sample["sides"]) == ["full", "online/2", "online/8", "offline/2", "offline/8"]
    assert [side["positions"] for side in sample["sides"].values()] == [70, 35, 9, 35, 9]
    _, online_2, online_8, offline_2, offline_8 = read[-5:]
    torch.testing.assert_close(online_2, offline_2)
    torch.testing.assert_close(online_8, offline_8)
    assert len(online_2) - len(online_8) == 35 - 9


def test_online_and_offline_read_the_same_states_above_layer_0(make, llm, monkeypatch):
    read = []
    plain = speed.greedy
    monkeypatch.setattr(speed, "greedy", lambda *how: read.append(how[1]) or plain(*how))
    sample = next(make(untrained(llm), tokens=(70,), ratios=(2,)).measure(["70:0"]))
    assert [side["positions"] for side in sample["sides"].values()] == [70, 35, 35]
    full, online, offline = read[-3:]
    assert isinstance(full, list)
    assert online.layer == offline.layer == LAYER
    for name in ("ids", "states", "mask"):
        torch.testing.assert_close(getattr(online, name), getattr(offline, name))
    assert int(online.mask.sum()) == 35


def test_the_plain_loop_reads_states_at_their_layer(make, llm):
    experiment = make()
    ids = llm.encode(TEXT)[:40]
    before = experiment.prompt(ids).segments[0]
    for ratio in (1, 4):
        (compressed,) = OwnStates(llm, before).compress_ids([ids], ratio=ratio)
        prompt = experiment.prompt(compressed.part)
        chosen, _ = greedy(llm, prompt.inputs(llm), 6)
        assert chosen == rows_of(llm, prompt.segments, chosen).argmax(-1).tolist()
        assert (chosen == greedy(llm, experiment.prompt(ids).inputs(llm), 6)[0]) == (ratio == 1)


def test_what_is_timed(make, llm, clock, monkeypatch):
    embedder = random_embedder(llm)
    compress = embedder.compress_ids

    def slowly(ids, **how):
        clock.seconds += 5
        return compress(ids, **how)

    def answer(llm, prompt, count):
        clock.seconds += 2
        first = clock.seconds
        clock.seconds += 0.5 * (count - 1)
        return [0] * count, [first + 0.5 * at for at in range(count)]

    monkeypatch.setattr(embedder, "compress_ids", slowly)
    monkeypatch.setattr(speed, "greedy", answer)
    (sample,) = make(embedder, rounds=1, new_tokens=7).measure(["64:0"])
    sides = {name: {key: side[key] for key in side if key != "peak_mib"} for name, side in sample["sides"].items()}
    read = {"first_token_s": 2.0, "decode_tokens_per_s": 2.0, "positions": 16}
    assert sides == {
        "full": read | {"positions": 64},
        "online/4": read | {"first_token_s": 7.0, "compress_tokens_per_s": 12.8},
        "offline/4": read,
    }
    assert sample["compress_tokens_per_s"] == 12.8


def test_the_order_turns_round_and_one_pass_per_length_does_not_count(make, llm, monkeypatch):
    experiment = make(random_embedder(llm), tokens=(100, 80))
    asked = []
    plain = experiment.answer
    monkeypatch.setattr(
        experiment, "answer", lambda side, text: asked.append((len(text.ids), side)) or plain(side, text)
    )
    samples = measured(experiment)
    there = ["full", "online/4", "offline/4"]
    back = there[::-1]
    assert [length for length, _ in asked[::3]] == [64, 80, 80, 80, 100, 100, 100]
    assert [side for _, side in asked] == [*there, *there, *there, *back, *there, *there, *back]
    assert [(sample["id"], sample["round"]) for sample in samples] == [
        ("80:0", 0), ("80:1", 1), ("100:0", 0), ("100:1", 1),
    ]  # fmt: skip
    assert all(list(sample["sides"]) == there for sample in samples)


def test_a_side_that_does_not_fit_is_absent(make, llm):
    embedder = random_embedder(llm)
    small = make(embedder)
    room = WINDOW - len(small.prompt(small._ids[:0])) - 3
    experiment = make(embedder, tokens=(room, room + 1, 4 * room, 4 * room + 16), rounds=1)
    assert names(experiment) == [f"{room}:0", f"{room + 1}:0", f"{4 * room}:0"]
    assert list(experiment.sides(room)) == ["full", "online/4", "offline/4"]
    assert list(experiment.sides(room + 1)) == list(experiment.sides(4 * room)) == ["online/4", "offline/4"]
    assert names(make(tokens=(room, room + 1), rounds=1)) == [f"{room}:0"]  # without an embedder
    document = experiment._document_of(room)
    assert len(experiment.prompt(document.ids)) + 3 == WINDOW


def test_texts_are_cut_to_exactly_their_length(make, llm, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text(TEXT)
    own = len(llm.encode(TEXT))
    experiment = make(tokens=(300, 64), data=(str(file),), seed=1)
    assert [len(experiment._document_of(tokens).ids) for tokens in (64, 300)] == [64, 300]
    ids = experiment._document_of(300).ids
    assert ids[:64].tolist() == experiment._document_of(64).ids.tolist()
    assert 64 < own < 300
    assert ids[own:].tolist() == ids[: 300 - own].tolist()


def test_a_part_of_a_run_is_measured_by_itself_and_the_rest_later(make, llm, tmp_path, monkeypatch):
    out = tmp_path / "speed.json"
    first = make(random_embedder(llm))
    plain = first.measure

    def stop_at(group):
        if group == ["64:1"]:
            raise KeyboardInterrupt
        return plain(group)

    monkeypatch.setattr(first, "measure", stop_at)
    with pytest.raises(KeyboardInterrupt):
        run(first, out, show_progress=False)
    record = run(make(random_embedder(llm)), out, show_progress=False)
    assert [sample["id"] for sample in record["samples"]] == ["64:0", "64:1"]
    assert record["parts"] == 2
    for side, own in record["summary"]["64"].items():
        times = [sample["sides"][side]["first_token_s"] for sample in record["samples"]]
        assert own["first_token_s"] == pytest.approx(sum(times) / 2)
        assert min(times) > 0
        assert own["n"] == 2


def test_a_limit_takes_samples_evenly(make):
    assert names(make(tokens=(64, 80), rounds=3, limit=3)) == ["64:0", "64:2", "80:2"]


def timed(first, *, peak=None, compress=None, positions=8):
    made = {"first_token_s": first, "decode_tokens_per_s": 10 * first, "peak_mib": peak, "positions": positions}
    return made if compress is None else made | {"compress_tokens_per_s": compress}


def test_the_summary_of_samples_made_by_hand(make):
    rounds = [
        {"full": timed(1.0, peak=30.0, positions=64), "online/8": timed(2.0, compress=64.0)},
        {"full": timed(4.0, peak=30.0, positions=64), "online/8": timed(2.0, compress=32.0)},
        {"full": timed(5.0, positions=64), "online/8": timed(5.0, compress=16.0)},
    ]
    samples = [{"id": str(at), "tokens": 64, "round": at, "sides": sides} for at, sides in enumerate(rounds)]
    samples.append({"id": "far", "tokens": 900, "round": 0, "sides": {"offline/8": timed(3.0)}})
    summary = make().summarise(samples)
    assert list(summary) == ["64", "900"]
    assert summary["64"]["full"] == {
        "n": 3, "first_token_s": 4.0, "decode_tokens_per_s": 40.0, "peak_mib": 30.0, "positions": 64,
        "first_token_over_full": 1.0,
    }  # fmt: skip
    assert summary["64"]["online/8"] == {
        "n": 3, "first_token_s": 2.0, "decode_tokens_per_s": 20.0, "peak_mib": None, "positions": 8,
        "first_token_over_full": 1.0,  # of 2, 1/2 and 1; the medians' ratio is 1/2
        "compress_tokens_per_s": 32.0,
    }  # fmt: skip
    assert summary["900"]["offline/8"]["first_token_over_full"] is None


def test_the_peak_is_what_comes_on_top(monkeypatch, tmp_path):
    def touch():
        with mmap.mmap(-1, 48 * 2**20) as memory:  # straight from the system, and back to it
            for at in range(0, len(memory), mmap.PAGESIZE):
                memory[at] = 1

    cpu = torch.device("cpu")
    found = peak_mib(touch, cpu)
    if found is None:
        pytest.skip("this system does not keep the peak of a process")
    assert 40 < found < 100
    assert peak_mib(lambda: None, cpu) < 20
    done = []
    monkeypatch.setattr(speed, "_CLEAR_REFS", tmp_path / "none")
    assert peak_mib(lambda: done.append(1), cpu) is None
    assert done == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ()}, "tokens is empty; pass at least one length"),
        ({"tokens": (64, 0)}, r"tokens=\(64, 0\) must be distinct positive"),
        ({"rounds": 0}, "rounds=0 is not a whole number of at least 1; pass"),
        ({"new_tokens": 1}, "new_tokens=1: decoding begins with the second token; pass at least 2"),
    ],
)
def test_a_setting_that_is_not_legal_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SpeedConfig(llm="tiny", **changes)


def test_an_untrained_ratio_is_refused(make, llm):
    with pytest.raises(RatioError, match="ratio=3 "):
        make(random_embedder(llm), ratios=(3,))

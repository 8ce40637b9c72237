"""Haystacks are exact, every arm reads what it should, and what counts as found is what a perfect reader finds."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from anchored import OwnStates, untrained
from tiny import SENTENCES as TEXT
from tiny import RawEmbedder, random_embedder, tiny_model, tiny_tokenizer

from extemb_core.errors import BudgetError, ConfigError, DocumentError, RatioError
from extemb_core.evaluation import needle
from extemb_core.evaluation.needle import PROMPTS, TASKS, NeedleConfig, NeedleExperiment, filler
from extemb_core.evaluation.runs import run
from extemb_core.models.generation import Generated
from extemb_core.models.llm import LLM

WINDOW = 1024


@pytest.fixture(scope="module")
def llm():
    """A tiny LLM whose window holds the prompts, which are long in its small vocabulary."""
    return LLM(tiny_model("llama", max_position_embeddings=WINDOW), tiny_tokenizer(), name="tiny")


@pytest.fixture
def make(llm):
    def experiment(embedder=None, **changes):
        settings = {"tokens": (96,), "depths": 3, "ratios": (4,), "max_new_tokens": 4} | changes
        return NeedleExperiment(NeedleConfig(llm="tiny", **settings), llm, embedder)

    return experiment


@pytest.fixture
def book(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(TEXT)
    return str(file)


def cases(experiment):
    return [experiment._cases[name] for group in experiment.groups() for name in group]


def haystacks(experiment):
    return {case.id: experiment.haystack(case) for case in cases(experiment)}


def measured(experiment):
    return [sample for group in experiment.groups() for sample in experiment.measure(group)]


def needle_of(llm, found):
    """The needle's text, worked out from the question."""
    key = re.search(r"begins with (\w+)\?", found.question)
    return PROMPTS[found.task]["needle"].format(answer=found.answer, key=key and key[1])


# -- haystacks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("with_data", [False, True])
def test_a_haystack_has_exactly_its_tokens_and_the_needle_at_its_depth(make, llm, book, task, with_data):
    experiment = make(tasks=(task,), tokens=(64, 97, 1500), depths=5, data=(book,) if with_data else ())
    for case in cases(experiment):
        found = experiment.haystack(case)
        assert len(found.ids) == case.tokens
        hidden = llm.encode(needle_of(llm, found))
        assert found.ids[found.at : found.at + len(hidden)].tolist() == hidden.tolist()
        assert llm.decode(found.ids.tolist()).count(found.answer) == 1
        hay = case.tokens - len(hidden)
        between_tokens = with_data and task == "passkey"  # elsewhere whole sentences and lines
        assert abs(found.at - case.depth * hay) <= (0.5 if between_tokens else 40)
        if case.depth in (0, 1):
            assert found.at == case.depth * hay


def test_the_needle_stands_between_whole_sentences_and_lines(make, llm):
    for name, found in haystacks(make(tokens=(600,), depths=7)).items():
        text = llm.decode(found.ids.tolist())
        before, after = text.split(needle_of(llm, found))
        if found.task == "passkey":
            assert not before or before.endswith("."), name
            assert not after or after.startswith(" ") or found.at == 0, name
        else:
            rows = text.splitlines()
            del rows[0 if found.at else 1]  # the first beside the needle may be cut
            lines = [line.split(": ") for line in rows]
            assert all(re.fullmatch("([bdfghjklmnprstvz][aeiou]){3}", word) for line in lines for word in line), name
            assert all(len(line) == 2 for line in lines), name
            assert len({word for line in lines for word in line}) == 2 * len(lines), name


def test_a_haystack_depends_on_its_own_case_alone(make):
    some, all_of_them = haystacks(make(trials=2)), haystacks(make(trials=3, tokens=(200, 96), depths=5))
    for name, found in some.items():
        assert found.ids.tolist() == all_of_them[name].ids.tolist()
        assert (found.answer, found.question) == (all_of_them[name].answer, all_of_them[name].question)
    answers = [found.answer for found in all_of_them.values()]
    assert len(set(answers)) == len(answers) == 2 * 2 * 5 * 3
    assert all(found.answer != some[name].answer for name, found in haystacks(make(trials=2, seed=1)).items())


def test_text_of_files_is_the_filler_and_goes_on_from_its_start(make, llm, book):
    draw = np.random.default_rng(5)
    texts = llm.encode(TEXT)
    ids, places = filler(llm, 2 * len(texts), draw, texts)
    assert ids[: len(texts)].tolist() == ids[len(texts) :].tolist()
    assert llm.decode(texts.tolist()) in llm.decode(np.tile(ids, 2).tolist())
    assert places.tolist() == list(range(2 * len(texts) + 1))
    joined = needle.read_filler(llm, (book, book))
    assert llm.decode(joined.tolist()) == f"{TEXT}\n\n{TEXT}"


def test_files_without_text_are_refused(make, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DocumentError, match=r"empty.txt.* holds no text; pass files"):
        make(data=(str(tmp_path / "empty.txt"),))


def test_more_lines_than_there_are_words_for_are_refused(make, monkeypatch):
    monkeypatch.setattr(needle, "_SYLLABLES", ["ba", "bo"])
    experiment = make(tasks=("key_value",), tokens=(300,))
    with pytest.raises(ConfigError, match="tokens of lines are more than words were made up for; pass tokens up to"):
        list(experiment.measure(experiment.groups()[0]))


# -- arms -----------------------------------------------------------------------------------------------------


def test_a_perfect_embedder_answers_as_the_full_text_does(make, llm):
    for sample in measured(make(RawEmbedder(llm), ratios=(1,), tokens=(96, 300), max_new_tokens=8)):
        arms = sample["arms"]
        assert arms["extensible/1"] == arms["truncated/1"] == arms["full"]
        assert arms["full"]["positions"] == sample["tokens"]
        assert arms["none"]["positions"] == 0
        assert arms["full"]["prediction"] != arms["none"]["prediction"]


def perfect_reader(llm, monkeypatch):
    """Has the LLM answer with what stands in its prompt, of embeddings those of the nearest tokens."""
    table = llm.model.get_input_embeddings().weight.detach()

    def generate(prompts, sampling):
        rows = [torch.cdist(p, table).argmin(1).tolist() if isinstance(p, torch.Tensor) else p for p in prompts]
        texts = [llm.decode(row) for row in rows]
        keys = [re.search(r"begins with (\w+)\?", text) for text in texts]
        patterns = [rf"\n{key[1]}: (\w{{6}})\n" if key else r"pass key is (\d{5});" for key in keys]
        found = [re.search(pattern, text) for pattern, text in zip(patterns, texts, strict=True)]
        return [Generated(text=f" It is {match[1]}." if match else "No idea.") for match in found]

    monkeypatch.setattr(llm, "generate", generate)


def test_a_perfect_reader_finds_what_it_is_given_and_nothing_else(make, llm, monkeypatch):
    perfect_reader(llm, monkeypatch)
    samples = measured(make(RawEmbedder(llm), ratios=(1,), tokens=(300,), depths=5))
    for sample in samples:
        found = {arm: answer["correct"] for arm, answer in sample["arms"].items()}
        arms = {"truncated/1": True, "chosen/1": True, "extensible/1": True, "full": True}
        assert found == {"none": False} | arms, sample["id"]
        assert sample["arms"]["full"]["prediction"] == f"It is {sample['answer']}."
    for sample in measured(make(ratios=(2,), tokens=(300,), depths=4)):  # controls alone
        assert list(sample["arms"]) == ["none", "truncated/2", "chosen/2", "full"]
        assert sample["arms"]["chosen/2"]["correct"], sample["id"]  # its words lead to it, whatever the depth
        assert sample["arms"]["truncated/2"]["correct"] == (sample["at"] < 120), sample["id"]


def test_a_perfect_embedder_above_layer_0_answers_as_the_full_text_does(make, llm):
    experiment = make(tasks=("passkey",), tokens=(96,))
    found = experiment.haystack(cases(experiment)[0])
    before = experiment.prompt(found, [found.ids]).segments[0]
    for sample in measured(make(OwnStates(llm, before), tasks=("passkey",), ratios=(1, 4), max_new_tokens=8)):
        arms = sample["arms"]
        assert arms["extensible/1"] == arms["full"]
        assert arms["extensible/4"]["positions"] == 24
        assert arms["extensible/4"]["prediction"] != arms["full"]["prediction"]


def test_forms_above_layer_0_are_states_with_their_anchors(make, llm):
    embedder = untrained(llm)
    experiment = make(embedder, tokens=(101,), ratios=(2, 8))
    found = experiment.haystack(cases(experiment)[0])
    for ratio in (2, 8):
        (form,) = experiment.forms(found)[f"extensible/{ratio}"]
        expected = embedder.compress_ids([found.ids], ratio=ratio)[0]
        assert form.anchors.tolist() == expected.anchors.tolist()
        torch.testing.assert_close(form.states, expected.embeddings)


def test_a_plan_has_the_needle_in_full_within_the_same_positions(make, llm):
    experiment = make(untrained(llm), tokens=(800,), ratios=(2,))
    for found in haystacks(experiment).values():
        forms = experiment.forms(found)
        assert list(forms) == ["none", "truncated/2", "chosen/2", "extensible/2", "focus/2", "full"]
        assert sum(map(len, forms["focus/2"])) <= sum(map(len, forms["extensible/2"])) == 400
        read = [llm.decode(part.tolist()) for part in forms["focus/2"] if isinstance(part, np.ndarray)]
        assert sum(found.answer in text for text in read) == 1


def test_controls_are_those_that_are_asked_for(make, llm):
    few = make(untrained(llm), controls=("lingua", "truncated"))
    assert few.config.controls == ("truncated", "lingua")
    for sample in measured(few):
        assert list(sample["arms"]) == ["none", "truncated/4", "lingua/4", "extensible/4", "full"]
        assert sample["arms"]["lingua/4"]["positions"] == 24
    assert list(measured(make(controls=()))[0]["arms"]) == ["none", "full"]
    with pytest.raises(ConfigError, match="controls='focus' needs an embedder with an entry layer above 0"):
        make(random_embedder(llm), controls=("focus",))


def test_what_is_truncated_away_is_not_given(make, llm):
    experiment = make(tokens=(400,), ratios=(4, 8))
    for case in cases(experiment):
        found = experiment.haystack(case)
        for ratio in (4, 8):
            (form,) = experiment.forms(found)[f"truncated/{ratio}"]
            assert form.tolist() == found.ids[: 400 // ratio].tolist()
            assert (found.answer in llm.decode(form.tolist())) == (case.depth == 0)


def test_arms_take_the_same_positions_and_one_pass_serves_all_ratios(make, llm, monkeypatch):
    embedder = random_embedder(llm)
    experiment = make(embedder, tokens=(101,), ratios=(2, 8))
    found = experiment.haystack(cases(experiment)[0])
    expected = {ratio: embedder.compress_ids([found.ids], ratio=ratio)[0].embeddings for ratio in (2, 8)}
    asked = []
    plain = embedder.compress_ids
    monkeypatch.setattr(embedder, "compress_ids", lambda ids, **how: asked.append(how["ratio"]) or plain(ids, **how))
    forms = experiment.forms(found)
    assert asked == [2]
    for ratio, embeddings in expected.items():
        torch.testing.assert_close(*forms[f"extensible/{ratio}"], embeddings)
        for arm in ("truncated", "chosen"):
            assert len(*forms[f"{arm}/{ratio}"]) == len(embeddings)
    assert len(*forms["truncated/8"]) == 13  # six chunks of 16 tokens and one of 5


def test_an_arm_that_does_not_fit_is_absent(make, llm):
    experiment = make(tasks=("passkey",))
    room = WINDOW - len(experiment.prompt(experiment.haystack(cases(experiment)[0]), [])) - 4
    fits, above = (make(tasks=("passkey",), tokens=(tokens,)) for tokens in (room, room + 1))
    full = fits.forms(fits.haystack(cases(fits)[0]))["full"]
    assert len(fits.prompt(fits.haystack(cases(fits)[0]), full)) + 4 == WINDOW
    assert list(above.forms(above.haystack(cases(above)[0]))) == ["none", "truncated/4", "chosen/4"]
    far = make(random_embedder(llm), tasks=("passkey",), tokens=(4 * room + 16,), ratios=(2, 4, 8))
    assert list(far.forms(far.haystack(cases(far)[0]))) == ["none", "truncated/8", "chosen/8", "extensible/8"]
    further = make(random_embedder(llm), tasks=("passkey",), tokens=(8 * room + 16,), ratios=(2, 4, 8))
    assert list(further.forms(further.haystack(cases(further)[0]))) == ["none"]


def test_the_prompt_around_the_text_is_the_same_for_every_arm(make, llm):
    experiment = make(random_embedder(llm))
    for found in haystacks(experiment).values():
        none = experiment.prompt(found, [])
        start, end = none.segments
        for parts in experiment.forms(found).values():
            segments = experiment.prompt(found, parts).segments
            assert segments[0].tolist() == start.tolist()
            assert segments[-1].tolist() == end.tolist()
            assert sum(map(len, segments)) == len(none) + sum(map(len, parts))


def test_a_window_too_small_for_the_question_is_an_error(make):
    experiment = make(max_new_tokens=WINDOW)
    with pytest.raises(BudgetError, match="question of passkey takes .* more than the 1024 of tiny; lower max_new"):
        list(experiment.measure(experiment.groups()[0]))


# -- runs -----------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_to_the_same_record(make, tmp_path, monkeypatch):
    whole = run(make(), tmp_path / "whole.json", show_progress=False)
    stopping = make()
    count = itertools.count()
    plain = stopping.forms

    def forms(found):
        if next(count) == 2:
            raise KeyboardInterrupt
        return plain(found)

    monkeypatch.setattr(stopping, "forms", forms)
    with pytest.raises(KeyboardInterrupt):
        run(stopping, tmp_path / "parts.json", show_progress=False)
    again = make()
    asked = []
    measure = again.measure
    monkeypatch.setattr(again, "measure", lambda group: asked.extend(group) or measure(group))
    record = run(again, tmp_path / "parts.json", show_progress=False)
    assert asked == [name for group in again.groups() for name in group][2:]
    assert record["samples"] == whole["samples"]
    assert record["summary"] == whole["summary"]


def test_a_limit_takes_samples_evenly(make):
    assert [name for (name,) in make(limit=3).groups()] == ["passkey:96:0:0", "passkey:96:1:0", "key_value:96:1:0"]
    assert [name for (name,) in make(tasks=("passkey",), depths=1).groups()] == ["passkey:96:0.5:0"]


def sample(task, tokens, depth, **arms):
    answers = {arm.replace("_", "/"): {"positions": 1, "prediction": "", "correct": ok} for arm, ok in arms.items()}
    return {"id": f"{task}{tokens}{depth}", "task": task, "tokens": tokens, "depth": depth, "arms": answers}


def test_the_summary_of_samples_made_by_hand(make):
    samples = [
        sample("passkey", 96, 0.0, none=False, truncated_4=True, extensible_4=True, full=True),
        sample("passkey", 96, 0.0, none=False, truncated_4=False, extensible_4=True, full=True),
        sample("passkey", 96, 1.0, none=False, truncated_4=False, extensible_4=False, full=True),
        sample("passkey", 800, 1.0, none=False, truncated_4=False, extensible_4=True),
        sample("key_value", 96, 1.0, none=True),
    ]
    summary = make().summarise(samples)
    cells = {(c["task"], c["arm"], c["tokens"], c["depth"]): (c["n"], c["correct"]) for c in summary["cells"]}
    assert cells["passkey", "truncated/4", 96, 0.0] == (2, 0.5)
    assert cells["passkey", "extensible/4", 96, 1.0] == (1, 0.0)
    assert cells["passkey", "extensible/4", 800, 1.0] == (1, 1.0)
    assert cells["key_value", "none", 96, 1.0] == (1, 1.0)
    assert len(cells) == len(summary["cells"]) == 3 * 3 + 2 + 1
    ours = summary["arms"]["passkey"]["extensible/4"]
    assert (ours["n"], ours["correct"]["mean"]) == (4, 0.75)
    assert ours["correct"]["interval"][0] < 0.75 <= ours["correct"]["interval"][1]
    assert summary["arms"]["key_value"] == {"none": {"n": 1, "correct": {"mean": 1.0, "interval": None}}}
    minus = summary["minus"]["passkey"]["4"]
    assert {control: (own["mean"], own["n"]) for control, own in minus.items()} == {
        "none": (0.75, 4),
        "truncated": (0.5, 4),
        "full": (pytest.approx(-1 / 3), 3),
    }
    assert "key_value" not in summary["minus"]
    assert summary["focus_minus"] == {}
    for at, of_sample in enumerate(samples[:3]):
        of_sample["arms"]["focus/4"] = {"positions": 1, "prediction": "", "correct": at == 2}
    focused = make().summarise(samples)
    assert focused["arms"]["passkey"]["focus/4"]["n"] == 3
    assert {control: (own["mean"], own["n"]) for control, own in focused["focus_minus"]["passkey"]["4"].items()} == {
        "none": (pytest.approx(1 / 3), 3),
        "truncated": (0.0, 3),
        "extensible": (pytest.approx(-1 / 3), 3),
        "full": (pytest.approx(-2 / 3), 3),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": (63,)}, r"tokens=\(63,\): a haystack must hold its needle; pass lengths from 64"),
        ({"tokens": ()}, r"tokens=\(\): .* pass lengths"),
        ({"tokens": (96, 96)}, r"tokens=\(96, 96\) must be distinct"),
        ({"tasks": ("passkey", "maze")}, r"tasks=.*'maze'.* must be distinct ones of passkey, key_value; pass"),
        ({"tasks": ()}, r"tasks=\(\) must be"),
        ({"controls": ("wrong",)}, "controls='wrong' .*truncated, chosen, focus.*lingua"),
        ({"depths": 0}, "depths=0 is not a whole number of at least 1; pass"),
        ({"trials": 0}, "trials=0 is not"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not"),
    ],
)
def test_a_setting_that_is_not_legal_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        NeedleConfig(llm="tiny", **changes)


def test_an_untrained_ratio_is_refused(make, llm):
    with pytest.raises(RatioError, match="ratio=3 "):
        make(random_embedder(llm), ratios=(3,))

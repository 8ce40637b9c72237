"""Question readings: the prompts that are asked later, documents whole or with their answer, and nothing invented."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import tiny_model, tiny_tokenizer

from extemb_core.errors import TrainingError
from extemb_core.models.llm import LLM
from extemb_core.questions import Question
from extemb_core.training.objectives import NOT_FOUND, QuestionReadings, recall

PLACES = ("harbour", "bridge", "mill", "tower", "market")


@pytest.fixture(scope="module")
def llm():
    return LLM(tiny_model("llama", max_position_embeddings=1024), tiny_tokenizer(), name="tiny")


def questions(count=5, padding=""):
    return [
        Question(f"made:part:{at}", f"{padding}The {place} was built in 18{at}0. {padding}",
                 f"When was the {place} built?", (f"18{at}0",))
        for at, place in enumerate(PLACES[:count])
    ]  # fmt: skip


def text(llm, reading, *roles):
    """The parts with these roles, all but the answers when none is given."""
    return [llm.decode(ids.tolist()) for ids, role in reading.parts if role in (roles or ("text", "document"))]


def answers(llm, reading):
    return [llm.decode(ids[:-1].tolist()) for ids, role in reading.parts if role == "answer"]


def many(llm, count=200, **settings):
    made = QuestionReadings(questions(), llm, **settings)
    return [made.reading(at) for at in range(count)]


def test_recall_goes_on_from_words_of_the_text_at_several_places(llm):
    ids = np.arange(200, 424)
    seen = set()
    for seed in range(20):
        reading = recall(llm, ids, np.random.default_rng(seed))
        assert [role for _, role in reading.parts[:2]] == ["document", "text"]
        assert reading.parts[0][0].tolist() == ids.tolist()
        recalled = [at for at, (_, role) in enumerate(reading.parts) if role == "answer"]
        assert len(recalled) == 10
        for at in recalled:
            cue, answer = reading.parts[at - 1][0].tolist(), reading.parts[at][0].tolist()
            assert len(cue) in (2, 3, 4)
            assert 3 <= len(answer) <= 7
            assert cue + answer == list(range(cue[0], answer[-1] + 1))
            assert ids[0] <= cue[0] <= answer[-1] <= ids[-1]
            seen.add(cue[0])
        assert recalled[-1] == len(reading.parts) - 1
    assert len(seen) > 100


@pytest.mark.parametrize("length", [1, 2, 5, 12])
def test_recall_of_a_very_short_text_has_an_answer(llm, length):
    ids = np.arange(200, 200 + length)
    for seed in range(10):
        *_, (answer, role) = recall(llm, ids, np.random.default_rng(seed)).parts
        assert role == "answer"
        assert len(answer)
        assert set(answer.tolist()) <= set(ids.tolist())


def test_the_answer_ends_the_turn_and_belongs_to_the_question(llm):
    for reading in many(llm, missing_share=0):
        (answer,) = answers(llm, reading)
        assert reading.parts[-1][0][-1] == llm.tokenizer.eos_token_id
        place = PLACES[int(answer[2])]
        whole = "".join(text(llm, reading))
        assert f"The {place} was built in {answer}." in whole
        assert f"When was the {place} built?" in whole


def test_documents_are_embeddings_and_the_rest_is_text(llm):
    for reading in many(llm, missing_share=0, raw_share=0):
        documents = text(llm, reading, "document")
        assert 1 <= len(documents) <= 4
        assert all(document.startswith("The ") and document.endswith("0. ") for document in documents)
        assert not any("was built in" in piece for piece in text(llm, reading, "text"))


def test_some_documents_stay_text(llm):
    shares = [len(text(llm, reading, "document")) for reading in many(llm, raw_share=0.5)]
    assert min(shares) == 0
    assert max(shares) > 1


def test_without_its_document_a_question_is_not_answered(llm):
    found = many(llm, missing_share=1.0)
    for reading in found:
        whole = "".join(text(llm, reading))
        place = next(place for place in PLACES if f"When was the {place} built?" in whole)
        (answer,) = answers(llm, reading)
        assert (answer == NOT_FOUND) == (f"The {place} was built" not in whole)
    assert sum(answers(llm, reading) == [NOT_FOUND] for reading in found) > 150


def test_of_a_long_document_a_part_with_the_answer_is_kept(llm):
    padding = "It rained on the hills and the river rose. " * 30
    made = QuestionReadings(questions(padding=padding), llm, max_tokens=200, missing_share=0)
    places = set()
    for at in range(40):
        reading = made.reading(at)
        whole = "".join(text(llm, reading))
        assert answers(llm, reading)[0] in whole
        documents = [ids for ids, _ in reading.parts if "rained" in llm.decode(ids.tolist())]
        assert sum(map(len, documents)) <= 200
        places.add(whole.find("was built in"))
    assert len(places) > 5


def test_prompts_of_ask_and_of_the_evaluation_are_both_used(llm):
    prompts = ["".join(text(llm, reading)) for reading in many(llm)]
    asked = sum("[1] Document\n" in prompt for prompt in prompts)
    evaluated = sum("Read the text and answer the question with a few words" in prompt for prompt in prompts)
    assert asked + evaluated == len(prompts)
    assert 60 < asked < 140


def test_each_source_has_at_most_so_many_rows(llm):
    others = [Question(f"other:{at}", f"Word {at}", "Which word?", (str(at),)) for at in range(3)]
    made = QuestionReadings([*questions(), *others], llm, most_per_source=2)
    assert sorted(question.id.split(":")[0] for question in made.questions) == ["made", "made", "other", "other"]


def test_a_stream_of_readings_goes_through_all_questions_in_turn(llm):
    made = QuestionReadings(questions(), llm, missing_share=0)
    rounds = [[answers(llm, made.reading(at))[0] for at in range(5 * r, 5 * r + 5)] for r in range(3)]
    assert all(sorted(found) == [f"18{at}0" for at in range(5)] for found in rounds)
    assert rounds[0] != rounds[1] or rounds[1] != rounds[2]


@pytest.mark.parametrize("n_characters", [150, 2000])  # more tokens than are taken, in few characters and in many
def test_of_a_text_without_spaces_a_part_with_the_answer_is_kept(llm, n_characters):
    draw = np.random.default_rng(0)
    rows = []
    for at in range(12):
        text = "".join(chr(0x4E00 + int(one)) for one in draw.integers(0, 2000, n_characters))
        where, answer = int(draw.integers(n_characters)), f"#{at:02}#"
        rows.append(Question(str(at), text[:where] + answer + text[where:], "When?", (answer,)))
    made = QuestionReadings(rows, llm, max_tokens=96, missing_share=0)
    for row in rows:
        for seed in range(4):
            document = made._own_document(row, row.answers[0], np.random.default_rng(seed))
            assert len(document) <= 96
            assert row.answers[0] in llm.decode(document.tolist())


def test_a_further_question_is_asked_only_where_its_answer_is_left(llm):
    text = "".join(chr(0x4E00 + at) for at in range(100))
    rows = [Question(str(at), f"#a#{text}#b#", "Which?", (answer,)) for at, answer in enumerate(("#a#", "#b#"))]
    made = QuestionReadings(rows, llm, max_tokens=96, missing_share=0, most_further=1)
    document = made._own_document(rows[0], "#a#", np.random.default_rng(0))
    assert made._further(rows[0], document, np.random.default_rng(0)) == []


def test_further_questions_about_the_document_are_further_turns(llm):
    context = "The mill was built in 1820 by nine masons. " + "It rained. " * 20
    facts = [("When was it built?", "1820"), ("By how many masons?", "nine"), ("What was the weather?", "rain")]
    rows = [Question(str(at), context, question, (answer,)) for at, (question, answer) in enumerate(facts)]
    made = QuestionReadings(rows, llm, missing_share=0, most_further=1)
    seen = set()
    for at in range(30):
        reading = made.reading(at)
        found = answers(llm, reading)
        seen.add(tuple(found))
        assert len(found) == len(set(found)) == 2
        whole = llm.decode([index for ids, _ in reading.parts for index in ids.tolist()])
        assert whole.count("The mill was built") == 1
        for question, answer in facts:
            assert (question in whole) == (answer in found)
            if answer in found:  # as the template has it, the end of the turn among what is scored
                after = whole[whole.index(question) + len(question) :]
                assert after.replace("\nAnswer with a few words only.", "").startswith(f"\nassistant\n{answer}")
    assert len(seen) == 6


def test_only_questions_that_the_kept_part_answers_follow(llm):
    context = "The mill was built in 1820. " + "It rained on the hills. " * 60 + "The tower is 31 metres high."
    rows = [Question("0", context, "When was it built?", ("1820",)), Question("1", context, "How high?", ("31",))]
    made = QuestionReadings(rows, llm, max_tokens=120, missing_share=0)
    assert all(len(answers(llm, made.reading(at))) == 1 for at in range(20))


def test_no_answer_is_longer_than_what_is_read(llm):
    answer = "in the year of the great flood, when the river rose over the walls of the old town and the bridge fell"
    context = "It rained on the hills. " * 8 + f"The mill was built {answer}. " + "It rained on the hills. " * 8
    rows = [Question("0", context, "When?", (answer,)), Question("1", context, "What was built?", ("The mill",))]
    made = QuestionReadings(rows, llm, max_tokens=len(answer) // 3 - 1, missing_share=0)
    assert [question.id for question in made.questions] == ["1"]
    assert all(answers(llm, made.reading(at)) for at in range(20))


def test_no_usable_question_is_an_error(llm):
    with pytest.raises(TrainingError, match="none of the 5 questions has a document of at most 4 tokens"):
        QuestionReadings([Question(str(at), "long " * 100, "Why?", ("because",)) for at in range(5)], llm, max_tokens=4)


@pytest.mark.parametrize("places", [(2,), (1, 3)])
def test_by_a_plan_the_sentences_nearest_to_the_question_stay_text(llm, places):
    facts = {1: "The old harbour was built in 1820.", 3: "Its harbour master wrote a diary of the old harbour."}
    other = ["It rained.", "Nothing grew there.", "The wind came from the north.", "Few people knew."]
    for at in places:
        other[at] = facts.get(at, "The old harbour was built in 1820.")
    context = " ".join(other)
    rows = [Question("0", context, "When was the old harbour built?", ("1820",))]
    made = QuestionReadings(rows, llm, missing_share=0, raw_share=0, focus_share=1, most_further=0)
    seen = set()
    for at in range(40):
        reading = made.reading(at)
        documents = [part for part, role in reading.parts if role == "document"]
        assert all(part.document is documents[0].document for part in documents)  # of one encoding of the whole
        compressed = "".join(llm.decode(part.document[part.start : part.stop].tolist()) for part in documents)
        whole = "".join(llm.decode(part.document[part.start : part.stop].tolist()) if role == "document"
                        else llm.decode(part.tolist()) for part, role in reading.parts)  # fmt: skip
        assert context in whole
        assert "built in 1820" not in compressed
        assert "Nothing grew" in compressed or "Nothing" not in context
        seen.add(compressed.count("harbour"))
    assert seen == ({0} if len(places) == 1 else {0, 2})  # one sentence alone, or both


@pytest.mark.parametrize("most", [1, 4])
def test_at_most_so_many_documents_of_other_questions_are_read_beside(llm, most):
    readings = many(llm, missing_share=0, raw_share=0, most_distractors=most)
    found = [len(text(llm, reading, "document")) for reading in readings]
    assert (min(found), max(found)) == (1, 1 + most)


def test_by_a_plan_nothing_stays_text_where_no_word_of_the_question_is_found(llm):
    rows = [Question("0", "It rained. Few people knew.", "Who?", ("people",))]
    made = QuestionReadings(rows, llm, missing_share=0, raw_share=0, focus_share=1)
    (document,) = text(llm, made.reading(0), "document")
    assert document == "It rained. Few people knew."

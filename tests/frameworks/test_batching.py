"""Requests from many threads: each its own answer, together in few passes, errors and cancellation each its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import MagicMock

import pytest
from passes import PATIENCE
from tiny import SENTENCES, shared_embedder, tiny_llm

from extemb_core import Document, ExtensibleLM
from extemb_core.errors import BudgetError, ConfigError
from extemb_core.frameworks.batching import Batcher, _Request, _together
from extemb_core.models.llm import LLM

QUESTIONS = [f"What is {number} plus {number}?" for number in range(8)]


@pytest.fixture
def lm():
    llm = tiny_llm()
    return ExtensibleLM(llm, shared_embedder(llm))


@pytest.fixture
def batches(monkeypatch):
    """How many prompts each batch had; the first batches wait for all that were announced, however long that takes."""
    sizes = []
    whole, stream = LLM.generate, LLM.stream
    monkeypatch.setattr("extemb_core.frameworks.batching._GATHER_SECONDS", 300)

    def generate(self, prompts, sampling, on_token=None):
        if on_token.__name__ != "<lambda>":  # else a plain `ask`
            sizes.append(len(prompts))
            if sum(sizes) >= 4:  # no other batch of these tests is filled
                monkeypatch.setattr("extemb_core.frameworks.batching._GATHER_SECONDS", 0.05)
        return whole(self, prompts, sampling, on_token)

    def alone(self, *args):
        monkeypatch.setattr("extemb_core.frameworks.batching._GATHER_SECONDS", 0.05)
        return stream(self, *args)

    monkeypatch.setattr(LLM, "generate", generate)
    monkeypatch.setattr(LLM, "stream", alone)
    return sizes


def ask(lm, batcher, question, documents=(), cancelled=None, **settings):
    return batcher.answer(*lm.prepare(question, documents, **settings), cancelled)


def ask_all(lm, batcher, questions, **settings):
    with ThreadPoolExecutor(len(questions)) as pool, batcher.announce(len(questions)):
        return list(pool.map(lambda question: ask(lm, batcher, question, **settings), questions))


def test_a_list_is_one_batch(lm, batches):
    answers = Batcher(lm.llm).answer_all([lm.prepare(question, max_new_tokens=3) for question in QUESTIONS])
    assert batches == [8]
    assert [answer.text for answer in answers] == [lm.ask(question, max_new_tokens=3).text for question in QUESTIONS]
    assert Batcher(lm.llm).answer_all([]) == []


def test_what_comes_at_once_is_answered_together_and_as_alone(lm, batches):
    answers = ask_all(lm, Batcher(lm.llm), QUESTIONS, max_new_tokens=4)
    assert batches == [8]
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert answer.text == lm.ask(question, max_new_tokens=4).text
        assert (answer.new_tokens, answer.finish_reason) == (4, "length")


def test_a_request_alone_does_not_wait_for_others(lm, batches):
    batcher = Batcher(lm.llm)
    document = Document(SENTENCES[:100])
    answer = ask(lm, batcher, "What?", [document], ratio=4, max_new_tokens=3)
    again = lm.ask("What?", [document], ratio=4, max_new_tokens=3)
    assert (answer.text, answer.context[0].fidelity) == (again.text, 4)
    assert batches == []


def test_a_batch_has_a_size(lm, batches):
    ask_all(lm, Batcher(lm.llm, batch_size=3), QUESTIONS, max_new_tokens=2)
    assert max(batches) == 3
    assert sum(batches) >= 6


def test_who_has_come_is_not_waited_for_again(lm, monkeypatch):
    """Else the last batch, of two where three would do, would take five minutes."""
    monkeypatch.setattr("extemb_core.frameworks.batching._GATHER_SECONDS", 300)
    batcher = Batcher(lm.llm, batch_size=3)
    with batcher.announce(len(QUESTIONS)):
        answers = batcher.answer_all([lm.prepare(question, max_new_tokens=2) for question in QUESTIONS])
    assert len(answers) == len(QUESTIONS)
    with batcher.announce(2):  # of whom none comes
        pass
    assert lm.ask("What?", max_new_tokens=2).text == ask(lm, batcher, "What?", max_new_tokens=2).text


def test_other_settings_are_another_batch(lm, batches):
    batcher = Batcher(lm.llm)
    with ThreadPoolExecutor(8) as pool, batcher.announce(8):
        made = list(pool.map(lambda at: ask(lm, batcher, QUESTIONS[at], max_new_tokens=2 + at % 2), range(8)))
    assert batches == [4, 4]
    assert [answer.new_tokens for answer in made] == [2, 3] * 4


def test_draws_with_a_seed_are_made_alone(lm, batches):
    seeded = ask_all(lm, Batcher(lm.llm), QUESTIONS[:3], max_new_tokens=3, temperature=1.0, seed=5)
    assert batches == []
    assert [answer.text for answer in seeded] == [
        lm.ask(question, max_new_tokens=3, temperature=1.0, seed=5).text for question in QUESTIONS[:3]
    ]


def test_who_is_answered_does_not_wait_for_the_batches_of_others(lm, monkeypatch):
    monkeypatch.setattr("extemb_core.frameworks.batching._GATHER_SECONDS", 1)  # for all of them, in this order
    batcher = Batcher(lm.llm)
    go_on = threading.Event()
    whole = LLM.stream

    def stream(self, prompt, sampling, result=None):
        if sampling.max_new_tokens == 3:
            assert go_on.wait(600)
        yield from whole(self, prompt, sampling, result)

    monkeypatch.setattr(LLM, "stream", stream)
    with ThreadPoolExecutor(3) as pool, batcher.announce(3):
        lengths = (2, 3, 2)  # the slow one is second in the queue
        made = []
        for at, length in enumerate(lengths):
            made.append(pool.submit(ask, lm, batcher, QUESTIONS[at], max_new_tokens=length))
            while at < 2 and not (batcher._answering and len(batcher._waiting) > at):
                time.sleep(0.001)
        try:
            assert [made[at].result(timeout=300).new_tokens for at in (0, 2)] == [2, 2]
        finally:
            go_on.set()
        assert made[1].result().new_tokens == 3


def test_an_error_is_of_the_request_that_made_it(lm):
    batcher = Batcher(lm.llm)

    def text(question):
        try:
            return ask(lm, batcher, question, max_new_tokens=2).text
        except BudgetError as error:
            return error

    with ThreadPoolExecutor(4) as pool, batcher.announce(4):
        made = list(pool.map(text, ["a?", "b " * 400, "c?", "d?"]))
    assert [isinstance(one, BudgetError) for one in made] == [False, True, False, False]


def test_what_a_batch_has_no_memory_for_is_answered_one_by_one(lm, monkeypatch):
    monkeypatch.setattr(LLM, "generate", MagicMock(side_effect=MemoryError("too large")))
    prepared = [lm.prepare(question, max_new_tokens=3) for question in QUESTIONS]
    answers = Batcher(lm.llm).answer_all(prepared)
    assert LLM.generate.call_count == 1
    monkeypatch.undo()
    assert [answer.text for answer in answers] == [lm.ask(question, max_new_tokens=3).text for question in QUESTIONS]


def test_a_request_that_fails_fails_no_other(lm, monkeypatch):
    batcher = Batcher(lm.llm)
    stream = LLM.stream

    def fail(self, prompt, sampling, result=None):
        if prompt == wrong:
            raise MemoryError("too large")
        return stream(self, prompt, sampling, result)

    prepared = [lm.prepare(question, max_new_tokens=2) for question in QUESTIONS[:3]]
    wrong = prepared[1][0].prompt.inputs(lm.llm)
    monkeypatch.setattr(LLM, "generate", MagicMock(side_effect=MemoryError("too large")))
    monkeypatch.setattr(LLM, "stream", fail)
    with ThreadPoolExecutor(3) as pool, batcher.announce(3):
        made = [pool.submit(batcher.answer, *one) for one in prepared]
    assert [type(one.exception()) for one in made] == [type(None), MemoryError, type(None)]
    assert [one.result().new_tokens for one in (made[0], made[2])] == [2, 2]
    with pytest.raises(MemoryError):
        batcher.answer_all(prepared)
    monkeypatch.undo()
    assert ask_all(lm, batcher, QUESTIONS[:2], max_new_tokens=2)[0].new_tokens == 2


def test_who_is_interrupted_leaves_the_others_their_answers(lm, monkeypatch):
    batcher = Batcher(lm.llm)
    prepared = [lm.prepare(question, max_new_tokens=2) for question in QUESTIONS[:3]]
    other = _Request(*prepared[0], threading.Event())
    batcher._waiting = [other]
    monkeypatch.setattr(LLM, "generate", MagicMock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        batcher.answer_all(prepared[1:])
    assert batcher._waiting == [other]
    assert not other.answer.done()


@pytest.mark.parametrize("way", ["at once", "as a list", "ask_batch"])
def test_a_batch_takes_no_more_positions_than_the_device_has_memory_for(lm, monkeypatch, way):
    shapes = []
    whole = LLM.generate

    def generate(self, prompts, sampling, on_token=None):
        shapes.append((len(prompts), max(map(len, prompts)) + sampling.max_new_tokens))
        return whole(self, prompts, sampling, on_token)

    questions = [f"{number}. {SENTENCES[: 30 * number]}" for number in range(8)]
    alone = [lm.ask(question, max_new_tokens=2).text for question in questions]
    monkeypatch.setattr(LLM, "generate", generate)
    monkeypatch.setattr("extemb_core.models.bulk.POSITIONS_AT_ONCE", 300)
    batcher = Batcher(lm.llm)
    if way == "at once":
        answers = ask_all(lm, batcher, questions, max_new_tokens=2)
    elif way == "as a list":
        answers = batcher.answer_all([lm.prepare(question, max_new_tokens=2) for question in questions])
    else:
        answers = lm.ask_batch(questions, max_new_tokens=2)
    assert [answer.text for answer in answers] == alone
    if way != "at once":  # where what comes in time is together
        assert max(rows for rows, _ in shapes) > 1
    assert all(rows * longest <= 300 or rows == 1 for rows, longest in shapes)


def test_who_gives_up_gets_what_there_is(lm):
    batcher = Batcher(lm.llm)
    cancelled = threading.Event()
    cancelled.set()
    answer = ask(lm, batcher, "What?", max_new_tokens=4, cancelled=cancelled)
    assert (answer.text, answer.finish_reason) == ("", "cancelled")
    with ThreadPoolExecutor(2) as pool, batcher.announce(2):
        gone = pool.submit(ask, lm, batcher, "What?", max_new_tokens=4, cancelled=cancelled)
        stays = pool.submit(ask, lm, batcher, "Who?", max_new_tokens=4)
    assert gone.result().finish_reason == "cancelled"
    assert stays.result().text == lm.ask("Who?", max_new_tokens=4).text


def test_who_gives_up_in_the_middle_of_a_batch_leaves_the_others_their_answers(lm, monkeypatch):
    requests = [_Request(*lm.prepare(question, max_new_tokens=4), threading.Event()) for question in QUESTIONS[:2]]
    whole = LLM.generate

    def generate(self, prompts, sampling, on_token):
        def gives_up():
            requests[0].cancelled.set()
            on_token()

        return whole(self, prompts, sampling, gives_up)

    monkeypatch.setattr(LLM, "generate", generate)
    _together(lm.llm, requests)
    monkeypatch.undo()
    assert requests[0].cancelled.is_set()
    assert requests[1].answer.result().text == lm.ask(QUESTIONS[1], max_new_tokens=4).text != ""


def test_the_size_of_a_batch_is_checked(lm):
    with pytest.raises(ConfigError, match="batch_size=0 is not a whole number of at least 1"):
        Batcher(lm.llm, batch_size=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_waits_for_no_thread_of_its_parent(lm):
    batcher = Batcher(lm.llm)
    before = ask(lm, batcher, "Who?", max_new_tokens=2).text
    batcher._answering = True  # another thread is at it, and holds the lock
    with batcher._changed:
        child = os.fork()
        if not child:
            code = 1
            try:
                signal.alarm(PATIENCE)  # kills it
                code = int(ask(lm, batcher, "Who?", max_new_tokens=2).text != before)
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert batcher._answering

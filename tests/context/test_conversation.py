"""The online mode: any length in, positions bounded, everything accounted for."""

from __future__ import annotations

import pytest
import torch
from tiny import SENTENCES, shared_embedder, tiny_llm

from extemb_core import Document, ExtensibleLM
from extemb_core.context.assembly import assemble_chat
from extemb_core.errors import BudgetError, ConfigError
from extemb_core.models.llm import LLM


@pytest.fixture(params=[0, 1], ids=["entry 0", "entry 1"])
def lm(request):
    llm = tiny_llm()
    return ExtensibleLM(llm, shared_embedder(llm, request.param))


def send(session, text):
    return session.send(text, max_new_tokens=6)


def test_a_short_conversation_is_a_plain_chat(lm):
    session = lm.session()
    first = send(session, "Hello.")
    second = send(session, "Why?")
    messages = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Why?"},
    ]
    assert second.text == lm.chat(messages, max_new_tokens=6).text
    assert session.condensed_tokens == 0


def test_a_long_message_stays_whole_and_in_its_place_where_the_window_holds_it(lm, monkeypatch):
    monkeypatch.setattr("extemb_core.context.conversation._PIECE_CHARS", 40)
    session, text = lm.session(), f"Say this again: {SENTENCES[:150]}"
    first, second = send(session, "Hello."), send(session, text)
    messages = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": text},
    ]
    expected = lm.chat(messages, max_new_tokens=6)
    assert (second.text, second.prompt_positions) == (expected.text, expected.prompt_positions)
    assert session.condensed_tokens == 0


def test_no_more_of_a_message_is_encoded_at_once_than_tells_that_it_is_too_long(lm, monkeypatch):
    monkeypatch.setattr("extemb_core.context.conversation._PIECE_CHARS", 80)
    session, sizes, encode = lm.session(), [], lm.llm.encode
    monkeypatch.setattr(lm.llm, "encode", lambda text: (sizes.append(len(text)), encode(text))[1])
    assert not session._holds(SENTENCES * 50, 4)
    assert max(sizes) <= 80
    assert sum(sizes) < len(SENTENCES) * 10


def test_six_windows_of_turns_never_overflow(lm):
    session = lm.session(window=200)
    said = 0
    while said < 6 * 200:
        text = f"Turn {said}: " + SENTENCES[:120]
        said += len(lm.llm.encode(text))
        answer = send(session, text)
        assert answer.prompt_positions + 6 <= 200
    assert session.condensed_tokens > 0
    assert session.dropped_tokens > 0  # six windows at ratio 8 do not fit half a window
    assert session.condensed_tokens + session.dropped_tokens >= said - 260
    (told,) = answer.context
    assert (told.source, told.n_tokens, told.turn) == ("the oldest turns", session.dropped_tokens, True)
    assert answer.dropped == (told,)
    assert answer.documents == ()


def test_the_oldest_is_coarsened_and_then_forgotten_and_the_rest_is_read_in_its_order(lm, monkeypatch):
    made, given, read = [], [], []

    def compress(texts, **settings):
        given.extend(texts)
        made.extend(one := whole(texts, **settings))
        return one

    def assemble(llm, messages):
        read[:] = [part for part in messages[0]["content"] if not isinstance(part, str)]
        return assemble_chat(llm, messages)

    def states(part):
        return part.states if lm.embedder.config.entry_layer else part

    whole = lm.embedder.compress_ids
    monkeypatch.setattr(lm.embedder, "compress_ids", compress)
    monkeypatch.setattr("extemb_core.context.conversation.assemble_chat", assemble)
    session, ratios = lm.session(window=200), []
    for at in range(12):
        send(session, f"Turn {at}: " + SENTENCES[7 * at :][:120])
        kept = session._condensed
        for one, first in zip(kept, made[len(made) - len(kept) :], strict=True):
            assert torch.equal(one.embeddings, first.at_ratio(one.ratio).embeddings)
        ratios.append([one.ratio for one in kept])
        assert ratios[-1] == sorted(ratios[-1], reverse=True)
        session._prompt([])
        assert all(torch.equal(states(part), states(one.part)) for part, one in zip(read, kept, strict=True))
    assert len(session._condensed) < len(made)
    assert any(len(set(of_turn)) > 1 for of_turn in ratios)
    said = [lm.llm.tokenizer.decode(ids) for ids in given]
    assert said[0].startswith("user: Turn 0")
    assert any(one.startswith("assistant: ") for one in said)


def test_a_stream_of_text_is_condensed_and_counted(lm):
    session = lm.session(window=200)
    text = SENTENCES * 3
    session.append(text)
    n_tokens = len(lm.llm.encode(text))
    assert session.positions <= 200
    assert session.condensed_tokens + session.dropped_tokens <= n_tokens + 60  # cutting may re-split a few tokens
    assert session.condensed_tokens + session.dropped_tokens > n_tokens - 200
    assert send(session, "What was that?").prompt_positions <= 200 - 6


def test_what_was_said_early_changes_late_answers(lm):
    answers = []
    for opening in ("Copper wires and nothing else.", "Sand, sand, sand and the sea!"):
        session = lm.session(window=200)
        session.append(opening * 3 + SENTENCES)
        assert session.condensed_tokens > 0
        answers.append(send(session, "Go on."))
    assert answers[0].text != answers[1].text


def test_a_message_longer_than_the_window_is_condensed_from_its_start(lm):
    session = lm.session(window=200)
    answer = send(session, SENTENCES * 2)
    assert answer.prompt_positions <= 194
    assert session.condensed_tokens > 0


def test_a_long_stream_costs_as_much_as_its_length(lm, monkeypatch):
    """Twice the text, about twice the prompts rendered: nothing is rendered again and again as a whole."""
    from extemb_core.context import conversation as module

    rendered: list[int] = []

    def counting(llm, messages, **options):
        prompt = assemble_chat(llm, messages, **options)
        rendered.append(len(prompt))
        return prompt

    monkeypatch.setattr(module, "assemble_chat", counting)
    monkeypatch.setattr(module, "_PIECE_CHARS", 400)
    costs = []
    for times in (4, 8):
        rendered.clear()
        lm.session(window=200).append(SENTENCES * times)
        costs.append(sum(rendered))
    assert costs[1] < 2.3 * costs[0]
    assert max(rendered) < 600


def test_documents_stay_in_the_prompt(lm):
    session = lm.session([SENTENCES], window=250, budget=100)
    for _ in range(6):
        answer = send(session, "Rivers carry sand to the sea. " * 4)
        assert answer.prompt_positions <= 244
        assert answer.context[0].n_tokens == len(lm.llm.encode(SENTENCES))


def test_streaming_joins_the_conversation_when_read_or_closed(lm):
    session = lm.session()
    stream = session.stream("Hello.", max_new_tokens=6)
    before = session.positions
    list(stream)
    assert session.positions > before
    with session.stream("And?", max_new_tokens=50) as stream:
        next(stream)
    assert stream.answer.finish_reason == "cancelled"
    assert send(session, "Then?").prompt_positions > 0


@pytest.mark.parametrize("written", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_turn_that_fails_does_not_join_the_conversation(lm, monkeypatch, written, error):
    session = lm.session()
    before = session.positions
    whole = LLM.stream

    def failing(self, prompt, sampling, result=None):
        pieces = whole(self, prompt, sampling, result)
        yield from (next(pieces) for _ in range(written))
        pieces.close()
        raise error

    monkeypatch.setattr(LLM, "stream", failing)

    def streamed():
        with session.stream("Hello.", max_new_tokens=50) as stream:
            list(stream)

    for ask in (streamed, lambda: session.send("Hello.", max_new_tokens=50)):
        with pytest.raises(type(error)):
            ask()
        assert session.positions == before
    monkeypatch.undo()
    assert send(session, "Hello.").text == send(lm.session(), "Hello.").text


@pytest.mark.parametrize("piece_chars", [8192, 512])
def test_a_message_longer_than_the_window_that_fails_leaves_the_conversation_as_it_was(lm, monkeypatch, piece_chars):
    monkeypatch.setattr("extemb_core.context.conversation._PIECE_CHARS", piece_chars)
    session, message = lm.session(window=200), " ".join(f"word {number} and" for number in range(60))

    def shown():
        return session.positions, session.condensed_tokens, session.dropped_tokens

    send(session, "Hello.")
    before = shown()
    with pytest.raises(BudgetError):
        session.send(message, max_new_tokens=190)
    with session.stream(message, max_new_tokens=6):
        pass
    with monkeypatch.context() as patched:
        patched.setattr(type(lm.embedder), "compress_ids", lambda *args, **settings: 1 / 0)
        for call in (session.append, lambda text: send(session, text)):
            with pytest.raises(ZeroDivisionError):
                call(message)
    assert shown() == before
    send(session, message)
    assert session.condensed_tokens + session.dropped_tokens > 0


def test_what_joins_while_an_answer_is_written_stays(lm):
    session = lm.session(window=200)
    with session.stream("word " * 300, max_new_tokens=6) as stream:
        session.append("And the mill was sold.")
        between = session.positions
        list(stream)
    assert session.positions > between
    assert any("mill was sold" in turn.text for turn in session._timeline) or session.condensed_tokens


def test_a_turn_that_nobody_waits_for_does_not_join_the_conversation(lm):
    session = lm.session()
    before = session.positions
    with session.stream("Hello.", max_new_tokens=50) as stream:
        pass
    assert (stream.answer.text, stream.answer.finish_reason, session.positions) == ("", "cancelled", before)


def test_bad_input(lm):
    with pytest.raises(ConfigError, match="window=0"):
        lm.session(window=0)
    with pytest.raises(ConfigError, match="window=9999"):
        lm.session(window=9999)
    for window in ("100", 100.5):
        with pytest.raises(ConfigError, match=f"window={window!r} is not a whole number"):
            lm.session(window=window)
    with pytest.raises(ConfigError, match="message is empty"):
        lm.session().send(" ")
    for call, name in ((lm.session().send, "message"), (lm.session().append, "text")):
        with pytest.raises(ConfigError, match=f"the {name} is a NoneType, None; pass a str"):
            call(None)
    with pytest.raises(BudgetError, match="an answer of up to 110 leaves a message no room"):
        lm.session([SENTENCES], window=120).send("Hi.", max_new_tokens=110)
    for budget in (-1, 1.5):
        with pytest.raises(BudgetError, match=f"budget={budget}"):
            lm.session(budget=budget)


def test_a_budget_larger_than_the_room_is_what_the_room_is(lm):
    """Also when an answer is to be longer than was thought of: documents make room, and the answer says so."""
    session = lm.session([Document(SENTENCES, title="notes")], window=160, budget=9999)
    first = session.send("Hi.", max_new_tokens=4)
    longer = session.send("Hi.", max_new_tokens=60)
    for answer, new_tokens in ((first, 4), (longer, 60)):
        assert answer.context[0].positions <= answer.budget < 160 - new_tokens
        assert answer.prompt_positions <= 160 - new_tokens
    assert longer.context[0].positions < first.context[0].positions
    assert longer.context[0].fidelity != "dropped"


def test_documents_come_back_when_a_long_answer_is_over(lm):
    session = lm.session([Document(SENTENCES, title="notes")], window=200, budget=60)
    first = session.send("Hi.", max_new_tokens=4)
    longer = session.send("Hi.", max_new_tokens=140)
    after = session.send("Hi.", max_new_tokens=4)
    assert longer.budget < first.budget == after.budget == 60
    assert longer.context[0].positions < first.context[0].positions == after.context[0].positions


def test_embeddings_that_a_session_made_are_there_at_the_next_answer(lm):
    session = lm.session([Document(SENTENCES, title="notes"), "Short."], window=200, budget=80)
    first, second = (session.send("Hi.", max_new_tokens=4) for _ in range(2))
    assert [(entry.fidelity == "raw", entry.cached) for entry in first.context] == [(False, False), (True, False)]
    assert [entry.cached for entry in second.context] == [True, False]
    assert second.seconds["compress"] == 0

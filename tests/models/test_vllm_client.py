"""Answers of a server: the prompt that it reads is the one that this process would have read."""

from __future__ import annotations

import itertools
import json
import threading
import time
from typing import Any

import httpx
import pytest
import torch
from fake_vllm import URL, FakeVllm
from processes import interruptible
from tiny import SENTENCES, entering, random_embedder, save_tiny, tiny_llm

from extemb_core import ExtensibleLM
from extemb_core.errors import ConfigError, EngineError
from extemb_core.frameworks import shared
from extemb_core.models.entry import AnchoredPrompt
from extemb_core.models.generation import Generated, Sampling, StreamedRow
from extemb_core.models.vllm_client import VllmLLM, load_llm

DOCUMENT, OTHER, QUESTION = SENTENCES[:170], SENTENCES[200:330], "What did the keeper count?"
DRAWN = {"max_new_tokens": 8, "temperature": 1.0, "seed": 1}


def over(server: FakeVllm, llm: Any) -> VllmLLM:
    """An LLM like `llm` whose answers the server writes."""
    made = VllmLLM(llm.model, llm.tokenizer, llm.name)
    made.base_url = URL
    made.__dict__["_client"] = server.client()
    return made


def pair(make: Any = entering, llm: Any = None, **settings: Any) -> tuple[ExtensibleLM, ExtensibleLM, FakeVllm]:
    """The same with the engine here, and with a server that has the same LLM."""
    llm = llm or tiny_llm()
    here = ExtensibleLM(llm, make(llm))
    server = FakeVllm(llm, here.embedder.fingerprint, **settings)
    remote = over(server, llm)
    return here, ExtensibleLM(remote, make(remote)), server


def same_prompt(read: Any, expected: Any) -> bool:
    if isinstance(expected, AnchoredPrompt):
        states = torch.where(expected.mask[:, None], expected.states, 0)
        return (
            torch.equal(read.ids, expected.ids)
            and torch.equal(read.mask, expected.mask)
            and torch.equal(read.states, states)
        )
    return torch.equal(read, expected) if isinstance(expected, torch.Tensor) else list(read) == list(expected)


@pytest.mark.parametrize("ratio", [2, 8, "raw", "auto"])
@pytest.mark.parametrize("make", [entering, random_embedder], ids=["states", "embeddings"])
def test_the_server_reads_what_would_have_been_read_here(make: Any, ratio: Any) -> None:
    here, there, server = pair(make)
    documents = [DOCUMENT, OTHER]
    settings = {"ratio": ratio, "budget": None if ratio != "auto" else 60, **DRAWN}
    expected, answer = (lm.ask(QUESTION, documents, **settings) for lm in (here, there))
    (read,) = server.prompts
    assert same_prompt(read, here.prepare(QUESTION, documents, **settings)[0].prompt.inputs(here.llm))
    assert (answer.text, answer.finish_reason, answer.new_tokens) == (
        expected.text, expected.finish_reason, expected.new_tokens,
    )  # fmt: skip
    assert [(entry.fidelity, entry.positions) for entry in answer.context] == [
        (entry.fidelity, entry.positions) for entry in expected.context
    ]
    with there.stream(QUESTION, documents, **settings) as stream:
        pieces = list(stream)
    assert "".join(pieces) == stream.answer.text == expected.text
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}]
    messages.append({"role": "user", "content": QUESTION})
    answers = [lm.chat(messages, documents, **settings).text for lm in (here, there)]
    assert answers[0] == answers[1]


def test_control_tokens_in_documents_and_questions_stay_data() -> None:
    here, there, server = pair(llm=tiny_llm(bos=True))
    asked = {"question": "<|im_end|> and <|extemb|>?", "documents": ["a <|im_start|>user b c d e f" * 2], "ratio": 2}
    there.ask(**asked, max_new_tokens=2)
    assert same_prompt(server.prompts[0], here.prepare(**asked, max_new_tokens=2)[0].prompt.inputs(here.llm))


def test_a_stream_that_is_closed_ends_the_request() -> None:
    _, there, server = pair()
    stream = there.stream(QUESTION, [DOCUMENT], max_new_tokens=40)
    first = next(stream)
    stream.close()
    assert (server.closed, stream.answer.text, stream.answer.finish_reason) == (1, first, "cancelled")


def test_prompts_are_answered_at_the_same_time() -> None:
    here, there, server = pair()
    meet = threading.Barrier(3)
    server.before_answer = lambda: meet.wait(30)
    questions = [QUESTION, "And?", "Why?"]
    expected = [answer.text for answer in here.ask_batch(questions, [[DOCUMENT]] * 3, **DRAWN)]
    assert [answer.text for answer in there.ask_batch(questions, [[DOCUMENT]] * 3, **DRAWN)] == expected
    prepared = [there.prepare(question, [DOCUMENT], **DRAWN) for question in questions]
    assert [answer.text for answer in there.batcher.answer_all(prepared)] == expected
    cancelled = threading.Event()
    cancelled.set()
    assert {answer.finish_reason for answer in there.batcher.answer_all(prepared, cancelled)} == {"cancelled"}
    assert there.llm.generate([], prepared[0][1]) == []


@pytest.mark.parametrize("way", ["ask", "ask_batch", "batcher"])
@pytest.mark.parametrize("count", [1, 3])
def test_who_is_interrupted_waits_for_the_next_piece_alone(way: str, count: int) -> None:
    _, there, server = pair()
    settings: dict[str, Any] = {"max_new_tokens": 60, "temperature": 1.0, "seed": 1}
    prepared = [there.prepare(QUESTION, [DOCUMENT], **settings)] * count
    ways: dict[str, Any] = {
        "ask": lambda: there.ask(QUESTION, [DOCUMENT], **settings),
        "ask_batch": lambda: there.ask_batch([QUESTION] * count, [[DOCUMENT]] * count, **settings),
        "batcher": lambda: there.batcher.answer_all(prepared),
    }
    pieces: list[int] = []
    with interruptible() as interrupt:

        def after_piece() -> None:
            pieces.append(1)
            if len(pieces) == 5:
                interrupt()
            if len(pieces) >= 5:
                time.sleep(0.1)  # until that has come

        server.after_piece = after_piece
        with pytest.raises(KeyboardInterrupt):
            ways[way]()
    assert len(pieces) < 60
    assert len(server.bodies) == (1 if way == "ask" else count)
    if len(server.bodies) > 1:  # one alone is in this thread, with its server
        assert server.closed == count


def test_an_answer_that_fails_ends_the_others_and_is_not_complete() -> None:
    _, there, server = pair()
    asked, pieces = itertools.count(1), []

    def before_answer() -> None:
        if next(asked) % 3 == 0:
            raise httpx.ReadError("gone")

    server.before_answer = before_answer
    server.after_piece = lambda: pieces.append(time.sleep(0.1))  # type: ignore[func-returns-value]
    drawn = Sampling(max_new_tokens=60, temperature=1.0, seed=1)
    with pytest.raises(EngineError, match="broke off"):
        there.llm.generate([[5, 6, 7]] * 3, drawn)
    assert len(pieces) < 2 * 60
    result = Generated()
    server.before_answer = lambda: None
    server.after_piece = before_answer
    with pytest.raises(EngineError, match="broke off"):
        list(there.llm.stream([5, 6, 7], drawn, result))
    assert (len(result.token_ids), result.finish_reason) == (3, "cancelled")


def test_rows_are_streamed_from_the_server_and_each_ends_by_itself() -> None:
    here, there, server = pair()
    meet = threading.Barrier(3)
    server.before_answer = lambda: meet.wait(30)
    drawn = [Sampling(max_new_tokens=length, temperature=1.0, seed=1) for length in (4, 9, 60)]
    prepared = [
        there.prepare(QUESTION, [DOCUMENT], ratio=4, max_new_tokens=60)[0].prompt.inputs(there.llm) for _ in drawn
    ]
    told: list[list[str | None]] = [[], [], []]
    rows = [StreamedRow(prompt, how, pieces.append) for prompt, how, pieces in zip(prepared, drawn, told, strict=True)]
    server.after_piece = lambda: len(told[2]) >= 3 and rows[2].cancelled.set()
    there.llm.stream_batch(rows)
    assert len(server.bodies) == 3
    expected = here.llm.generate(prepared[:1], drawn[1])[0].text
    assert rows[1].result.text == "".join(filter(None, told[1])) == expected
    assert [row.result.finish_reason for row in rows] == ["length", "length", "cancelled"]
    assert [pieces.index(None) == len(pieces) - 1 for pieces in told] == [True] * 3
    assert 3 <= len(told[2]) < 60
    assert server.closed == 1
    gone = StreamedRow([5, 6], drawn[0], told[0].append)
    gone.cancelled.set()
    there.llm.stream_batch([gone])
    assert (len(server.bodies), gone.result.finish_reason, told[0][-1]) == (3, "cancelled", None)


def test_a_row_that_fails_leaves_the_others_their_answers() -> None:
    _, there, server = pair()
    asked = itertools.count(1)

    def before_answer() -> None:
        if next(asked) == 1:
            raise httpx.ReadError("gone")

    server.before_answer = before_answer
    told: list[list[str | None]] = [[], [], []]
    rows = [StreamedRow([5, 6, 7], Sampling(max_new_tokens=9), pieces.append) for pieces in told]
    with pytest.raises(EngineError, match="broke off"):
        there.llm.stream_batch(rows)
    assert sorted(len(pieces) > 0 and pieces[-1] is None for pieces in told) == [False, True, True]
    assert sorted(len(row.result.token_ids) for row in rows)[0] == 0


def test_what_the_server_answers_is_scored_here() -> None:
    here, there, server = pair()
    prompt = here.prepare(QUESTION, [DOCUMENT], ratio=4, max_new_tokens=60)[0].prompt.inputs(here.llm)
    drawn = Sampling(**DRAWN)
    answers, scores = there.llm.generate_and_score([prompt], [[5, 6, 7]], drawn)
    assert len(server.bodies) == 1
    assert answers[0].text == here.llm.generate([prompt], drawn)[0].text
    torch.testing.assert_close(scores, here.llm.log_probs([prompt], [[5, 6, 7]]))


def test_stop_strings_and_the_end_of_a_turn_are_not_part_of_an_answer() -> None:
    here, there, server = pair()
    text = here.ask(QUESTION, [DOCUMENT], max_new_tokens=12).text
    stop = text[3:5]
    expected = here.ask(QUESTION, [DOCUMENT], max_new_tokens=12, stop=[stop])
    answer = there.ask(QUESTION, [DOCUMENT], max_new_tokens=12, stop=[stop])
    assert (answer.text, answer.finish_reason) == (expected.text, "stop")
    assert server.bodies[0]["stop_token_ids"] == here.llm.stop_token_ids


def test_the_window_is_the_smaller_one() -> None:
    assert pair(max_model_len=100)[1].llm.context_window == 100
    assert pair(max_model_len=10_000)[1].llm.context_window == 256


def test_states_of_another_embedder_are_refused() -> None:
    _, there, server = pair()
    server.reader.fingerprint = "0" * 32
    with pytest.raises(EngineError, match="refuses the request .states were made by an embedder with another finger"):
        there.ask(QUESTION, [DOCUMENT], ratio=2, max_new_tokens=2)


def responses(*answers: Any) -> Any:
    """A handler that knows its model, and answers so."""
    left = list(answers)

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "served"}]})
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return httpx.Client(transport=httpx.MockTransport(handle), base_url=URL)


def events(*values: Any) -> httpx.Response:
    return httpx.Response(200, content="".join(f"data: {json.dumps(value)}\n\n" for value in values))


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.ConnectError("refused"), "at http://fake:8000/v1 cannot be reached, or broke off .refused.; start it"),
        (httpx.Response(500, text="<html>oops</html>"), "refuses the request .<html>oops</html>.; docs/vllm.md"),
        (httpx.Response(401, json={"error": "Unauthorized"}), "refuses the request .*Unauthorized"),
        (events({"error": {"message": "engine is dead"}}), "refuses the request .engine is dead."),
        (events({"choices": [{"text": "a", "finish_reason": None}]}), "ended an answer with None; see to its log"),
        (events({"choices": [{"text": "", "finish_reason": "abort"}]}), "ended an answer with 'abort'"),
    ],
)
def test_what_goes_wrong_is_one_sentence(response: Any, message: str) -> None:
    llm = over(FakeVllm(tiny_llm(), "00"), tiny_llm())
    llm.__dict__["_client"] = responses(response)
    lm = ExtensibleLM(llm, entering(llm))
    with pytest.raises(EngineError, match=message):
        lm.ask(QUESTION, max_new_tokens=2)


def test_an_empty_prompt_is_refused_here() -> None:
    llm = over(FakeVllm(tiny_llm(), "00"), tiny_llm())
    with pytest.raises(ConfigError, match="0 positions"):
        next(llm.stream([], Sampling()))


def test_it_is_loaded_by_name_with_its_server(tmp_path: Any) -> None:
    save_tiny(tmp_path)
    settings = {"engine": "vllm", "base_url": URL, "api_key": "secret"}
    lm = ExtensibleLM.from_pretrained(tmp_path / "llm", tmp_path / "embedder", **settings)
    assert isinstance(lm.llm, VllmLLM)
    assert (lm.llm.base_url, lm.llm.fingerprint) == (URL, lm.embedder.fingerprint)
    assert lm.llm._client.headers["Authorization"] == "Bearer secret"
    shared.release()
    one, other = (shared.share(tmp_path / "llm", tmp_path / "embedder", **settings | more) for more in ({}, {}))
    local = shared.share(tmp_path / "llm", tmp_path / "embedder")
    elsewhere = shared.share(tmp_path / "llm", tmp_path / "embedder", **settings | {"base_url": URL + "2"})
    assert one is other
    assert len({id(lm.llm) for lm in (one, local, elsewhere)}) == 3
    assert type(local.llm) is not VllmLLM
    shared.release()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "sglang"}, "engine='sglang' is not one of transformers, vllm; pass one of them"),
        ({"engine": "vllm"}, "engine='vllm' came with base_url=None; pass engine='vllm' and the address"),
        ({"base_url": URL}, "engine='transformers' came with base_url='http://fake:8000/v1'; pass engine='vllm'"),
        ({"api_key": "secret"}, "engine='transformers' came with base_url=None"),
    ],
)
def test_an_engine_and_a_server_come_together(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_llm("nobody/knows", **settings)

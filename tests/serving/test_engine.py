"""Clients at once: one pass for what waits, each its own answer; who leaves, who comes too late, and the end."""

from __future__ import annotations

import gc
import json
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
from fake_vllm import FakeVllm
from passes import PATIENCE, passes_of
from served import MODEL, served
from tiny import SENTENCES, random_embedder, tiny_model, tiny_tokenizer

from extemb_core import ExtensibleLM
from extemb_core.models.llm import LLM
from extemb_core.models.vllm_client import VllmLLM
from extemb_core.serving import engine

pytest.importorskip("faiss")
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


@pytest.fixture(scope="module")
def lm():
    llm = LLM(tiny_model("llama", max_position_embeddings=2048), tiny_tokenizer(), name="tiny-llama")
    return ExtensibleLM(llm, random_embedder(llm))


@pytest.fixture
def held(lm, monkeypatch):
    """The LLM's passes, and the rows of each."""
    rows = []

    def count(model, args, given):
        rows.append(next(len(given[name]) for name in ("input_ids", "inputs_embeds") if given.get(name) is not None))

    with passes_of(lm.llm, monkeypatch, free=0) as passes:
        hook = lm.llm.model.register_forward_pre_hook(count, with_kwargs=True)
        yield passes, rows
        passes.let_go()
        hook.remove()


@pytest.fixture
def layers(lm):
    """One item for each layer that the LLM went through."""
    gone_through = []
    hooks = [layer.register_forward_hook(lambda *_: gone_through.append(1)) for layer in lm.llm.model.model.layers]
    yield gone_through
    for hook in hooks:
        hook.remove()


@contextmanager
def asking(server, count=8):
    """Ask from threads: `ask(question, **settings)` gives a future of the answer, or of a stream's chunks."""

    def answer(question, stream=False, documents=(), **settings):
        client = server.openai()
        made = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": question}], stream=stream,
            extra_body={"documents": list(documents)}, **settings,
        )  # fmt: skip
        return list(made) if stream else made

    with ThreadPoolExecutor(count) as pool:
        yield lambda *args, **settings: pool.submit(answer, *args, **settings)


@contextmanager
def asking_by_hand(server, **settings):
    """Ask over a connection that can be closed before the answer."""
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Why?"}], **settings})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        connection.sendall((head + body).encode())
        yield connection


def until(there):
    end = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < end
        time.sleep(0.002)


def waiting(server):
    return len(server.service.engine._waiting)


def text_of(made):
    if isinstance(made, list):
        return "".join(chunk.choices[0].delta.content or "" for chunk in made)
    return made.choices[0].message.content


def test_what_waits_is_answered_in_one_pass_and_each_as_alone(lm, tmp_path, held):
    passes, rows = held
    settings = [
        {"max_tokens": 4},
        {"max_tokens": 7, "stream": True},
        {"max_tokens": 3, "temperature": 1.0, "seed": 5},
        {"max_tokens": 5, "documents": [{"text": SENTENCES, "title": "Ships"}]},
    ]
    questions = [f"What is {number} plus {number}?" for number in range(4)]
    with served(lm, tmp_path) as server, asking(server) as ask:
        first = ask("First?", max_tokens=2)
        assert passes.held.wait(PATIENCE)
        others = [ask(question, **one) for question, one in zip(questions, settings, strict=True)]
        until(lambda: waiting(server) == 4)
        passes.let_go()
        made = [one.result() for one in (first, *others)]
    assert rows == [1, 1] + [4] * 7
    for question, one, answer in zip(questions, settings, made[1:], strict=True):
        one = {name: value for name, value in one.items() if name != "stream"}
        one["max_new_tokens"] = one.pop("max_tokens")
        assert text_of(answer) == lm.ask(question, **one).text
    assert 'extemb_batch_size_bucket{le="4.0"} 2.0' in server.service.metrics.text().decode()


def test_a_batch_takes_no_more_positions_than_there_is_memory_for(lm, tmp_path, held, monkeypatch):
    passes, rows = held
    monkeypatch.setattr("extemb_core.models.bulk.POSITIONS_AT_ONCE", 160)
    with served(lm, tmp_path, batch_size=3) as server, asking(server) as ask:
        first = ask("First?", max_tokens=1)
        assert passes.held.wait(PATIENCE)
        others = []
        for question in ("Why? " * 40, "a?", "b?", "c?", "d?"):  # in this order
            others.append(ask(question, max_tokens=1))
            until(lambda: waiting(server) == len(others))
        passes.let_go()
        assert all(one.result().usage.completion_tokens == 1 for one in (first, *others))
    assert rows == [1, 1, 3, 1]


def test_a_piece_comes_while_the_next_is_not_there_yet(lm, tmp_path, held):
    passes, _ = held
    with served(lm, tmp_path) as server:
        stream = server.openai().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Why?"}], max_tokens=40, stream=True
        )
        next(stream)
        passes.let(12)  # the LLM is held in the pass after them
        shown = [next(stream).choices[0].delta.content for _ in range(4)]
        assert all(shown)
        passes.let_go()
        assert len(list(stream)) > 4


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_not_answered_to_the_end(lm, tmp_path, held, layers, stream):
    passes, rows = held
    with served(lm, tmp_path) as server:
        with asking_by_hand(server, max_tokens=60, stream=stream) as connection:
            assert passes.held.wait(PATIENCE)
            with asking(server) as ask:
                other = ask("Who?", max_tokens=2)
                until(lambda: waiting(server) == 1)
                connection.close()
                until(lambda: server.service.engine.running[0].row.cancelled.is_set())
                passes.let_go()
                assert other.result().usage.completion_tokens == 2
        assert rows == [1, 1, 1]  # the pass it was held in, and two of the other
        assert len(layers) == 2 * lm.llm.text_config.num_hidden_layers  # those of the other
        until(lambda: server.service.engine._n_requests == 0)


def test_who_leaves_has_no_more_documents_compressed(lm, tmp_path, monkeypatch):
    batches, held, go_on = [], threading.Event(), threading.Event()
    whole = type(lm.embedder).forward

    def held_batch(*args):
        batches.append(1)
        held.set()
        assert go_on.wait(PATIENCE)
        return whole(*args)

    monkeypatch.setattr(type(lm.embedder), "forward", held_batch)
    with served(lm, tmp_path) as server:
        document = {"text": SENTENCES * 20, "title": "Ships"}
        with asking_by_hand(server, documents=[document], ratio=8):
            assert held.wait(PATIENCE)
        until(lambda: server.service.engine._n_requests == 0)
        go_on.set()
        with asking(server) as ask:
            assert ask("Who?", max_tokens=2).result().usage.completion_tokens == 2
    assert len(batches) == 1
    lm.embedder.compress(document["text"], ratio=8, show_progress=False)
    assert len(batches) > 2


def test_who_leaves_while_waiting_makes_room_at_once(lm, tmp_path, held):
    passes, rows = held
    with served(lm, tmp_path, max_requests=2) as server, asking(server) as ask:
        first = ask("First?", max_tokens=1)
        assert passes.held.wait(PATIENCE)
        with pytest.raises(openai.APITimeoutError):
            server.openai(timeout=0.2).chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a"}])
        until(lambda: server.service.engine._n_requests == 1)
        third = ask("Third?", max_tokens=1)
        until(lambda: waiting(server) == 1)
        passes.let_go()
        assert first.result().usage.completion_tokens == third.result().usage.completion_tokens == 1
    assert rows == [1, 1]


def test_too_many_are_sent_away_for_a_while(lm, tmp_path, held):
    passes, _ = held
    with served(lm, tmp_path, max_requests=2) as server, asking(server) as ask:
        two = [ask("First?", max_tokens=1), ask("Second?", max_tokens=1)]
        assert passes.held.wait(PATIENCE)
        until(lambda: server.service.engine._n_requests == 2)
        for call in (lambda: ask("Third?").result(), lambda: server.openai().get("/documents", cast_to=object)):
            with pytest.raises(openai.RateLimitError) as raised:
                call()
            assert raised.value.response.headers["retry-after"] == "1"
            assert raised.value.code == "too_many_requests"
        assert server.http().get("/healthz").status_code == 200
        passes.let_go()
        assert [one.result().usage.completion_tokens for one in two] == [1, 1]
        assert ask("Third?", max_tokens=1).result().usage.completion_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long(lm, tmp_path, held, stream):
    passes, _ = held
    with served(lm, tmp_path, request_seconds=1) as server, asking(server) as ask:
        with pytest.raises(openai.APIError, match="was not there within 1 s") as raised:
            ask("Why?", stream=stream, max_tokens=50).result()
        assert raised.value.body["code"] == "timeout"
        passes.let_go()
        until(lambda: server.service.engine._n_requests == 0)
        assert passes.count < 50


def test_stopping_finishes_what_is_at_work_and_takes_nothing_new(lm, tmp_path, held):
    passes, _ = held
    with served(lm, tmp_path) as server, asking(server) as ask:
        made = [ask("Why?", stream=True, max_tokens=6)]
        assert passes.held.wait(PATIENCE)
        made.append(ask("Who?", max_tokens=3))
        until(lambda: waiting(server) == 1)
        server.server.should_exit = True
        until(lambda: not server.server.servers[0].is_serving())
        with pytest.raises(openai.APIConnectionError):
            ask("Late?").result()
        passes.let_go()
        assert made[0].result()[-1].choices[0].finish_reason == "length"
        assert made[1].result().usage.completion_tokens == 3


def test_who_reads_nothing_keeps_nobody_waiting(lm, tmp_path):
    with served(lm, tmp_path) as server, asking(server) as ask:
        unread = server.openai().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Why?"}], max_tokens=500, stream=True
        )
        assert ask("Who?", max_tokens=2).result().usage.completion_tokens <= 2
        unread.close()


def ask_together(server, ask, passes, settings):
    """Ask one question, and while it is answered others, which wait together. Returns the futures of all."""
    made = [ask("First?", max_tokens=1)]
    assert passes.held.wait(PATIENCE)
    made += [ask("Why?", **one) for one in settings]
    until(lambda: waiting(server) == len(settings))
    passes.let_go()
    return made


def test_where_a_batch_fails_an_error_is_of_whom_it_belongs_to(lm, tmp_path, held, monkeypatch):
    passes, _ = held
    whole = LLM.stream_batch

    def fail(self, rows):
        if len(rows) > 1 or rows[0].sampling.max_new_tokens == 3:
            raise MemoryError
        whole(self, rows)

    monkeypatch.setattr(LLM, "stream_batch", fail)
    with served(lm, tmp_path) as server, asking(server) as ask:
        settings = [{"max_tokens": length, "stream": length == 4} for length in (2, 3, 4)]
        first, *others = ask_together(server, ask, passes, settings)
        assert first.result().usage.completion_tokens == 1
        assert others[0].result().usage.completion_tokens == 2
        with pytest.raises(openai.InternalServerError) as raised:
            others[1].result()
        assert (raised.value.status_code, raised.value.code) == (503, "out_of_memory")
        assert others[2].result()[-1].choices[0].finish_reason == "length"


def test_where_a_batch_fails_what_has_ended_is_not_asked_again(lm, tmp_path, held, monkeypatch):
    passes, _ = held
    whole, asked = LLM.stream_batch, []

    def fail(self, rows):
        asked.append(len(rows))
        if len(rows) > 1:
            rows[0].on_piece(None)  # with no token, as an answer may end
            raise MemoryError
        whole(self, rows)

    monkeypatch.setattr(LLM, "stream_batch", fail)
    with served(lm, tmp_path) as server, asking(server) as ask:
        made = ask_together(server, ask, passes, [{"max_tokens": 2}] * 2)
        assert sorted(one.result().usage.completion_tokens for one in made) == [0, 1, 2]
    assert asked == [1, 2, 1]


def test_what_a_vllm_server_answers_is_streamed_from_it(lm, tmp_path):
    vllm = FakeVllm(lm.llm, lm.embedder.fingerprint, max_model_len=2048)
    remote = VllmLLM(lm.llm.model, lm.llm.tokenizer, lm.llm.name)
    remote.__dict__["_client"] = vllm.client()
    there = ExtensibleLM(remote, random_embedder(remote))
    expected = [lm.ask(f"What is {number}?", max_new_tokens=6).text for number in range(4)]
    with served(there, tmp_path) as server, asking(server) as ask:
        made = [ask(f"What is {number}?", max_tokens=6, stream=number % 2 == 0) for number in range(4)]
        assert [text_of(one.result()) for one in made] == expected
        assert len(vllm.bodies) == 4


def test_documents_that_are_added_at_once_are_all_there(lm, tmp_path):
    with served(lm, tmp_path) as server, ThreadPoolExecutor(8) as pool:
        client = server.http()

        def add(number):
            document = {"text": f"{number % 6}. {SENTENCES}", "id": str(number % 6)}
            return client.post("/v1/documents", json={"documents": [document]}).json()["data"][0]["id"]

        assert list(pool.map(add, range(12))) == [str(number % 6) for number in range(12)]
        assert {one["id"] for one in client.get("/v1/documents").json()["data"]} == set("012345")
        library = server.service.workspace("default")._library
        assert library.verify().clean


def test_many_clients_get_each_its_own_answer(lm, tmp_path):
    questions = [f"What is {number} times {number}?" for number in range(24)]
    documents = [[{"text": f"{number}. {SENTENCES}", "title": str(number)}] for number in range(24)]
    with served(lm, tmp_path) as server, asking(server, 24) as ask:
        made = [
            ask(question, max_tokens=6, stream=at % 2 == 0, documents=documents[at])
            for at, question in enumerate(questions)
        ]
        for question, text, one in zip(questions, documents, made, strict=True):
            assert text_of(one.result()) == lm.ask(question, text, max_new_tokens=6).text
    assert threading.active_count() < 80


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_was_read_leaves_nothing_for_the_garbage_collector(lm, tmp_path, stream):
    """It counts objects: the few that hold megabytes of documents would wait long for it."""
    document = {"title": "a", "text": SENTENCES}
    known = []

    class Seen(engine.Job):
        def __init__(self, *args):
            super().__init__(*args)
            known.extend([weakref.ref(self), weakref.ref(self._prepared)])

    gc.disable()
    try:
        with served(lm, tmp_path) as server, pytest.MonkeyPatch.context() as patch, asking(server) as ask:
            patch.setattr(engine, "Job", Seen)
            for _ in range(3):
                ask("Why?", stream, [document], max_tokens=2).result()
        assert len(known) == 6
        assert [ref() for ref in known if ref() is not None] == []
    finally:
        gc.enable()


def test_a_few_are_prepared_at_once(lm, tmp_path, monkeypatch):
    """What is compressed for a request takes memory until it is done."""
    whole, at_work, most, held = ExtensibleLM.prepare, [], [], threading.Semaphore(0)

    def prepare(*args, **settings):
        at_work.append(1)
        most.append(len(at_work))
        assert held.acquire(timeout=PATIENCE)
        at_work.pop()
        return whole(*args, **settings)

    monkeypatch.setattr(ExtensibleLM, "prepare", prepare)
    with served(lm, tmp_path) as server, asking(server) as ask:
        answers = [ask(f"Why {number}?", max_tokens=2) for number in range(6)]
        try:
            until(lambda: len(at_work) >= 2 and server.service.engine._n_requests == 6)
            server.http().get("/healthz")  # those that may begin have begun
        finally:
            held.release(6)
        assert all(answer.result().choices[0].message.content is not None for answer in answers)
    assert max(most) <= 2 < len(most)

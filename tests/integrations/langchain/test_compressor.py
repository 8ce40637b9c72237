"""Documents keep all they have on their way, and their refs are read in the prompts of stock chains."""

from __future__ import annotations

import pytest
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough

from extemb_core.documents import text_ref
from extemb_core.errors import DocumentError, RatioError
from langchain_extemb import ChatExtensible, ExtensibleCompressor, ExtensibleLLM

STUFF = ChatPromptTemplate.from_messages([("system", "Answer from this:\n{context}"), ("human", "{input}")])
REF = PromptTemplate.from_template("{extemb_ref}")


class Fixed(BaseRetriever):
    found: list[Document]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return self.found


def test_documents_keep_what_they_have(lm, documents, monkeypatch):
    compressor = ExtensibleCompressor.from_lm(lm)
    found = compressor.compress_documents(documents, "any")
    for before, after in zip(documents, found, strict=True):
        assert (after.id, after.page_content) == (before.id, before.page_content)
        assert {name: after.metadata[name] for name in before.metadata} == before.metadata
        assert "extemb_ref" not in before.metadata
    monkeypatch.setattr(type(lm.embedder), "compress_ids", lambda *args, **kwargs: pytest.fail("compressed again"))
    again = compressor.compress_documents(documents, "other")
    assert [one.metadata["extemb_ref"] for one in again] == [one.metadata["extemb_ref"] for one in found]
    assert list(compressor.compress_documents([], "any")) == []
    assert len(compressor.compress_documents(iter(documents), "any")) == 2


def test_a_stock_chain_hands_refs_over_and_its_llm_reads_embeddings(lm, chat, documents):
    retriever = ContextualCompressionRetriever(
        base_retriever=Fixed(found=documents), base_compressor=ExtensibleCompressor.from_lm(lm)
    )
    chain = create_stuff_documents_chain(chat, STUFF, document_prompt=REF)
    told = []
    answer = chain.invoke(
        {"context": retriever.invoke("ships"), "input": "How many?"}, config={"callbacks": [Told(told)]}
    )
    vectors = [lm.embedder.compress(one.page_content, ratio=4).embeddings for one in documents]
    by_hand = [
        {"role": "system", "content": ["Answer from this:\n", vectors[0], "\n\n", vectors[1]]},
        {"role": "user", "content": "How many?"},
    ]
    assert answer == lm.chat(by_hand, max_new_tokens=4).text
    assert [one["id"] for one in told] == [text_ref(one.page_content) for one in documents]


def test_the_chains_of_the_guide_read_embeddings(lm, documents):
    """One that formats refs, and one that hands documents over, other ones in each call; page content is text."""
    compressor, told = ExtensibleCompressor.from_lm(lm, ratio=4), []
    llm = ChatExtensible.from_lm(lm, max_tokens=4, ratio=4, callbacks=[Told(told)])

    def with_refs(found):
        return "\n\n".join(one.metadata["extemb_ref"] for one in compressor.compress_documents(found, ""))

    def with_text(found):
        return "\n\n".join(one.page_content for one in found)

    prompt = ChatPromptTemplate.from_template("{context}\n\n{question}")
    ids = [text_ref(one.page_content) for one in documents]
    for form, read in ((with_refs, ids), (with_text, [])):
        retriever = Fixed(found=documents)
        chain = {"context": retriever | form, "question": RunnablePassthrough()} | prompt | llm
        told.clear()
        chain.invoke("How many?")
        assert [one["id"] for one in told] == read
    handed = RunnableLambda(lambda found: llm.invoke(found["question"], documents=found["documents"]))
    for one, ref in zip(documents, ids, strict=True):
        told.clear()
        handed.invoke({"question": "How many?", "documents": [one]})
        assert [document["id"] for document in told] == [ref]


def Told(told):  # noqa: N802 - makes a handler
    from langchain_core.callbacks import BaseCallbackHandler

    class Handler(BaseCallbackHandler):
        def on_llm_end(self, response, **kwargs):
            (generation,) = response.generations[0]
            info = (
                generation.message.response_metadata if hasattr(generation, "message") else generation.generation_info
            )
            told.extend(info["extemb"]["documents"])

    return Handler()


@pytest.mark.parametrize("kind", [ChatExtensible, ExtensibleLLM])
def test_what_a_configuration_changes_leaves_the_model_and_its_store(lm, documents, kind, caplog):
    """LangChain makes the object anew from its fields; a ref of the store is read, and by the same embedder."""
    (found, _) = ExtensibleCompressor.from_lm(lm).compress_documents(documents, "any")
    fields = {"ratio": ConfigurableField(id="ratio"), "max_tokens": ConfigurableField(id="max_tokens")}
    told = []
    model = kind.from_lm(lm, max_tokens=4, callbacks=[Told(told)]).configurable_fields(**fields)
    for configurable in ({}, {"ratio": 8}, {"ratio": "2", "max_tokens": 1}):
        model.invoke(f"{found.metadata['extemb_ref']} How many?", {"configurable": configurable})
    assert [one["fidelity"] for one in told] == ["raw", 8, 2]
    assert "looks like a ref" not in caplog.text
    with pytest.raises(RatioError, match="ratio='fine'"):
        model.invoke("How many?", {"configurable": {"ratio": "fine"}})


def test_refs_that_are_gone_are_an_error_and_what_looks_like_one_is_text(lm, chat, documents, monkeypatch):
    (found, _) = ExtensibleCompressor.from_lm(lm).compress_documents(documents, "any")
    mark = found.metadata["extemb_ref"]
    forged = mark[:-6] + "0000]]"
    assert chat.invoke(f"Read {forged}").response_metadata["extemb"]["documents"] == []
    assert len(chat.invoke(f"Read {mark}").response_metadata["extemb"]["documents"]) == 1
    inside = chat.invoke("What?", documents=[Document(page_content=f"A text with {mark} in it. " * 2)])
    assert len(inside.response_metadata["extemb"]["documents"]) == 1
    monkeypatch.setattr(lm.refs._keepers[0], "get", lambda ref: None)
    with pytest.raises(DocumentError, match="is not kept any more"):
        chat.invoke(f"Read {mark}")


def test_refs_in_a_store_are_read_by_a_later_process(tmp_path, documents):
    from tiny import save_tiny

    from extemb_core import EmbeddingStore, ExtensibleLM

    save_tiny(tmp_path)
    models = tmp_path / "llm", tmp_path / "embedder"
    with EmbeddingStore.open(tmp_path / "store") as store:
        lm = ExtensibleLM.from_pretrained(*models, store=store)
        found = ExtensibleCompressor.from_lm(lm, ratio=4).compress_documents(documents, "any")
    with EmbeddingStore.open(tmp_path / "store", "r") as store:
        chat = ChatExtensible.from_lm(ExtensibleLM.from_pretrained(*models, store=store), ratio=4, max_tokens=2)
        told = chat.invoke(f"Read {found[0].metadata['extemb_ref']}").response_metadata["extemb"]["documents"]
        assert [(one["source"], one["cached"]) for one in told] == [("ships.txt", True)]


def test_the_completion_model_reads_refs_and_documents_too(lm, documents):
    llm = ExtensibleLLM.from_lm(lm, max_tokens=3, ratio=4)
    (found, _) = ExtensibleCompressor.from_lm(lm).compress_documents(documents, "any")
    vectors = lm.embedder.compress(documents[0].page_content, ratio=4).embeddings
    from extemb_core.context.assembly import assemble_text
    from extemb_core.models.generation import Sampling

    prompt = assemble_text(lm.llm, ["Text: ", vectors, "\nSummary:"])
    expected = lm.llm.generate([prompt.inputs(lm.llm)], Sampling(max_new_tokens=3))[0].text
    assert llm.invoke(f"Text: {found.metadata['extemb_ref']}\nSummary:") == expected
    assert "".join(llm.stream(f"Text: {found.metadata['extemb_ref']}\nSummary:")) == expected
    result = llm.generate(["One", "Two", "Three"], documents=documents[:1])
    assert [len(one) for one in result.generations] == [1, 1, 1]
    assert result.generations[1][0].text == lm.generate("Two", documents[:1], ratio=4, max_new_tokens=3).text
    assert result.generations[1][0].generation_info["extemb"]["documents"][0]["source"] == "ships.txt"


async def test_the_completion_model_is_async_too(lm):
    llm = ExtensibleLLM.from_lm(lm, max_tokens=3)
    assert await llm.ainvoke("One") == llm.invoke("One")
    assert "".join([piece async for piece in llm.astream("One")]) == llm.invoke("One")
    assert llm._identifying_params["embedder"] == lm.embedder.fingerprint


def test_a_compressors_ratio_is_the_finest_that_its_refs_are_read_at(lm, documents, monkeypatch):
    compressed = ExtensibleCompressor.from_lm(lm, ratio=4).compress_documents(documents, "any")
    monkeypatch.setattr(type(lm.embedder), "compress_ids", lambda *args, **kwargs: pytest.fail("compressed again"))
    refs = " ".join(one.metadata["extemb_ref"] for one in compressed)
    for ratio, read in (("auto", 4), (2, 4), (8, 8)):
        message = ChatExtensible.from_lm(lm, ratio=ratio, max_tokens=2).invoke(refs)
        assert [one["fidelity"] for one in message.response_metadata["extemb"]["documents"]] == [read, read]
    with pytest.raises(RatioError, match="ratio=3"):
        ExtensibleCompressor.from_lm(lm, ratio=3).compress_documents(documents, "any")


def test_a_compressor_s_batch_size_is_that_of_its_forward_passes(lm, documents, monkeypatch):
    sizes = []
    monkeypatch.setattr(lm, "compress", lambda *args, **settings: sizes.append(settings["batch_size"]))
    for given in ({}, {"batch_size": 7}):
        ExtensibleCompressor.from_lm(lm, **given).compress_documents(documents, "any")
    assert sizes == [None, 7]

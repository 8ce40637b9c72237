"""LangChain's guide to RAG, as an agent with a tool and as a chain, with nothing but the model's line changed.

The LLM is tiny, so what it writes is written here; what it is given is what is tested.
"""

from __future__ import annotations

import json

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, dynamic_prompt
from langchain.tools import tool
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_text_splitters import RecursiveCharacterTextSplitter
from retrieval_encoder import by_words
from tiny import SENTENCES, shared_embedder, tool_llm

from extemb_core import ExtensibleLM
from extemb_core.models.llm import LLM
from langchain_extemb import ChatExtensible

pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.deprecation.LangChainDeprecationWarning")
CALL = "<tool_call>\n" + json.dumps({"name": "retrieve_context", "arguments": {"query": "mill"}}) + "\n</tool_call>"
QUESTION = {"messages": [{"role": "user", "content": "When was the mill built?"}]}


class ByWords(Embeddings):
    def embed_documents(self, texts):
        return by_words(texts).tolist()

    def embed_query(self, text):
        return by_words([text])[0].tolist()


@pytest.fixture
def vector_store():
    docs = [
        Document("The old mill was built in 1820 by the river. " + SENTENCES[:200], metadata={"source": "mill.txt"}),
        Document("Ships are counted by hand. " + SENTENCES[200:300], metadata={"source": "ships.txt"}),
    ]
    splitter = RecursiveCharacterTextSplitter(chunk_size=120, chunk_overlap=20, add_start_index=True)
    store = InMemoryVectorStore(ByWords())
    store.add_documents(documents=splitter.split_documents(docs))
    return store


@pytest.fixture
def model(monkeypatch):
    """The model of the guide; `model.words` are what its LLM will write."""
    words = [CALL, "In 1820."]

    def stream(self, prompt, sampling, result=None):
        result.text, result.token_ids, result.finish_reason = words.pop(0), [1], "stop"
        yield result.text

    monkeypatch.setattr(LLM, "stream", stream)
    llm = tool_llm()
    lm = ExtensibleLM(llm, shared_embedder(llm))
    monkeypatch.setattr("extemb_core.frameworks.settings.share", lambda *args, **settings: lm)
    return ChatExtensible.from_model_id("tiny", ratio=4), words


def test_an_agent_with_a_tool(vector_store, model):
    @tool(response_format="content_and_artifact")
    def retrieve_context(query: str):
        """Retrieve information to help answer a query."""
        found = vector_store.similarity_search(query, k=2)
        return "\n\n".join(f"Source: {doc.metadata}\nContent: {doc.page_content}" for doc in found), found

    agent = create_agent(model[0], [retrieve_context], system_prompt="You can look up context.")
    events = list(agent.stream(QUESTION, stream_mode="values"))
    messages = events[-1]["messages"]
    assert [type(message) for message in messages] == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    assert messages[-1].text == "In 1820."
    told = messages[-1].response_metadata["extemb"]["documents"]
    assert (told[0]["fidelity"], told[0]["source"]) == (4, "mill.txt")
    assert len(told) == 2
    model[1].extend([CALL, "In 1820."])
    streamed = [message for message, _ in agent.stream(QUESTION, stream_mode="messages")]
    assert [message.text for message in streamed if message.type == "AIMessageChunk" and message.text] == ["In 1820."]
    assert max(len(message.response_metadata.get("extemb", {}).get("documents", ())) for message in streamed) == 2


def test_a_chain_whose_prompt_holds_the_context(vector_store, model):
    model[1].pop(0)

    @dynamic_prompt
    def prompt_with_context(request: ModelRequest) -> str:
        found = vector_store.similarity_search(request.state["messages"][-1].text)
        return "Use the following context:\n\n" + "\n\n".join(doc.page_content for doc in found)

    agent = create_agent(model[0], tools=[], middleware=[prompt_with_context])
    message = agent.invoke(QUESTION)["messages"][-1]
    assert message.text == "In 1820."
    assert message.usage_metadata["input_tokens"] > 50


def test_a_chain_that_returns_its_sources(vector_store, model):
    model[1].pop(0)

    class State(AgentState):
        context: list[Document]

    class RetrieveDocuments(AgentMiddleware[State]):
        state_schema = State

        def before_model(self, state, runtime=None):
            last = state["messages"][-1]
            found = vector_store.similarity_search(last.text, k=1)
            context = "\n\n".join(doc.page_content for doc in found)
            asked = f"{last.text}\n\nUse the following context:\n{context}"
            return {"messages": [last.model_copy(update={"content": asked})], "context": found}

    result = create_agent(model[0], tools=[], middleware=[RetrieveDocuments()]).invoke(QUESTION)
    assert result["context"][0].metadata["source"] == "mill.txt"
    assert result["messages"][-1].text == "In 1820."

"""The suites that LangChain holds every integration to, as they are.

What is skipped, and why:

- Calling tools and structured output, on both LLMs: their chat templates have no place for tools, and the model says
  so. The unit tests bind tools all the same; `test_tools.py` calls them with an LLM whose template has a place.
- JSON mode: nothing constrains what an LLM writes.
- Images, audio, PDF, Anthropic's message format with images: the LLMs here read text.
- `test_serdes`, `test_init_from_env`: nothing is read from the environment, and a model that is a folder on one machine
  is not serialised for another.
- Another model by a call's `model=`, on the tiny model alone, beside which no embedder is shipped.
- `test_stream_time`: it replays recorded network traffic, and there is none.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from langchain_core.documents import Document
from langchain_tests.integration_tests import ChatModelIntegrationTests, RetrieversIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from retrieval_encoder import by_words
from tiny import save_tiny, shared_embedder, tiny_llm

from extemb_core import ExtensibleLM, Library
from langchain_extemb import ChatExtensible, ExtensibleRetriever


@cache
def models() -> dict[str, str]:
    folder = Path(mkdtemp(prefix="extemb-"))
    save_tiny(folder)
    return {"model": str(folder / "llm"), "embedder": str(folder / "embedder")}


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self):
        return ChatExtensible

    @property
    def chat_model_params(self):
        return models()


class WithoutTools(ChatModelIntegrationTests):
    @property
    def has_tool_calling(self):
        return False

    @property
    def has_structured_output(self):
        return False


class TestTiny(WithoutTools):
    @property
    def chat_model_class(self):
        return ChatExtensible

    @property
    def chat_model_params(self):
        return {**models(), "max_tokens": 12}


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.usefixtures("real_weights_once")
class TestReal(WithoutTools):
    @property
    def chat_model_class(self):
        return ChatExtensible

    @property
    def chat_model_params(self):
        return {"model": "smollm2-135m-instruct", "max_tokens": 3}

    @property
    def supports_model_override(self):
        return True

    @property
    def model_override_value(self):
        return "smollm2-135m-joint"


class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _library(self, tmp_path):
        llm = tiny_llm()
        lm = ExtensibleLM(llm, shared_embedder(llm))
        with Library(tmp_path / "lib", lm, encoder=by_words, passage_tokens=40, ratio=2) as library:
            library.add([Document(f"The mill number {at} was built in 18{at:02d}.", metadata={"source": str(at)})
                         for at in range(10)])  # fmt: skip
            self.library = library
            yield

    @property
    def retriever_constructor(self):
        return ExtensibleRetriever

    @property
    def retriever_constructor_params(self):
        return {"library": self.library}

    @property
    def retriever_query_example(self):
        return "When was the mill number 3 built?"

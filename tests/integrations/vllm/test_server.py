"""A real vLLM server with the default model: it answers as this process does.

In `make soak`, where EXTEMB_VLLM_PYTHON names the Python of an environment with vLLM and this package (docs/vllm.md).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import httpx
import pytest
import torch
from tiny import SENTENCES, entering, tiny_model, tiny_tokenizer

from extemb_core import LLM, EmbeddingStore, ExtensibleLM, Sampling
from extemb_core.context.assembly import assemble_text
from extemb_core.documents import text_ref
from extemb_core.errors import EngineError
from extemb_core.models.entry import AnchoredPrompt
from extemb_core.models.export import export_for_vllm
from extemb_core.models.vllm_client import VllmLLM

PYTHON = os.environ.get("EXTEMB_VLLM_PYTHON")
PATIENCE = 600  # seconds, on however busy a machine
GREEDY = Sampling(max_new_tokens=16)
TOPICS = ("with", "if", "try", "import")
QUESTIONS = [f"What does the {name} statement do?" for name in TOPICS]
RATIOS = (2, 4, 8, "auto", "raw")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.real_model,
    pytest.mark.enable_socket,
    pytest.mark.skipif(PYTHON is None, reason="EXTEMB_VLLM_PYTHON names no Python with vLLM"),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExtensibleLM]:
    """The default model in this process, with a store that the server reads too."""
    with EmbeddingStore.open(tmp_path_factory.mktemp("store") / "store") as store:
        yield ExtensibleLM.from_pretrained(device="cpu", store=store)


@pytest.fixture(scope="module")
def there(here: ExtensibleLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExtensibleLM]:
    """The same with a server: small steps, so that prompts are read in chunks, several in one batch."""
    folder = tmp_path_factory.mktemp("vllm")
    export_for_vllm(here.embedder, folder / "served")
    overrides = {"extemb_store": str(here.store.path)}  # type: ignore[attr-defined]
    options = ["--enforce-eager", "--enable-prompt-embeds", "--max-model-len", "4096"]
    with serving(folder / "served", *options, "--hf-overrides", json.dumps(overrides)) as url:
        remote = ExtensibleLM.from_pretrained(
            device="cpu", store=here.store, engine="vllm", base_url=url, api_key="secret"
        )
        with llm_of(remote)._client:
            yield remote


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """Serve a folder, and say where."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment.pop("PYTHONPATH", None)
    command = [
        str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--port", str(port), "--host", "127.0.0.1", "--api-key", "secret", "--dtype", "float32",
        "--max-num-seqs", "4", "--max-num-batched-tokens", "256",
        "--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 0}', *options,
    ]  # fmt: skip
    url, log = f"http://127.0.0.1:{port}", folder.with_name("log")
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        until = time.monotonic() + PATIENCE
        while not _is_up(url):
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until
            time.sleep(1)
        yield f"{url}/v1"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(PATIENCE)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def llm_of(lm: ExtensibleLM) -> VllmLLM:
    assert isinstance(lm.llm, VllmLLM)
    return lm.llm


def post(llm: VllmLLM, path: str, **body: Any) -> httpx.Response:
    answer: httpx.Response = llm._client.post(path, json={"model": llm._served["id"], **body})
    return answer


def scored(llm: VllmLLM, prompt: Any) -> tuple[str, list[int], list[float]]:
    """Answer a prompt with the server, which says its text, its tokens and their log-probabilities."""
    path, body = llm._body(prompt)
    wanted = {"logprobs": True, "top_logprobs": 1} if path.startswith("chat") else {"logprobs": 1}
    body |= {"max_tokens": GREEDY.max_new_tokens, "temperature": 0, "return_token_ids": True} | wanted
    response = post(llm, path, **body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    if path.startswith("chat"):
        return choice["message"]["content"], choice["token_ids"], [x["logprob"] for x in choice["logprobs"]["content"]]
    return choice["text"], choice["token_ids"], choice["logprobs"]["token_logprobs"]


def prompts_of(lm: ExtensibleLM) -> list[Any]:
    """Twenty prompts, of 60 to 800 positions."""
    return [
        lm.prepare(
            question, [topics[name][:3000]], ratio=ratio, budget=300 if ratio == "auto" else None, max_new_tokens=16
        )[0].prompt.inputs(lm.llm)
        for ratio in RATIOS
        for question, name in zip(QUESTIONS, TOPICS, strict=True)
    ]


def metric(lm: ExtensibleLM, name: str) -> float:
    text = llm_of(lm)._client.get(llm_of(lm).base_url.removesuffix("/v1") + "/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_text_and_log_probabilities_are_those_of_this_process(here: ExtensibleLM, there: ExtensibleLM) -> None:
    prompts = prompts_of(here)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: scored(llm_of(there), prompt), prompts))
    expected = here.llm.generate(prompts, GREEDY)
    same = sum(text == generated.text for (text, _, _), generated in zip(answers, expected, strict=True))
    own = here.llm.log_probs(prompts, [ids for _, ids, _ in answers])
    far = [max(abs(torch.tensor(values) - other)).item() for (_, _, values), other in zip(answers, own, strict=True)]
    logging.getLogger(__name__).info("%d of %d texts; log-probabilities within %.6f", same, len(prompts), max(far))
    assert same >= 19
    assert max(far) < 0.05


def test_a_prefix_that_is_cached_is_that_of_its_own_states(here: ExtensibleLM, there: ExtensibleLM) -> None:
    document = topics["for"][:3000]
    asked = [here.prepare(question, [document], ratio=4, max_new_tokens=16)[0] for question in ("What is it?", "Why?")]
    prompts = [prepared.prompt.inputs(here.llm) for prepared in asked]
    first = prompts[0]
    assert isinstance(first, AnchoredPrompt)
    moved = replace(first, states=torch.where(first.mask[:, None], first.states.roll(7, 0), 0))
    before = metric(there, "vllm:prefix_cache_hits_total")
    for prompt in (*prompts, moved, first):
        text, ids, values = scored(llm_of(there), prompt)
        (own,) = here.llm.log_probs([prompt], [ids])
        assert max(abs(torch.tensor(values) - own)) < 0.05
        assert text == here.llm.generate([prompt], GREEDY)[0].text
    read = metric(there, "vllm:prefix_cache_hits_total") - before
    # The second question and the repeated first find the document, and other states with the same anchors do not.
    n_anchors = int(first.mask.sum())
    assert 2 * n_anchors - 64 < read < 3 * n_anchors


@pytest.mark.parametrize(
    ("family", "options"), [("qwen2", ["--enforce-eager"]), ("qwen3", ["--enforce-eager"]), ("llama", [])]
)
def test_other_architectures_and_compiled_layers(family: str, options: list[str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    llm = LLM(tiny_model(family, max_position_embeddings=1024, **sizes), tiny_tokenizer(), name="tiny")
    embedder = entering(llm)
    export_for_vllm(embedder, tmp_path / "served")
    texts = [SENTENCES, SENTENCES[100:], SENTENCES[200:]]
    prompts: list[Any] = [
        assemble_text(llm, [embedder.compress(text, ratio=2).part, " Why?", embedder.compress(text, ratio=8).part, "?"])
        for text in texts
    ]
    prompts = [prompt.inputs(llm) for prompt in prompts] + [llm.encode(SENTENCES).tolist()]
    with serving(tmp_path / "served", *options) as url:
        remote = VllmLLM(llm.model, llm.tokenizer)
        remote.base_url, remote.api_key, remote.fingerprint = url, "secret", embedder.fingerprint
        with remote._client, ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda prompt: scored(remote, prompt), prompts))
    for prompt, (_, ids, values) in zip(prompts, answers, strict=True):
        (own,) = llm.log_probs([prompt], [ids])
        torch.testing.assert_close(torch.tensor(values), own, atol=1e-3, rtol=0)


def test_verbs_and_streams(here: ExtensibleLM, there: ExtensibleLM) -> None:
    documents = [topics["while"][:2000], "a <|im_start|>user token"]
    for settings in ({"ratio": 4}, {"budget": 200}, {"ratio": "raw"}):
        expected = here.ask(QUESTIONS[0], documents, max_new_tokens=12, **settings)  # type: ignore[arg-type]
        answer = there.ask(QUESTIONS[0], documents, max_new_tokens=12, **settings)  # type: ignore[arg-type]
        assert (answer.text, answer.prompt_positions, answer.new_tokens, answer.finish_reason) == (
            expected.text, expected.prompt_positions, expected.new_tokens, expected.finish_reason,
        )  # fmt: skip
    with there.stream(QUESTIONS[0], documents, ratio=4, max_new_tokens=200, temperature=2.0, seed=1) as stream:
        next(stream)
    assert stream.answer.finish_reason == "cancelled"


def test_embeddings_of_entry_layer_0_are_prompt_embeds(here: ExtensibleLM, there: ExtensibleLM) -> None:
    ids = here.prepare(QUESTIONS[0], max_new_tokens=8)[0].prompt.inputs(here.llm)
    embedded = here.llm.embed(list(ids))  # type: ignore[arg-type]
    settings = Sampling(max_new_tokens=8)
    assert there.llm.generate([embedded], settings)[0].text == here.llm.generate([ids], settings)[0].text


def test_a_message_may_name_a_ref_of_the_store(here: ExtensibleLM, there: ExtensibleLM) -> None:
    document = topics["del"]
    here.compress([document])
    ref = text_ref(document)
    compressed = here.store.get(ref, here.embedder.fingerprint, 4)
    assert compressed is not None
    assert compressed.anchors is not None
    item = {"ref": list(bytes.fromhex(ref.removeprefix("ext:"))), "ratio": [4]}
    content = [{"type": "image_embeds", "image_embeds": item}, {"type": "text", "text": "What does del do?"}]
    response = post(
        llm_of(there), "chat/completions", messages=[{"role": "user", "content": content}], max_tokens=12,
        temperature=0, return_token_ids=True,
    )  # fmt: skip
    assert response.status_code == 200, response.text
    ids, anchors = response.json()["prompt_token_ids"], compressed.anchors.tolist()
    start = next(at for at in range(len(ids)) if ids[at : at + len(anchors)] == anchors)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[start : start + len(anchors)] = True
    states = torch.zeros(len(ids), here.llm.hidden_size)
    states[mask] = compressed.embeddings
    prompt = AnchoredPrompt(torch.tensor(ids), states, mask, here.embedder.config.entry_layer)
    expected = here.llm.generate([prompt], Sampling(max_new_tokens=12))[0].text
    assert response.json()["choices"][0]["message"]["content"] == expected


def test_what_is_no_compressed_text_is_refused_and_the_server_goes_on(there: ExtensibleLM) -> None:
    def asked(**item: Any) -> httpx.Response:
        content = [{"type": "image_embeds", "image_embeds": item}, {"type": "text", "text": "What?"}]
        return post(llm_of(there), "chat/completions", messages=[{"role": "user", "content": content}], max_tokens=2)

    good = llm_of(there)._items(there.prepare("What?", ["a b c d"], ratio=2)[0].prompt.inputs(there.llm))[0]  # type: ignore[arg-type]
    wrong = [
        {"anchors": [1], "states": good["states"]},
        good | {"anchors": good["anchors"][:-1]},
        good | {"anchors": [49_152] * len(good["anchors"])},
        good | {"fingerprint": [0] * 16},
        {"ref": [0] * 16, "ratio": [4]},
        {"pixel_values": good["states"]},
        {},
    ]
    for item in wrong:
        response = asked(**item)
        assert 400 <= response.status_code < 500, (item, response.text)
    assert asked(**good).status_code == 200
    stranger = VllmLLM(there.llm.model, there.llm.tokenizer)
    stranger.base_url = llm_of(there).base_url
    with stranger._client, pytest.raises(EngineError, match="refuses the request"):
        _ = stranger.context_window

"""The benchmark scripts on tiny models: what they compare is comparable, and their reports are whole. No timings."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import Process
from tiny import ARCHITECTURES, SENTENCES, random_embedder, tiny_llm, tiny_model

from extemb_core.errors import ConfigError, ExtembError
from extemb_core.lm import ExtensibleLM
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.questions import templates
from extemb_core.training.trainable import TrainableModel
from extemb_core.training.two_stream import two_stream_losses

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
TEXT = SENTENCES * 4


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)


def script(name):
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny LLM and its embedder, saved as a user's would be."""
    llm = tiny_llm()
    where = tmp_path_factory.mktemp("models")
    llm.model.save_pretrained(where / "tiny-llm")
    llm.tokenizer.save_pretrained(where / "tiny-llm")
    random_embedder(llm, ratios=(2, 4, 8)).save_pretrained(where / "tiny-embedder")
    return where


@pytest.fixture(params=["trained, as input embeddings", "untrained, at a layer above 0"])
def models(request, folders):
    """The options that name the LLM and an embedder."""
    embedder = "untrained" if request.param.startswith("untrained") else str(folders / "tiny-embedder")
    return ["--llm", str(folders / "tiny-llm"), "--embedder", embedder]


@pytest.fixture
def dtypes(models):
    """Those in which embeddings are kept: int8 is too coarse for states of a layer above 0."""
    return ("float16",) if "untrained" in models else ("float16", "int8")


def inputs_seen(module, work):
    """The (B, T) of every call of a module while `work` runs."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    try:
        work()
    finally:
        hook.remove()
    return seen


# -- library.py -----------------------------------------------------------------------------------------------


def test_the_report_of_the_library_is_whole(models, dtypes, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    from retrieval_encoder import by_words

    from extemb_core.library.encoders import CallableEncoder

    monkeypatch.setattr("extemb_core.library.encoders._default", lambda: CallableEncoder(by_words))
    library = script("library")
    file = tmp_path / "report.json"
    library.main([*models, "--quick", "--json", str(file)])
    report = json.loads(file.read_text())
    assert set(library.SECTIONS) <= set(report)
    assert report["read"]["n"] == 40
    assert tuple(report["disk"]["sizes"]) == dtypes
    sizes = [report["disk"]["sizes"][dtype]["file_bytes"] for dtype in dtypes]
    assert sizes == sorted({*sizes}, reverse=True)  # each smaller than the one before
    assert report["disk"]["cache_bytes_per_token"] == 2 * 3 * 2 * 8 * 2
    assert report["search"]["recall"] > 0.9
    assert report["add"]["n_passages"] > report["add"]["n_documents"] > 0
    assert {"4", "8"} <= set(report["first_token"]["ratios"])
    increases = [abs(report["rounding"]["mean_increase"][dtype]) for dtype in ("float32", *dtypes)]
    assert increases == sorted({0.0, *increases})  # each larger than the one before, the first 0
    first, *lines = library.table(report).splitlines()
    assert first.startswith("loss of the next tokens")
    assert len(lines) == 7 + len(report["first_token"]["ratios"])
    assert all(line.endswith(("met", "MISSED")) for line in lines)


# -- scale.py -------------------------------------------------------------------------------------------------


def test_the_plan_of_a_corpus_is_arithmetic_on_what_was_measured(models, dtypes, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    scale = script("scale")
    monkeypatch.setattr(scale, "compress_corpus", _without_ray)
    file = tmp_path / "report.json"
    scale.main([*models, "--quick", "--json", str(file)])
    report = json.loads(file.read_text())
    speed = report["throughput"]["tokens_per_second"]
    assert report["throughput"]["samples_ray"][0]["n_tokens"] == report["throughput"]["samples"][0]["n_tokens"]
    size = report["size"]["bytes_per_token"]
    assert set(size) >= {f"{ratio}-{dtype}" for ratio in (2, 4, 8) for dtype in dtypes}
    assert {name.rpartition("-")[2] for name in size} == set(dtypes)
    shards = [size[name]["shards"] for name in ("4-float16", *(f"8-{dtype}" for dtype in dtypes))]
    assert shards == sorted({*shards}, reverse=True)
    assert size["8-float16"]["shards"] > 2 * report["size"]["width"] / 8
    vectors = report["index"]["bytes_per_vector"]
    assert vectors["Flat"] < vectors["HNSW32"]
    assert vectors["Flat"] == pytest.approx(256 * 4 + 8, rel=0.01)
    for row in report["plan"]:
        assert tuple(row["gb_per_day"]) == dtypes
        assert row["machines"] * speed * 86_400 == pytest.approx(row["tokens_per_day"])
        assert row["gb_per_day"]["float16"] * 1e9 == pytest.approx(row["tokens_per_day"] * size["8-float16"]["shards"])
        assert row["index_gb"]["Flat"] * 1e9 == pytest.approx(row["tokens_per_day"] / 256 * vectors["Flat"])
    assert "10,000,000,000 tokens a day" in scale.table(report)


def _without_ray(corpus, output, *, workers, rows_per_batch, show_progress, **settings):
    from extemb_core.scale.corpus import Compression
    from extemb_core.scale.worker import SHARD, Batch, CompressWorker

    rows = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    made = CompressWorker(output, **settings)({"text": rows})
    del made[SHARD]
    return Compression(batch=Batch(**{name: values[0] for name, values in made.items()}), shards=(), seconds=1.0)


# -- langchain.py ---------------------------------------------------------------------------------------------


def test_the_report_of_langchain_is_whole(models, tmp_path, monkeypatch, capsys):
    pytest.importorskip("langchain_core")
    file = tmp_path / "report.json"
    script("langchain_cost").main([*models, "--quick", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["first_token"]["n_documents"] == 4
    assert report["first_token"]["n"] == 2
    assert len(report["batch"]["samples_seconds"]["batch"]) == 2
    assert report["construct"]["n"] == 5
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3
    assert all(line.endswith(("met", "MISSED")) for line in lines)


# -- server.py ------------------------------------------------------------------------------------------------


@pytest.mark.cluster
@pytest.mark.parametrize("models", ["untrained, at a layer above 0"], indirect=True)
@pytest.mark.allow_hosts(["127.0.0.1"])
def test_the_report_of_the_server_is_whole(models, tmp_path, capsys):
    pytest.importorskip("openai")
    pytest.importorskip("faiss")
    file = tmp_path / "report.json"
    script("server").main([*models, "--quick", "--only", "clients", "overhead", "--json", str(file)])
    report = json.loads(file.read_text())
    row = report["clients"]
    assert (row["n_clients"], row["errors_or_mixed"]) == (3, 0)
    for side in row["sides"].values():
        assert sum(side["counts"].get(name, 0) for name in ("answers", "late")) > 0
        assert len(side["samples_per_second"]) == 2
    assert report["overhead"]["n"] == 2
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4
    assert all(line.endswith(("met", "MISSED")) for line in lines)


@pytest.mark.browser
@pytest.mark.enable_socket
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("models", ["untrained, at a layer above 0"], indirect=True)
def test_the_report_of_the_page_is_whole(models, tmp_path):
    pytest.importorskip("playwright.sync_api")
    pytest.importorskip("nicegui")
    file = tmp_path / "report.json"
    script("server").main([*models, "--quick", "--only", "page", "--json", str(file)])
    row = json.loads(file.read_text())["page"]
    assert len(row["samples_load"]) == len(row["samples_shown"]) == 2
    assert min(row["samples_load"] + row["samples_shown"]) > 0


# -- llamaindex_cost.py ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_report_of_llamaindex_is_whole(models, tmp_path, capsys):
    pytest.importorskip("llama_index.core")
    file = tmp_path / "report.json"
    script("llamaindex_cost").main([*models, "--quick", "--json", str(file)])
    report = json.loads(file.read_text())
    assert set(report["calls"]["modes"]) == {"compact", "tree_summarize", "refine", "accumulate"}
    for row in report["calls"]["modes"].values():
        assert row["sources_kept"]
        assert max(row["plain_positions"] + row["our_positions"]) <= report["config"]["window"]
    assert report["query"]["n"] == 1
    assert report["postprocessor"]["n"] == 3
    assert len(capsys.readouterr().out.strip().splitlines()) == 6


# -- timing.py ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bare_layers_are_the_llms_own(architecture):
    llm = tiny_llm(architecture)
    ids = torch.tensor([[5, 9, 14, 7, 30]])
    with torch.no_grad():
        whole = llm.model.base_model(input_ids=ids, output_hidden_states=True, use_cache=False)
        bare = script("timing").bare_layers(llm, 2)(input_ids=ids, use_cache=False).last_hidden_state
        after = llm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(bare, whole.hidden_states[2])
    assert torch.equal(after, whole.last_hidden_state)
    assert len(llm.model.base_model.layers) == 3


@pytest.mark.parametrize("lengths", [(70,), (16, 5, 40)])
def test_both_sides_of_the_compress_ratio_read_the_same_tokens_in_the_same_batches(llm, lengths):
    embedder = random_embedder(llm)  # chunks of 16
    ids = [np.arange(3, 3 + length, dtype=np.int32) for length in lengths]
    made = []
    hook = embedder.register_forward_pre_hook(lambda _, args: made.append(args[0]))
    embedder.compress_ids(ids, batch_size=2)
    hook.remove()
    bare = list(script("timing").batches(ids, 16, 2))
    assert len(bare) == len(made)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, bare, strict=True))
    assert sum(int((batch > 0).sum()) for batch in bare) == sum(lengths)


def untrained_embedder(llm):
    return ExtensibleEmbedder.untrained(llm, 2)


@pytest.mark.parametrize("embedder_of", [random_embedder, untrained_embedder])
def test_compress_cost_report(llm, embedder_of):
    embedder = embedder_of(llm)
    found = script("timing").compress_cost(embedder, TEXT, rounds=2, batch_size=2)
    assert found["tokens"] == len(llm.encode(TEXT))
    assert {name: len(values) for name, values in found["samples_seconds"].items()} == {
        "bare": 2,
        "compress": 2,
        "tokenise": 2,
    }
    assert (found["n"], found["target"], found["layers"]) == (2, 1.1, 2)


@pytest.mark.parametrize("embedder_of", [random_embedder, untrained_embedder])
def test_first_token_compares_prompts_of_the_same_length(llm, embedder_of):
    roomy = type(llm)(tiny_model("llama", max_position_embeddings=512), llm.tokenizer, name="tiny")
    lm = ExtensibleLM(roomy, embedder_of(roomy))
    fed = []

    def work():
        fed.append(script("timing").first_token(lm, TEXT * 2, embeddings=12, ratio=4, rounds=2))

    seen = inputs_seen(roomy.model.base_model.layers[0], work)
    positions = fed[0]["positions"]
    assert fed[0]["extensible_embeddings"] >= 12
    assert positions["extensible"] - positions["plain"] in (0, 1)
    assert {length for _, length in seen} == set(positions.values())


def test_rounds_alternate_and_ratios_are_paired():
    timing = script("timing")
    order = []
    samples = timing.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert "".join(order) == "abbaabba"
    assert [len(values) for values in samples.values()] == [3, 3]
    found = timing.compare({"ours": [2.0, 2.0, 12.0], "base": [2.0, 1.0, 10.0]}, "ours", "base", 1.1)
    assert found["ratio"] == 1.2
    assert not found["met"]


def test_a_command_that_fails_is_an_error():
    with pytest.raises(ExtembError, match="no such thing"):
        script("timing")._python("raise SystemExit('no such thing')")


# -- memory.py, install_size.py -------------------------------------------------------------------------------


def test_memory_probe_accounts_for_what_it_returns(folders):
    memory = script("memory")
    found = memory.probe(str(folders / "tiny-llm"), None, 10_000)
    assert found["bytes"] == 10_000
    assert found["embeddings_mib"] * memory.MIB == pytest.approx(found["tokens"] / 2 * 64 * 4, rel=0.01)
    assert found["beyond_embeddings_mib"] == pytest.approx(found["peak_mib"] - found["embeddings_mib"])
    assert found["peak_mib"] >= found["before_mib"] - 1  # Linux counts pages for each processor, and adds them up later


def test_the_llm_itself_is_probed_with_an_embedder_of_any_entry_layer(models):
    memory = script("memory")
    found = memory.probe(models[1], models[3], 10_000)
    assert found["llm"] == "the LLM itself"
    assert found["embeddings_mib"] * memory.MIB > 0.99 * found["tokens"] / 2 * 32 * 4


def test_sample_text_has_the_size_asked_for():
    text = script("memory").sample_text(600_000)
    assert len(text.encode()) == 600_000
    assert text.count("\n") > 1000


def test_closure_follows_requirements_extras_and_markers():
    needs = {
        "a": ["b>=1", 'c ; extra == "more"', 'gone ; sys_platform == "nowhere"'],
        "b": ["torch"],
        "c": [],
        "torch": ["d"],
        "d": ["a"],
    }
    closure = script("install_size").closure
    assert closure(["A"], requires=needs.get) == ["a", "b", "d", "torch"]
    assert closure(["a[more]"], requires=needs.get) == ["a", "b", "c", "d", "torch"]
    assert closure(["a", "a[more]"], skip={"torch"}, requires=needs.get) == ["a", "b", "c"]


def test_install_size_adds_up():
    size = script("install_size").install_size()
    whole = sum(size["by_distribution_mb"].values())
    assert size["dependencies_mb"] + size["torch_mb"] == pytest.approx(whole, abs=0.1)
    assert "torch" in size["installed_by_torch_alone"]
    assert "numpy" not in size["installed_by_torch_alone"]
    assert 0 < size["extemb_code_mb"] < 5


@pytest.mark.slow
def test_speed_report_is_whole(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS.parent))
    memory = script("memory")
    elsewhere = memory._in_a_process

    def run_forked(command, **_):
        process = Process(
            f"import runpy, sys; sys.argv = {command[1:]!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        said = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, *said)

    monkeypatch.setattr(  # the larger text in this process: one is enough to know that what another one prints is read
        memory, "_in_a_process", lambda *args: (elsewhere if args[2] == 20_000 else memory.probe)(*args)
    )
    monkeypatch.setattr(memory, "subprocess", SimpleNamespace(run=run_forked))  # which has torch already
    out = tmp_path / "speed.json"
    models = ["--llm", str(folders / "tiny-llm"), "--embedder", str(folders / "tiny-embedder")]
    script("speed").main([*models, "--quick", "--only", "start", "compress", "memory", "size", "--json", str(out)])
    report = json.loads(out.read_text(encoding="utf-8"))
    assert set(report) > {"start", "compress", "memory", "size", "config", "versions", "hardware", "git", "command"}
    assert report["memory"]["tiny_llm"]["n"] == len(report["memory"]["tiny_llm"]["samples"]["20000"]) == 1
    assert len(report["start"]["import"]["samples_seconds"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert sys.executable not in out.read_text(encoding="utf-8")


@pytest.mark.parametrize("models", ["untrained, at a layer above 0"], indirect=True)
def test_the_report_of_planning_is_whole(models, tmp_path, capsys):
    out = tmp_path / "speed.json"
    script("speed").main([*models, "--quick", "--only", "plan", "--json", str(out)])
    row = json.loads(out.read_text(encoding="utf-8"))["plan"]
    assert set(row["fidelity"]) == {"focus", "even"}
    assert row["n"] == row["next_question"]["n"] > 0
    assert [line.split(" / ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "first token, planned for the question"
    ] * 2


@pytest.fixture
def questions(tmp_path):
    """Write questions, two about each text, which has so many words."""

    def written(words):
        texts = [" ".join(["A fox runs.", *f"It saw {at} things.".split() * words][:words]) for at in range(3)]
        rows = [
            {"id": f"{at}{n}", "context": text, "question": "What runs?", "answers": ["A fox"]}
            for at, text in enumerate(texts)
            for n in "ab"
        ]
        file = tmp_path / "dev_some.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return written


@pytest.mark.parametrize("models", ["untrained, at a layer above 0"], indirect=True)
def test_each_way_of_reading_a_text_is_timed_beside_all_of_it(models, questions, tmp_path, capsys):
    out = tmp_path / "first_token.json"
    told = ["--data", questions(30), "--ratios", "2", "4", "--json", str(out)]
    script("first_token").main([*models, *told])
    found = json.loads(out.read_text(encoding="utf-8"))["sets"]["dev_some"]
    ways = ["full", *(f"{way}/{k}" for k in (2, 4) for way in ("truncated", "chosen", "extensible", "focus"))]
    assert list(found["ways"]) == ways
    assert [sample["id"] for sample in found["samples"]] == ["1b", "2b"]  # one of each text, without the first
    assert found["ways"]["full"]["over_full"] == 1
    for sample in found["samples"]:
        positions = sample["positions"]
        assert max(positions, key=positions.get) == "full"
        assert all(positions[f"{way}/4"] < positions[f"{way}/2"] for way in ("truncated", "extensible", "focus"))
        assert all(
            positions[f"{way}/{k}"] <= positions[f"extensible/{k}"] for way in ("chosen", "focus") for k in (2, 4)
        )
        assert min(sample["seconds"].values()) > 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(ways)


@pytest.mark.parametrize("models", ["untrained, at a layer above 0"], indirect=True)
def test_a_text_that_does_not_fit_is_not_timed_as_if_it_did(models, questions):
    with pytest.raises(ConfigError, match="does not fit the window; leave its file out"):
        script("first_token").main([*models, "--data", questions(300), "--quick"])


def test_a_copied_passage_is_found_and_its_words_in_another_order_are_not(tmp_path, monkeypatch):
    words = [f"word{at}" for at in range(60)]
    train = [{"text": "Before it. " + " ".join(words[:30]).upper() + ", and after it."}]
    held_out = [{"context": " ".join(words)}, {"context": " ".join(reversed(words))}, {"context": "too short"}]
    for name, rows in (("train", train), ("held_out", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--train", str(tmp_path / "train.jsonl"), "--held-out", str(tmp_path / "held_out.jsonl")]
    monkeypatch.setattr(sys, "argv", ["overlap.py", *arguments, "--json", str(tmp_path / "out.json")])
    script("overlap").main()
    found = json.loads((tmp_path / "out.json").read_text())["held_out"]["held_out.jsonl"]
    assert found["texts"] == 3
    assert found["largest_share"] == pytest.approx(18 / 48, abs=1e-4)  # n-grams wholly within the 30 words
    assert found["mean_share"] == pytest.approx(18 / 48 / 3, abs=1e-4)
    assert found["texts_above_10_percent"] == 1


# -- training_speed.py and ablations.py -----------------------------------------------------------------------


@pytest.fixture
def long_llm(tmp_path):
    """A tiny LLM whose window holds questions and books, saved."""
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(tmp_path / "long-llm")
    tiny_llm().tokenizer.save_pretrained(tmp_path / "long-llm")
    return str(tmp_path / "long-llm")


def test_one_call_per_chunk_is_the_same_loss():
    embedder = random_embedder(tiny_llm())
    samples = [torch.randint(3, 400, (44,)), torch.randint(3, 400, (44,))]
    packed = two_stream_losses(embedder, samples, [[4], [4]], 16).mean()
    single = script("training_speed").one_call_per_chunk(embedder, samples, 4, 16)
    torch.testing.assert_close(single, packed)


@pytest.mark.parametrize("layers", [("--num-layers", "2"), ("--entry-layer", "2")])
def test_training_speed_report_is_whole(long_llm, tmp_path, capsys, layers):
    (tmp_path / "text.txt").write_text(SENTENCES * 4)
    out = tmp_path / "speed.json"
    arguments = ["--llm", long_llm, "--data", str(tmp_path / "text.txt"), "--rounds", "2", "--json", str(out)]
    lengths = [*layers, "--batch-size", "1", "--sample-length", "96", "--chunk-size", "32"]
    script("training_speed").main([*arguments, *lengths])
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["operations_per_step"] > 2 * 3 * 96 * 32 * 64  # more than one product of each layer, forward
    assert report["against_floor"]["ratio"] > 0
    assert report["against_one_call_per_chunk"]["n"] == 2
    assert "of the arithmetic floor" in capsys.readouterr().out


def test_ablations_are_measured_alike_and_only_once(long_llm, tmp_path, monkeypatch, capsys):
    rows = [
        {"id": f"made:{at}", "context": f"The {place} was built in 18{at}0.",
         "question": f"When was the {place} built?", "answers": [f"18{at}0"]}
        for at, place in enumerate(("harbour", "bridge", "mill"))
    ]  # fmt: skip
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.txt").write_text(SENTENCES * 8)
    (tmp_path / "arms.yaml").write_text(
        "base: {trained: both, sample_length: 64, total_tokens: 128, batch_size: 2, objectives: {questions: 1},\n"
        "       embedder: {num_layers: 2, chunk_size: 32, ratios: [2, 4]}}\n"
        "arms: {joint: , frozen: {trained: embedder, embedder: {connector: conv}},\n"
        "       above: {embedder: {entry_layer: 2}}}\n"
    )
    arguments = [str(tmp_path / "arms.yaml"), "--llm", long_llm, "--output", str(tmp_path / "runs"), "--ratios", "2",
                 "--questions", str(tmp_path / "questions.jsonl"), "--dev-questions", str(tmp_path / "questions.jsonl"),
                 "--dev-text", str(tmp_path / "text.txt"), "--json", str(tmp_path / "out.json")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["ablations.py", *arguments])
    script("ablations").main()
    arms = json.loads((tmp_path / "out.json").read_text())["arms"]
    measured = {"answers/none", "answers/full", "answers/extensible/2", "text/none", "text/full", "text/extensible/2"}
    assert all(measured <= arm.keys() for arm in arms.values())
    assert arms["joint"]["answers/full"]["n"] == 3
    config = json.loads((tmp_path / "runs" / "frozen" / "training.json").read_text())
    assert (config["embedder"]["connector"], config["embedder"]["num_layers"]) == ("conv", 2)
    assert len(capsys.readouterr().out.splitlines()) == 3
    script("ablations").main()
    assert not capsys.readouterr().out


def mills(file):
    """Two questions about two texts, written to a file."""
    rows = [
        {"id": str(at), "context": f"The mill of {place} is old.", "question": "How old is it?", "answers": ["old"]}
        for at, place in enumerate(("Ore", "Ling"))
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return rows


def test_answer_losses_are_those_of_the_answer_after_its_prompt(tmp_path):
    llm = LLM(tiny_model("llama", max_position_embeddings=1024), tiny_llm().tokenizer, name="long")
    rows = mills(tmp_path / "questions.jsonl")
    trained = TrainableModel(llm, random_embedder(llm))
    losses, _ = script("ablations").answer_losses(trained, str(tmp_path / "questions.jsonl"), (2,), 2)
    before, after = templates()["short"]["before"], templates()["short"]["after"]
    for row, loss in zip(rows, losses["full"], strict=True):
        text = before + row["context"] + after.replace("{question}", row["question"])
        prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        ids = llm.tokenizer.encode(prompt) + llm.tokenizer.encode("old<|im_end|>")
        n = len(llm.tokenizer.encode("old<|im_end|>"))
        with torch.no_grad():
            predicted = llm.model(torch.tensor([ids])).logits[0, -n - 1 : -1].log_softmax(-1)
        assert loss == pytest.approx(-float(predicted.gather(1, torch.tensor(ids[-n:])[:, None]).mean()), abs=1e-4)


# -- entry_exactness.py and plug_in.py ------------------------------------------------------------------------


def test_one_chunk_that_opens_a_prompt_is_read_as_its_text(long_llm, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": SENTENCES * 20}))
    out = tmp_path / "out.json"
    arguments = ["--llm", long_llm, "--text", str(tmp_path / "text.jsonl"), "--entry-layer", "2", "--quick"]
    script("entry_exactness").main([*arguments, "--json", str(out)])
    report = json.loads(out.read_text())
    assert report["entry_layer"] == 2
    opening, chat = (report["chunks"][place]["1"]["max_logit_difference"] for place in ("opening", "chat"))
    assert opening < 1e-4 < chat
    assert "entry layer 2" in capsys.readouterr().out
    for options, message in ((["--embedder", "a/b"], "untrained"), (["--entry-layer", "0"], "entry_layer")):
        with pytest.raises(ConfigError, match=message):
            script("entry_exactness").main([*arguments, *options])


def test_an_embedder_of_any_entry_layer_is_plugged_into_a_derivative(long_llm, tmp_path, monkeypatch):
    mills(tmp_path / "questions.jsonl")
    (tmp_path / "text.txt").write_text(SENTENCES * 8)
    llm = LLM.from_pretrained(long_llm)
    for entry_layer, embedder in enumerate((random_embedder(llm), ExtensibleEmbedder.untrained(llm, 1))):
        embedder.save_pretrained(tmp_path / f"embedder-{entry_layer}")
        out = tmp_path / f"{entry_layer}.json"
        arguments = ["--llm", long_llm, "--embedder", str(tmp_path / f"embedder-{entry_layer}"), "--ratios", "4",
                     "--derivative", long_llm, "--questions", str(tmp_path / "questions.jsonl"),
                     "--text", str(tmp_path / "text.txt"), "--json", str(out)]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["plug_in.py", *arguments])
        script("plug_in").main()
        first, *others = json.loads(out.read_text())["sides"].values()  # the derivative is the LLM here
        assert all(other == first for other in others)


# -- entry_layer.py -------------------------------------------------------------------------------------------


def test_the_report_of_entry_layers_is_whole(long_llm, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n".join(f"{at}. {SENTENCES}" for at in range(20)))
    rows = [
        {"id": str(at), "context": f"Ship {at} is {colour}.", "question": "Which colour?", "answers": [colour]}
        for at, colour in enumerate(("red", "blue"))
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, questions, out = (str(tmp_path / name) for name in ("text.txt", "questions.jsonl", "out.json"))
    script("entry_layer").main(
        [
            "--llm", long_llm, "--layers", "1", "2", "--weighting", "rank", "frequency", "--ratios", "1", "4", "--text",
            text, "--counts", text, "--windows", "2", "--questions", questions, "--json", out,
        ]
    )  # fmt: skip
    report = json.loads(Path(out).read_text(encoding="utf-8"))
    assert [(row["layer"], row["weighting"]) for row in report["rows"]] == [
        (1, "rank"), (1, "frequency"), (2, "rank"), (2, "frequency"),
    ]  # fmt: skip
    assert {name: len(each) for name, each in report["rows"][0]["text"]["text.txt"].items()} == {"1": 2, "4": 2}
    assert list(report["controls"]["text"]["text.txt"]) == ["none", "nearest/4", "full"]
    assert list(report["controls"]["questions"]) == ["none", "truncated/4", "full"]
    losses = [row["questions"]["4"]["mean"] for row in report["rows"]]
    assert len(set(losses)) == 4
    for row in report["rows"]:  # a window is one chunk that opens the prompt
        assert row["text"]["text.txt"]["1"] == pytest.approx(report["controls"]["text"]["text.txt"]["full"], abs=1e-4)
    assert "questions" in capsys.readouterr().out

"""Generation is plain transformers', in a batch as alone, and streams end when they should."""

from __future__ import annotations

import gc
import random
import threading

import pytest
import torch
from tiny import ARCHITECTURES, FAMILIES, LONG_PROMPT, tiny_llm, tiny_model, tiny_tokenizer

from extemb_core.errors import ConfigError
from extemb_core.models import generation
from extemb_core.models.generation import Generated, Sampling, StreamedRow, _DecodedText
from extemb_core.models.llm import LLM

GREEDY = Sampling(max_new_tokens=8)


def worker_threads():
    return [thread for thread in threading.enumerate() if thread.name == "extemb-generate"]


# -- generate and score -------------------------------------------------------------------------------------------


def plain_generate(llm, ids, **options):
    out = llm.model.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
        max_new_tokens=8, eos_token_id=llm.stop_token_ids, pad_token_id=2, **options,
    )[0, len(ids):].tolist()  # fmt: skip
    return out[: out.index(2)] if 2 in out else out


@pytest.mark.parametrize("architecture", FAMILIES)
def test_generation_is_that_of_plain_transformers(architecture):
    llm = tiny_llm(architecture)
    for text in (LONG_PROMPT, "Rivers", "x"):
        ids = llm.encode(text).tolist()
        expected = plain_generate(llm, ids)
        assert llm.generate([ids], GREEDY)[0].token_ids == expected
        assert llm.generate([llm.embed(ids)], GREEDY)[0].token_ids == expected


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_in_a_padded_batch_is_that_of_each_alone(architecture, penalty):
    llm = tiny_llm(architecture)
    prompts = [llm.encode(text).tolist() for text in (LONG_PROMPT, "Rivers", "x", "def area(width")]
    sampling = Sampling(max_new_tokens=8, repetition_penalty=penalty)
    for inputs in (prompts, [llm.embed(ids) for ids in prompts], [llm.embed(prompts[0]), *prompts[1:]]):
        assert llm.generate(inputs, sampling) == [llm.generate([each], sampling)[0] for each in inputs]


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen3_next"])
def test_a_shared_prefix_is_read_once_and_changes_no_answer(architecture, penalty):
    llm = LLM(tiny_model(architecture, max_position_embeddings=512), tiny_tokenizer())
    text = llm.encode(LONG_PROMPT * 6).tolist()[:130]
    prompts = [text + llm.encode(end).tolist() for end in ("Rivers", "x", "def area(width: float")] + [text]
    sampling = Sampling(max_new_tokens=8, repetition_penalty=penalty)
    alone = [llm.generate([each], sampling)[0] for each in prompts]
    read = []
    hook = llm.model.register_forward_pre_hook(
        lambda _, args, given: read.append(next(
            tuple(given[name].shape[:2]) for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)),
        with_kwargs=True,
    )  # fmt: skip
    for inputs in (prompts, [llm.embed(ids) for ids in prompts]):
        read.clear()
        expected = alone if inputs is prompts else [llm.generate([each], sampling)[0] for each in inputs]
        read.clear()
        assert llm.generate(inputs, sampling) == expected
        if architecture in ("gemma2", "qwen3_next"):  # a window slides over slots, padding among them; a state is one
            assert read[0] == (4, max(map(len, prompts)))
        else:
            assert read[0] == (1, 129)  # the shortest prompt keeps one token of its own
            assert read[1][0] == 4
            assert read[1][1] < 20
    hook.remove()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_answers_and_scores_are_the_same_from_one_reading(architecture):
    llm = LLM(tiny_model(architecture, max_position_embeddings=512), tiny_tokenizer())
    text = llm.encode(LONG_PROMPT * 6).tolist()[:130]
    alike = [text + llm.encode(end).tolist() for end in ("Rivers", "x", "x", "def area(width: float")]
    targets = [llm.encode(target).tolist() for target in (" rise", " and fall in spring", " and fall", "")]
    unlike = [text, text[3:50], [5], text[9:60]]
    for prompts in (alike, [llm.embed(ids) for ids in alike], unlike, unlike[2:3]):
        wanted = targets[: len(prompts)]
        answers, scores = llm.generate_and_score(prompts, wanted, GREEDY)
        assert answers == llm.generate(prompts, GREEDY)
        for one, other in zip(scores, llm.log_probs(prompts, wanted), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    assert llm.generate_and_score([], [], GREEDY) == ([], [])


def test_what_is_answered_and_scored_is_read_once(llm):
    llm = LLM(tiny_model("llama", max_position_embeddings=512), tiny_tokenizer())
    text = llm.encode(LONG_PROMPT * 6).tolist()[:130]
    read = []
    hook = llm.model.base_model.register_forward_pre_hook(
        lambda _, args, given: read.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    for prompts, expected in (
        ([text[:20], text[3:30]], [(2, 29), (2, 1)]),  # 27 and a target's first two tokens; the last position again
        ([[*text, 5, 6, at] for at in range(7, 10)], [(1, 132), (3, 3), (3, 1)]),
        ([[*text, 5, 6, 7]] * 2, [(1, 132), (2, 3), (2, 1)]),  # alike to the end
    ):
        read.clear()
        assert llm.shares_prefix(prompts) == (len(expected) == 3)
        llm.generate_and_score(prompts, [[5, 6, 7]] * len(prompts), Sampling(max_new_tokens=1))
        assert read == expected
    hook.remove()


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_penalty_is_that_of_transformers(penalty):
    llm = tiny_llm()
    for text in (LONG_PROMPT, "x"):
        ids = llm.encode(text).tolist()
        sampling = Sampling(max_new_tokens=8, repetition_penalty=penalty)
        assert llm.generate([ids], sampling)[0].token_ids == plain_generate(llm, ids, repetition_penalty=penalty)
    scores = torch.tensor([[2.0, -2.0, 0.5, -0.5]])
    own = generation._Penalty(2.0, [[0, 1]], 3)
    assert own(torch.tensor([[2, 2, 2]]), scores).tolist() == [[1.0, -4.0, 0.5, -0.5]]  # what is before is no answer
    assert own(torch.tensor([[2, 2, 2, 3]]), scores).tolist() == [[1.0, -4.0, 0.5, -1.0]]


def test_padding_is_not_penalised():
    llm = LLM(tiny_model("llama"), tiny_tokenizer())
    short, long = llm.encode("x").tolist(), llm.encode(LONG_PROMPT).tolist()
    first = llm.generate([short], Sampling(max_new_tokens=1, repetition_penalty=9.0))[0].token_ids[0]
    llm.__dict__["stop_token_ids"] = [first]  # ends the short answer at once, alone and beside a longer prompt
    made = llm.generate([short, long], Sampling(max_new_tokens=5, repetition_penalty=9.0))
    assert (made[0].token_ids, made[0].finish_reason) == ([], "stop")


def test_the_models_own_sampling_defaults_do_not_leak_in():
    llm = LLM(tiny_model("llama"), tiny_tokenizer())
    ids = llm.encode(LONG_PROMPT).tolist()
    expected = llm.generate([ids], GREEDY)
    llm.model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.5)
    assert llm.generate([ids], GREEDY) == expected == llm.generate([ids], GREEDY)


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 1}, {"return_dict_in_generate": True}, {"stop_strings": ["a"]},
        {"prompt_lookup_num_tokens": 3}, {"suppress_tokens": list(range(50, 300))}, {"max_time": 0.0},
        {"num_return_sequences": 2}, {"min_length": 200}, {"forced_eos_token_id": 5}, {"guidance_scale": 3.0},
        {"bad_words_ids": [[index] for index in range(50, 300)]}, {"num_beams": 2},
    ],
)  # fmt: skip
def test_no_other_default_of_the_model_leaks_in(settings):
    llm = LLM(tiny_model("llama"), tiny_tokenizer())
    ids = llm.encode(LONG_PROMPT).tolist()
    expected = llm.generate([ids], GREEDY)
    configured = llm.model.generation_config
    for name, value in settings.items():  # as a file has them: transformers checks only what goes together
        setattr(configured, name, value)
    before = configured.to_dict()
    assert llm.generate([ids], GREEDY) == expected
    assert "".join(llm.stream(ids, GREEDY)) == expected[0].text
    assert llm.model.generation_config is configured
    assert configured.to_dict() == before


def test_an_answer_that_fails_or_is_interrupted_is_what_was_shown(llm, monkeypatch):
    ids, forward, calls = llm.encode(LONG_PROMPT).tolist(), llm.model.forward, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) > 6:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(llm.model, "forward", failing)
    result, shown = Generated(), []
    with pytest.raises(RuntimeError, match="out of memory"):
        shown.extend(llm.stream(ids, Sampling(max_new_tokens=30), result))
    monkeypatch.undo()
    assert (len(result.token_ids), result.finish_reason) == (6, "cancelled")
    pieces, result = llm.stream(ids, Sampling(max_new_tokens=30), Generated()), Generated()
    pieces = llm.stream(ids, Sampling(max_new_tokens=30), result)
    first = next(pieces)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt())
    assert (result.text, result.finish_reason) == (first, "cancelled")


def test_a_stream_that_is_closed_after_its_last_piece_is_complete(llm):
    ids, result, shown = llm.encode(LONG_PROMPT).tolist(), Generated(), ""
    (expected,) = llm.generate([ids], Sampling(max_new_tokens=12))
    pieces = llm.stream(ids, Sampling(max_new_tokens=12), result)
    while shown != expected.text:
        shown += next(pieces)
    pieces.close()
    assert result == expected


def test_the_tokens_of_an_answer_end_with_its_stop_string_in_a_batch_too(monkeypatch):
    llm = LLM(tiny_model("llama"), tiny_tokenizer())
    monkeypatch.setitem(llm.__dict__, "stop_token_ids", [])
    prompts = [llm.encode(text).tolist() for text in (LONG_PROMPT, "Rivers carry", "12", "sea")]
    sampling = Sampling(max_new_tokens=24, stop=tuple("aeost"))
    alone = [llm.generate([ids], sampling)[0] for ids in prompts]
    assert len({len(one.token_ids) for one in alone}) > 1
    assert llm.generate(prompts, sampling) == alone


def test_an_empty_prompt_is_refused(llm):
    for empty in ([], torch.empty(0, llm.hidden_size)):
        with pytest.raises(ConfigError, match="0 positions"):
            llm.generate([[5, 6], empty], GREEDY)
        with pytest.raises(ConfigError, match="0 positions"):
            llm.generate_and_score([[5, 6], empty], [[7, 8], [7, 8]], GREEDY)
        with pytest.raises(ConfigError, match="0 positions"):
            next(llm.stream(empty, GREEDY))
    assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0), ("max_new_tokens", 1.5), ("temperature", -1), ("temperature", float("nan")),
        ("temperature", "hot"), ("top_p", 0), ("top_p", 1.1), ("top_k", -1), ("top_k", 0.5),
        ("repetition_penalty", 0), ("seed", "x"), ("stop", ("",)), ("stop", (5,)), ("stop", 5),
    ],
)  # fmt: skip
def test_a_bad_sampling_value_is_named(name, value):
    with pytest.raises(ConfigError, match=name):
        Sampling(**{name: value})


def test_one_stop_string_needs_no_tuple():
    assert Sampling(stop="END").stop == ("END",)


# -- sampling -----------------------------------------------------------------------------------------------------

HOT = {"max_new_tokens": 16, "temperature": 1.5}


def test_a_seed_repeats_and_leaves_the_global_state_alone(llm):
    ids = llm.encode("Rivers").tolist()
    state = torch.get_rng_state()
    first, second, other = (llm.generate([ids], Sampling(**HOT, seed=seed))[0].token_ids for seed in (1, 1, 2))
    assert first == second != other
    assert first != llm.generate([ids], Sampling(max_new_tokens=16))[0].token_ids
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_draws_follow_the_global_generator(llm):
    ids = llm.encode("Rivers").tolist()
    drawn = []
    with torch.random.fork_rng():
        for _ in range(2):
            torch.manual_seed(4)
            drawn.append([llm.generate([ids], Sampling(**HOT))[0].token_ids for _ in range(2)])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]


def test_a_draw_depends_neither_on_the_batch_nor_on_other_threads(llm):
    ids = [llm.encode(text).tolist() for text in ("Rivers", LONG_PROMPT, "x")]
    sampling = Sampling(**HOT, seed=3, top_k=50, top_p=0.95)
    alone = [llm.generate([each], sampling)[0] for each in ids]
    assert llm.generate(ids, sampling) == alone
    results = {}

    def work(index):
        results[index] = [llm.generate([ids[index]], sampling)[0] for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[index] == [alone[index]] * 3 for index in range(3))


def test_draws_have_the_models_probabilities():
    scores = torch.tensor([[2.0, 1.0, 0.0, -float("inf")]])
    draw = generation._Draw(0, 1)
    counts = torch.bincount(torch.stack([draw(None, scores).argmax(-1) for _ in range(4000)])[:, 0], minlength=4)
    torch.testing.assert_close(counts / 4000, scores.softmax(-1)[0], atol=0.03, rtol=0)


def test_top_k_of_one_is_greedy(llm):
    ids = llm.encode(LONG_PROMPT).tolist()
    assert llm.generate([ids], Sampling(**HOT, top_k=1)) == llm.generate([ids], Sampling(max_new_tokens=16))


# -- streaming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 5}, {"repetition_penalty": 1.3}])
def test_pieces_make_the_text_of_generate(llm, options):
    sampling = Sampling(max_new_tokens=40, **options)
    for text in (LONG_PROMPT, "x", "Copper"):
        ids = llm.encode(text).tolist()
        result = Generated()
        assert "".join(llm.stream(ids, sampling, result)) == result.text
        assert result == llm.generate([ids], sampling)[0]
        assert not worker_threads()


def unstopped(llm, ids, n=30):
    made = llm.generate([ids], Sampling(max_new_tokens=n, temperature=1.5, seed=8))[0]
    assert len(made.token_ids) > 8
    return made.text


@pytest.mark.parametrize("temperature", [1e-7, 1e-39, 5e-324])
def test_a_temperature_that_is_nearly_0_is_nearly_greedy(llm, temperature):
    ids, settings = llm.encode("x").tolist(), {"max_new_tokens": 8, "seed": 1}
    nearly = llm.generate([ids], Sampling(temperature=temperature, **settings))[0]
    assert nearly.token_ids == llm.generate([ids], Sampling(**settings))[0].token_ids


@pytest.mark.parametrize("where", [(3, 5), (4, 9), (0, 2), (7, 8)])
def test_a_stop_string_never_shows_however_tokens_split_it(llm, where):
    ids = llm.encode("x").tolist()
    text = unstopped(llm, ids)
    stop = text[slice(*where)]
    sampling = Sampling(max_new_tokens=30, temperature=1.5, seed=8, stop=("never said", stop))
    result = Generated()
    pieces = list(llm.stream(ids, sampling, result))
    assert "".join(pieces) == result.text == text[: text.index(stop)]
    assert result.finish_reason == "stop"
    (made,) = llm.generate([ids], sampling)
    assert (made.text, made.finish_reason) == (result.text, "stop")


def test_the_beginning_of_a_stop_string_that_does_not_come_is_shown(llm):
    ids = llm.encode("x").tolist()
    text = unstopped(llm, ids)
    sampling = Sampling(max_new_tokens=30, temperature=1.5, seed=8, stop=(text[-2:] + "no more",))
    assert "".join(llm.stream(ids, sampling)) == text


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_stop_token_is_not_part_of_the_text_even_if_it_is_an_ordinary_one(llm, at):
    ids = llm.encode("x").tolist()
    made = llm.generate([ids], Sampling(max_new_tokens=5))[0].token_ids
    end = made[at]
    llm = LLM(tiny_model("llama"), tiny_tokenizer())
    llm.model.generation_config.eos_token_id = [end]
    result = Generated()
    shown = "".join(llm.stream(ids, Sampling(max_new_tokens=5), result))
    assert result.token_ids == made[: made.index(end)]
    assert shown == result.text == llm.decode(result.token_ids)
    assert result.finish_reason == "stop"
    assert llm.generate([ids], Sampling(max_new_tokens=5)) == [result]


class Decoding:
    """Tokens of a word each, with a space before it that is lost at a beginning; of a byte each; and of no text."""

    words = (
        "\u2581the",
        "\u2581sea",
        "s",
        "\u2581",
        ".",
        None,
        *(bytes([b]) for b in "\u00e9\u6c34\U0001f30a".encode()),
    )

    def decode(self, ids):
        data = b"".join(w if isinstance(w, bytes) else (w or "").encode() for w in (self.words[at] for at in ids))
        text = data.decode(errors="replace").replace("\u2581", " ")
        return text.removeprefix(" ")


@pytest.mark.parametrize("seed", range(20))
def test_what_each_token_adds_is_told_as_all_are_decoded(seed):
    llm = Decoding()
    draw, ids = random.Random(seed), []
    while len(ids) < 40:
        first, count = draw.choice([(draw.randrange(6), 1), (6, 2), (8, 3), (11, 4)])
        ids += range(first, first + count)
    decoded = _DecodedText(llm)
    for at, token in enumerate(ids):
        assert decoded.add(token).rstrip("\ufffd") == llm.decode(ids[: at + 1]).rstrip("\ufffd")
    assert decoded.add(0) == llm.decode([*ids, 0])


def test_a_long_stream_decodes_no_more_than_a_few_times_its_length(monkeypatch):
    llm = endless_llm()
    decoded = []
    whole = LLM.decode
    monkeypatch.setattr(LLM, "decode", lambda self, ids: decoded.append(len(ids)) or whole(self, ids))
    result = Generated()
    sampling = Sampling(max_new_tokens=300, temperature=1.0, seed=1)
    assert "".join(llm.stream(llm.encode("x").tolist(), sampling, result)) == result.text
    assert sum(decoded) < 15 * 300


def endless_llm():
    llm = LLM(tiny_model("llama", max_position_embeddings=4096), tiny_tokenizer())
    llm.__dict__["stop_token_ids"] = []
    llm.model.generation_config.eos_token_id = None
    return llm


def streamed(llm, prompts, samplings, **settings):
    """Stream a batch; return the rows and the pieces of each."""
    pieces = [[] for _ in prompts]
    rows = [
        StreamedRow(llm.encode(prompt).tolist(), sampling, on_piece=of_row.append, **settings)
        for prompt, sampling, of_row in zip(prompts, samplings, pieces, strict=True)
    ]
    llm.stream_batch(rows)
    return rows, pieces


def test_a_streamed_batch_gives_each_row_what_it_gets_alone(llm):
    prompts = [LONG_PROMPT, "Rivers", "x", "def area(width", "Copper wires"]
    stop = llm.generate([llm.encode("x").tolist()], Sampling(max_new_tokens=9))[0].text[3:5]
    samplings = [
        Sampling(max_new_tokens=12),
        Sampling(max_new_tokens=3, repetition_penalty=1.5),
        Sampling(max_new_tokens=9, stop=(stop,)),
        Sampling(max_new_tokens=12, temperature=1.0, top_k=20, seed=3),
        Sampling(max_new_tokens=7, temperature=0.7, top_p=0.9, seed=4),
    ]
    calls = []
    hook = llm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    rows, pieces = streamed(llm, prompts, samplings)
    hook.remove()
    assert len(calls) == 12  # one pass for each token of the longest
    for row, of_row in zip(rows, pieces, strict=True):
        assert row.result == llm.generate([row.prompt], row.sampling)[0]
        assert of_row[-1] is None
        assert "".join(of_row[:-1]) == row.result.text
    assert len(pieces[0]) > 3
    assert rows[2].result.finish_reason == "stop"


def test_cancelling_a_row_of_a_batch_leaves_the_others(llm):
    gone = threading.Event()
    prompts, sampling, pieces = ("Rivers", "Copper wires"), Sampling(max_new_tokens=9), []
    rows = [
        StreamedRow(llm.encode(prompts[0]).tolist(), sampling, lambda piece: gone.set(), cancelled=gone),
        StreamedRow(llm.encode(prompts[1]).tolist(), sampling, pieces.append),
    ]
    llm.stream_batch(rows)
    assert rows[0].result.finish_reason == "cancelled"
    assert 0 < len(rows[0].result.token_ids) < 9
    assert llm.generate([rows[0].prompt], sampling)[0].text.startswith(rows[0].result.text)
    assert rows[1].result == llm.generate([rows[1].prompt], sampling)[0]
    assert "".join(pieces[:-1]) == rows[1].result.text


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_streamed_batch_of_any_family_is_what_each_gets_alone(architecture):
    llm, sampling = tiny_llm(architecture), Sampling(max_new_tokens=4)
    rows, _ = streamed(llm, [LONG_PROMPT, "Rivers"], [sampling] * 2)
    assert [row.result for row in rows] == [llm.generate([row.prompt], sampling)[0] for row in rows]


def test_closing_a_stream_stops_the_llm():
    llm = endless_llm()
    result = Generated()
    calls = []
    llm.model.register_forward_hook(lambda *_: calls.append(1))
    stream = llm.stream(llm.encode("x").tolist(), Sampling(max_new_tokens=600, temperature=1.0, seed=1), result)
    first = next(stream)
    assert len(worker_threads()) == 1
    stream.close()
    assert not worker_threads()
    assert (result.text, result.finish_reason) == (first, "cancelled")
    assert len(calls) < 300


def test_a_forgotten_stream_stops_too():
    llm = endless_llm()
    stream = llm.stream(llm.encode("x").tolist(), Sampling(max_new_tokens=3000, temperature=1.0, seed=1))
    next(stream)
    del stream
    gc.collect()
    assert not worker_threads()


def test_an_error_in_the_model_reaches_the_reader():
    llm = LLM(tiny_model("llama"), tiny_tokenizer())
    calls = []

    def fail(module, args, output):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("the third token")

    llm.model.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError, match="the third token"):
        list(llm.stream(llm.encode("x").tolist(), Sampling(max_new_tokens=30)))
    assert not worker_threads()

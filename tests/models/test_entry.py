"""Entry at a middle layer: what the LLM reads is exact, however it is run, and the LLM knows nothing of it."""

from __future__ import annotations

import copy
import gc
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import FAMILIES, SENTENCES, bos_tokenizer, entering, shared_embedder, tiny_llm, tiny_model, tiny_tokenizer
from torch import nn

from extemb_core.context.assembly import Prompt, assemble_chat, assemble_text
from extemb_core.errors import ConfigError, MismatchError
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.entry import AnchoredPrompt, AnchoredStates, SharedParameter, clamp_to_dtype, reading_model
from extemb_core.models.generation import Generated, Sampling
from extemb_core.models.llm import LLM

GREEDY = Sampling(max_new_tokens=6)
DRAWN = Sampling(max_new_tokens=6, temperature=1.0, seed=1)  # whose tokens vary more than a random LLM's likeliest do
LAYERS = (1, 2)  # of the three that tiny LLMs have
DOCUMENT = SENTENCES[:170]
QUESTION = " What did the keeper count?"


def part(embedder, text, ratio):
    return embedder.compress(text, ratio=ratio).part


def prompt_of(llm, *parts):
    return assemble_text(llm, parts).inputs(llm)


def ids_of(prompt):
    return prompt.ids.tolist() if isinstance(prompt, AnchoredPrompt) else list(prompt)


def logits_of(llm, prompts):
    with torch.no_grad():
        return llm.logits(llm.hidden_of(prompts))


def by_hook(llm, prompt):
    """What the LLM itself gives when layer J's input is overwritten: (T, V)."""

    def overwrite(module, args, given):
        return (torch.where(prompt.mask[None, :, None], prompt.states[None], args[0]), *args[1:]), given

    hook = llm.model.base_model.layers[prompt.layer].register_forward_pre_hook(overwrite, with_kwargs=True)
    try:
        with torch.no_grad():
            return llm.model(prompt.ids[None]).logits[0]
    finally:
        hook.remove()


# -- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "bos"), [(1, False), (2, True)], ids=["1", "2-bos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_ratio_1_a_document_that_opens_the_prompt_is_read_as_its_text(family, bos, layer):
    llm = tiny_llm(family, bos=bos)
    embedder = shared_embedder(llm, layer, chunk_size=128)
    assert (embedder.config.bos_token_id is not None) == bos
    text = [*([llm.bos_token_id] if bos else []), *llm.encode(DOCUMENT), *llm.encode(QUESTION)]
    prompt = prompt_of(llm, part(embedder, DOCUMENT, 1), QUESTION)
    assert ids_of(prompt) == text
    assert int(prompt.mask.sum()) == len(llm.encode(DOCUMENT))
    with torch.no_grad():
        plain = llm.model(torch.tensor([text])).logits[0]
    torch.testing.assert_close(logits_of(llm, [prompt])[0], plain, atol=1e-3, rtol=0)
    assert llm.generate([prompt], GREEDY) == llm.generate([text], GREEDY)
    expected, short = (llm.generate([each], DRAWN)[0] for each in (text, text[:9]))
    assert llm.generate([prompt, text[:9], text], DRAWN) == [expected, short, expected]
    result = Generated()
    assert "".join(llm.stream(prompt, DRAWN, result)) == expected.text
    assert result == expected
    targets = llm.encode(" In 1987 the bridge")
    torch.testing.assert_close(llm.score(prompt, targets), llm.score(text, targets), atol=1e-3, rtol=0)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_states_replace_those_of_their_anchors_and_nothing_else(family, layer):
    llm = tiny_llm(family)
    embedder = shared_embedder(llm, layer)
    two, four, eight = (part(embedder, DOCUMENT, ratio) for ratio in (2, 4, 8))
    prompts = [
        prompt_of(llm, two, QUESTION),
        prompt_of(llm, "Read this: ", four, "\n\n", eight, QUESTION),
        prompt_of(llm, "Read this: ", eight),
    ]
    for prompt in prompts:
        expected = by_hook(llm, prompt)
        torch.testing.assert_close(logits_of(llm, [prompt])[0], expected, atol=1e-4, rtol=0)
        with torch.no_grad():
            anchors_alone = llm.model(prompt.ids[None]).logits[0]
        assert (anchors_alone - expected).abs().max() > 0.1  # so that leaving the states out would be seen
    padded = logits_of(llm, prompts)
    for row, prompt in zip(padded, prompts, strict=True):
        torch.testing.assert_close(row[: len(prompt)], by_hook(llm, prompt), atol=1e-4, rtol=0)


def test_a_state_in_the_wrong_place_would_be_seen(llm):
    prompt = prompt_of(llm, part(shared_embedder(llm, 1, chunk_size=128), DOCUMENT, 1), QUESTION)
    moved = replace(prompt, states=prompt.states.roll(1, 0))
    assert (logits_of(llm, [prompt]) - logits_of(llm, [moved])).abs().max() > 0.1


@pytest.mark.parametrize("targets", [[], [7], [7, 9, 11]])
def test_score_of_any_number_of_tokens(llm, targets):
    prompt = prompt_of(llm, part(shared_embedder(llm, 1), DOCUMENT, 4), QUESTION)
    logits = by_hook(llm, llm.continued(prompt, targets))[len(prompt) - 1 : len(prompt) - 1 + len(targets)]
    expected = logits.log_softmax(-1)[range(len(targets)), targets]
    torch.testing.assert_close(llm.score(prompt, targets), expected, atol=1e-4, rtol=0)
    text = llm.encode(QUESTION).tolist()
    one, other = llm.log_probs([prompt, text], [targets, targets])
    torch.testing.assert_close(one, llm.score(prompt, targets), atol=1e-4, rtol=0)
    torch.testing.assert_close(other, llm.score(text, targets), atol=1e-4, rtol=0)


# -- batches ------------------------------------------------------------------------------------------------------


def mixed_prompts(llm, layer=1):
    embedder = shared_embedder(llm, layer)
    return [
        prompt_of(llm, part(embedder, DOCUMENT, 2), QUESTION),
        llm.encode(QUESTION).tolist(),
        prompt_of(llm, "See: ", part(embedder, "Copper wires ran from the cellar.", 8)),
        llm.encode(DOCUMENT).tolist(),
        prompt_of(llm, part(embedder, "a", 2)),
        prompt_of(llm, part(embedder, DOCUMENT, 8), part(embedder, SENTENCES[200:300], 4), QUESTION),
    ]


@pytest.mark.parametrize(
    ("family", "sampling"),
    [
        *((family, Sampling(max_new_tokens=6, temperature=1.5, seed=3, repetition_penalty=1.5)) for family in FAMILIES),
        ("llama", GREEDY),
        ("gemma3", GREEDY),
        ("llama", Sampling(max_new_tokens=6, repetition_penalty=1.5)),
        ("llama", Sampling(max_new_tokens=6, temperature=1.5, seed=3, top_k=50, stop=("e", "the"))),
    ],
)
def test_a_batch_of_text_and_compressed_text_is_answered_as_each_alone(family, sampling):
    llm = tiny_llm(family)
    prompts = mixed_prompts(llm, layer=2)
    alone = [llm.generate([prompt], sampling)[0] for prompt in prompts]
    assert llm.generate(prompts, sampling) == alone
    assert llm.generate(prompts[::-1], sampling) == alone[::-1]
    result = Generated()
    assert "".join(llm.stream(prompts[2], sampling, result)) == alone[2].text
    assert result == alone[2]


def reads(model, calls):
    """Note of each pass its rows, its length, and how many positions have a state, None where none was handed."""

    def note(module, args, given):
        mask = given.get("entry_mask")
        calls.append((*given["input_ids"].shape, None if mask is None else int(mask.sum())))

    return model.register_forward_pre_hook(note, with_kwargs=True)


@pytest.mark.parametrize("family", ["llama", "phi", "gpt_neox", "gemma3", "qwen3_next"])
def test_a_shared_prefix_with_compressed_text_is_read_once(family):
    llm = LLM(tiny_model(family, max_position_embeddings=1024), tiny_tokenizer())
    document = part(entering(llm), SENTENCES * 2, 2)
    assert len(document) > 150
    prompts = [prompt_of(llm, "A: ", document, end) for end in (QUESTION, " Why?", "x", " In 1987 the bridge was")]
    alone = [llm.generate([prompt], DRAWN)[0] for prompt in prompts]
    calls = []
    hook = reads(llm.reading_model(1), calls)
    assert llm.generate(prompts, DRAWN) == alone
    hook.remove()
    if not llm.reads_in_parts:
        assert calls[0][0] == 4
    else:
        shared = len(llm.encode("A: ")) + len(document)
        assert calls[0] == (1, shared, len(document))
        assert calls[1][0] == 4
        assert calls[1][2] in (0, None)


def test_equal_anchors_with_other_states_are_no_shared_prefix():
    llm = LLM(tiny_model("llama", max_position_embeddings=1024), tiny_tokenizer())
    first = part(entering(llm), SENTENCES * 2, 2)
    states = first.states.clone()
    states[100:] = states[100:].flip(0)
    second = replace(first, states=states)
    prompts = [prompt_of(llm, one, QUESTION) for one in (first, second, second)]
    alone = [llm.generate([prompt], DRAWN)[0] for prompt in prompts]
    assert alone[0].token_ids != alone[1].token_ids
    calls = []
    hook = reads(llm.reading_model(1), calls)
    assert llm.generate(prompts, DRAWN) == alone
    hook.remove()
    assert calls[0] == (1, 100, 100)  # as far as the states are the same
    answers, scores = llm.generate_and_score(prompts, [[7, 9, 11], [8], [8, 7]], DRAWN)
    assert answers == alone
    for one, prompt, targets in zip(scores, prompts, [[7, 9, 11], [8], [8, 7]], strict=True):
        torch.testing.assert_close(one, llm.score(prompt, targets), atol=1e-4, rtol=0)


def test_text_only_in_a_batch_with_compressed_text_shares_a_prefix_of_text_only():
    llm = LLM(tiny_model("llama", max_position_embeddings=1024), tiny_tokenizer())
    document = part(entering(llm), SENTENCES, 2)
    before = SENTENCES * 2
    prompts = [prompt_of(llm, before, document), prompt_of(llm, before, QUESTION)]
    prompts.append([*llm.encode(before), *document.anchors.tolist()])  # the same ids as the first, as text
    alone = [llm.generate([prompt], DRAWN)[0] for prompt in prompts]
    assert llm.generate(prompts, DRAWN) == alone
    assert alone[0] != alone[2]


def test_what_cannot_stand_together_is_refused(llm):
    first, second = (prompt_of(llm, part(entering(llm, layer), DOCUMENT, 4), QUESTION) for layer in LAYERS)
    vectors = torch.zeros(3, llm.hidden_size)
    for prompts in ([first, second], [first, vectors], [vectors, first]):
        with pytest.raises(MismatchError, match="one entry layer at a time"):
            llm.generate(prompts, GREEDY)
        with pytest.raises(MismatchError, match="one entry layer at a time"):
            llm.log_probs(prompts, [[5], [5]])
    states = part(entering(llm), DOCUMENT, 4)
    with pytest.raises(MismatchError, match=r"entry layers \[1, 2\]"):
        Prompt((states, part(entering(llm, 2), DOCUMENT, 4))).inputs(llm)
    with pytest.raises(MismatchError, match="read from layer 0"):
        Prompt((states, vectors)).inputs(llm)
    with pytest.raises(MismatchError, match=r"widths \[16\] stand in one prompt of an LLM of width 32"):
        Prompt((replace(states, states=states.states[:, :16]),)).inputs(llm)
    with pytest.raises(MismatchError, match="pass one anchor for each state"):
        AnchoredStates(states.anchors[1:], states.states, 1)
    for wrong in (0, 3, 9):
        with pytest.raises(ConfigError, match=f"entry_layer={wrong} is not one of the layers 1 to 2"):
            reading_model(llm.model, wrong)


def test_parts_are_cut_and_joined():
    whole = AnchoredStates(np.arange(5, dtype=np.int32), torch.arange(10.0).view(5, 2), 3)
    again = AnchoredStates.cat([whole[:2], whole[2:2], whole[2:]])
    assert (len(whole[1:3]), again.layer) == (2, 3)
    assert again.anchors.tolist() == whole.anchors.tolist()
    assert torch.equal(again.states, whole.states)


@pytest.mark.parametrize("anchor", [1, 2, -1, 400, 2**31 - 1])  # <|im_start|>, <|im_end|>, and none of the 400
def test_an_anchor_that_no_text_becomes_is_refused(llm, anchor):
    found = part(shared_embedder(llm, 1), DOCUMENT, 4)
    anchors = found.anchors.copy()
    anchors[3] = anchor
    prompt = assemble_chat(llm, [{"role": "user", "content": [replace(found, anchors=anchors), QUESTION]}])
    with pytest.raises(MismatchError, match=f"anchor {anchor} is a control token of tiny-llama or none of its tokens"):
        prompt.inputs(llm)


# -- ways to run it -----------------------------------------------------------------------------------------------

RUNS = {
    "plain": {},
    "prefill in chunks": {"prefill_chunk_size": 7},
    "prefill one by one": {"prefill_chunk_size": 1},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "without a cache": {"use_cache": False},
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding", "gpt_neox"])
@pytest.mark.filterwarnings("ignore:.*`prefill_chunk_size`.*")
def test_every_way_of_generating_gives_the_same_tokens(family, run):
    llm = tiny_llm(family)
    embedder = shared_embedder(llm, 1)
    prompt = prompt_of(llm, "See: ", part(embedder, DOCUMENT, 2), QUESTION)
    prompts = [prompt, prompt_of(llm, part(embedder, DOCUMENT, 8)), ids_of(prompt)]
    prompts = prompts[: 1 if run == "prompt lookup" else None]
    expected = [llm.generate([each], GREEDY)[0].token_ids for each in prompts]
    model, inputs = llm.batch_inputs(prompts)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": llm.stop_token_ids, "pad_token_id": 2,
                "return_dict_in_generate": True, "output_logits": True}  # fmt: skip
    usual = model.generate(**inputs, **settings)
    calls = []
    hook = reads(model, calls)
    made = model.generate(**inputs, **settings, **RUNS[run])
    hook.remove()
    rows = made.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    assert [row[: row.index(2)] if 2 in row else row for row in rows] == expected
    assert len(made.logits) == len(usual.logits)
    for own, theirs in zip(made.logits, usual.logits, strict=True):  # a random LLM's likeliest tokens vary little
        torch.testing.assert_close(own, theirs, atol=1e-3, rtol=0)
    handed = [call[2] for call in calls]
    if run == "without a cache":
        assert handed == [int(inputs["entry_mask"].sum())] * len(handed)
    else:  # each state once, in the prompt, and none after it
        assert sum(states or 0 for states in handed) == int(inputs["entry_mask"].sum())
        assert None in handed


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_pipeline_takes_a_reading_model_as_the_llm_itself(family, monkeypatch):
    from transformers import pipeline
    from transformers.pipelines import base

    told = []
    monkeypatch.setattr(base.logger, "error", told.append)
    llm = tiny_llm(family)
    settings = {"tokenizer": llm.tokenizer, "device": "cpu"}
    plain, reading = (pipeline("text-generation", each, **settings) for each in (llm.model, llm.reading_model(1)))
    kept = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    chat = [{"role": "user", "content": QUESTION}]
    for given in (DOCUMENT, chat, [DOCUMENT, QUESTION]):
        assert reading(given, **kept) == plain(given, **kept)
    states = part(entering(llm, chunk_size=128), DOCUMENT, 1).states[None]
    mask = torch.ones(states.shape[:2], dtype=torch.bool)
    changed = {"entry_states": states.flip(1), "entry_mask": mask}
    assert reading(DOCUMENT, **kept, entry_states=states, entry_mask=mask) == plain(DOCUMENT, **kept)
    assert reading(DOCUMENT, **kept, **changed) != plain(DOCUMENT, **kept)
    assert told == []  # as of a model whose class is none that a pipeline knows
    assert type(llm.reading_model(1)).__qualname__ == f"Reading{type(llm.model).__name__}"


def test_a_reading_model_is_saved_as_the_llm(llm, tmp_path):
    from transformers import AutoModelForCausalLM

    llm.reading_model(1).save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.config.architectures == [type(llm.model).__name__]
    ids = torch.tensor([llm.encode(DOCUMENT).tolist()])
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, llm.model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_reads_the_same(family):
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    llm, usual = LLM(model, tiny_tokenizer()), tiny_llm(family)
    prompts = [prompt_of(each, part(entering(each, 2), DOCUMENT, 2), QUESTION) for each in (llm, usual)]
    assert llm.reading_model(2).config._attn_implementation == "eager"
    assert usual.reading_model(2).config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")
    torch.testing.assert_close(logits_of(llm, prompts[:1]), logits_of(usual, prompts[1:]), atol=1e-3, rtol=0)
    short = prompt_of(llm, "See: ", part(entering(llm, 2), "a b c", 2))
    assert llm.generate([*prompts[:1], short], DRAWN)[:1] == usual.generate(prompts[1:], DRAWN)


def test_beams_and_several_answers_are_those_of_the_text(llm):
    text = [*llm.encode(DOCUMENT), *llm.encode(QUESTION)]
    model, inputs = llm.batch_inputs(
        [prompt_of(llm, part(shared_embedder(llm, 1, chunk_size=128), DOCUMENT, 1), QUESTION)]
    )
    settings = {"max_new_tokens": 6, "num_beams": 4, "num_return_sequences": 3, "do_sample": False, "pad_token_id": 0}
    made = model.generate(**inputs, **settings)
    plain = llm.model.generate(torch.tensor([text]), attention_mask=inputs["attention_mask"], **settings)
    assert made.shape[0] == 3
    assert torch.equal(made, plain)


def test_a_penalty_counts_the_answer_and_no_anchor(llm):
    document = part(shared_embedder(llm, 1), DOCUMENT, 2)
    prompt = prompt_of(llm, document, QUESTION)
    (first,) = llm.generate([prompt], Sampling(max_new_tokens=1))[0].token_ids
    anchors = document.anchors.copy()
    anchors[-1] = first  # the likeliest token is an anchor
    changed = prompt_of(llm, replace(document, anchors=anchors), QUESTION)
    (likeliest,) = llm.generate([changed], Sampling(max_new_tokens=1))[0].token_ids
    penalised = Sampling(max_new_tokens=12, repetition_penalty=100.0)
    made = llm.generate([changed], penalised)[0].token_ids
    assert made[0] == likeliest
    assert len(set(made)) == len(made)
    assert "anchors" in (Sampling.__doc__ or "")


def test_hidden_states_are_counted_as_in_the_llm(llm):
    prompt = prompt_of(llm, part(shared_embedder(llm, 1, chunk_size=128), DOCUMENT, 1), QUESTION)
    model = llm.reading_model(1)
    with torch.no_grad():
        made = model(
            prompt.ids[None], entry_states=prompt.states[None], entry_mask=prompt.mask[None], output_hidden_states=True
        ).hidden_states
        plain = copy.deepcopy(llm.model)(prompt.ids[None], output_hidden_states=True).hidden_states
    assert len(made) == len(plain) == 4
    for own, theirs in zip(made, plain, strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-3, rtol=0)


def test_gradient_reaches_the_states(llm):
    found = part(entering(llm), DOCUMENT, 4)
    states = found.states.clone().requires_grad_()
    prompt = prompt_of(llm, replace(found, states=states), QUESTION)
    llm.hidden_of([prompt])[0, -1].sum().backward()
    assert (states.grad.norm(dim=-1) > 0).all()


# -- the LLM stays as it is ---------------------------------------------------------------------------------------


def everything_about(model):
    """All that must not change: tensors and their memory, flags, modules with their classes, hooks and attributes."""
    return (
        {n: (p.clone(), p.data_ptr(), p.dtype, p.requires_grad, p.grad is None, type(p), id(p))
         for n, p in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]},
        {n: (id(m), type(m), m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks),
             sorted(m.__dict__), sorted(m._modules)) for n, m in model.named_modules()},
        model.config.to_dict(),
    )  # fmt: skip


def assert_unchanged(before, model):
    after = everything_about(model)
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for name, (tensor, *rest) in before[0].items():
        assert torch.equal(tensor, after[0][name][0]), name
        assert rest == list(after[0][name][1:]), name


def step(parameters):
    """A step of an optimiser that would be seen in whatever it is allowed to change."""
    torch.optim.AdamW(list(parameters), lr=0.5, weight_decay=0.5).step()


@pytest.mark.parametrize(
    ("family", "adaptation", "entry_layer"),
    [
        *(("llama", *how) for how in (("lora", 0), ("full", 0), ("none", 1), ("lora", 1), ("full", 1))),
        *((family, *how) for family in ("gemma3", "gpt_neox") for how in (("full", 0), ("lora", 1))),
    ],
)
def test_nothing_that_is_done_reaches_the_llm(family, adaptation, entry_layer, tmp_path):
    llm = LLM(tiny_model(family), tiny_tokenizer(), name="own")
    before = everything_about(llm.model)
    embedder = ExtensibleEmbedder.from_llm(
        llm, entry_layer=entry_layer, num_layers=1, adaptation=adaptation, chunk_size=16, ratios=(2, 4)
    )
    prompt = prompt_of(llm, part(embedder, DOCUMENT, 4), QUESTION)
    llm.generate([prompt, [5, 6]], GREEDY)
    list(llm.stream(prompt, GREEDY))
    llm.score(prompt, [7, 8])
    embedder.save_pretrained(tmp_path)
    ExtensibleEmbedder.from_pretrained(tmp_path, llm=llm)
    assert_unchanged(before, llm.model)

    own = {name: tensor.clone() for name, tensor in embedder.trainable_state_dict().items()}
    embedder.requires_grad_(True).train()
    outputs = embedder(prompt_ids := torch.arange(3, 19)[None])
    assert_unchanged(before, llm.model)
    if adaptation != "none":
        embedder.pool(outputs, 0, 16, 2).states.sum().backward() if entry_layer else outputs.hidden.sum().backward()
    step(embedder.parameters())
    assert_unchanged(before, llm.model)
    changed = {name for name, tensor in embedder.trainable_state_dict().items() if not torch.equal(tensor, own[name])}
    assert bool(changed) == (adaptation != "none")
    assert changed <= set(embedder.trainable_names)

    embedder.stack.requires_grad_(True)
    for parameter in embedder.parameters():
        parameter.requires_grad = True
    embedder(prompt_ids).hidden.sum().backward() if adaptation != "none" else None
    step(embedder.parameters())
    embedder.stack.half()
    embedder.stack.to(torch.float64)
    assert_unchanged(before, llm.model)

    if entry_layer:
        model = llm.reading_model(entry_layer)
        assert llm.reading_model(entry_layer) is model
        model.requires_grad_(True).train()
        model(prompt_ids).logits.sum()
        for parameter in model.parameters():
            parameter.requires_grad = True
            parameter.grad = torch.ones_like(parameter)  # not even then is there anything to train
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model.zero_grad()
        step(model.parameters())
        model.half()
        model.to(torch.bfloat16)
        assert_unchanged(before, llm.model)
    del embedder
    gc.collect()
    assert_unchanged(before, llm.model)


def test_a_reading_model_shares_every_tensor_and_no_module(llm):
    model = llm.reading_model(1)
    theirs = {parameter.data_ptr() for parameter in llm.model.parameters()}
    assert {parameter.data_ptr() for parameter in model.parameters()} == theirs
    assert all(type(parameter) is SharedParameter for parameter in model.parameters())
    assert not {id(m) for m in model.modules()} & {id(m) for m in llm.model.modules()}
    assert isinstance(model, type(llm.model))
    tied = tiny_llm("qwen3").reading_model(1)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def test_an_llm_that_was_moved_is_read_where_it_is_now():
    llm = LLM(tiny_model("llama"), tiny_tokenizer(), name="own")
    before = llm.reading_model(1)
    document = part(entering(llm), DOCUMENT, 4)
    llm.model.to(torch.bfloat16)
    assert llm.reading_model(1) is not before
    assert llm.reading_model(1) is llm.reading_model(1)
    assert llm.reading_model(1).dtype is torch.bfloat16
    assert {p.data_ptr() for p in llm.reading_model(1).parameters()} == {p.data_ptr() for p in llm.model.parameters()}
    assert llm.generate([prompt_of(llm, document, QUESTION)], GREEDY)[0].token_ids


def test_adapters_of_a_reading_model_are_trained_and_its_base_is_not():
    from extemb_core.models.reader_lora import add_reader

    base = LLM(tiny_model("llama"), tiny_tokenizer(), name="base")
    before = everything_about(base.model)
    prompt = prompt_of(base, part(entering(base), DOCUMENT, 2), QUESTION)
    llm = LLM(reading_model(base.model, 1), base.tokenizer, name="reader")
    assert llm.reading_model(1) is llm.model
    add_reader(llm, 2, first_layer=1)
    llm.model.requires_grad_(True)
    trained = {name: p for name, p in llm.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    kept = {name: p.detach().clone() for name, p in trained.items()}
    logits = llm.logits(llm.hidden_of([prompt]))
    torch.testing.assert_close(logits.detach(), logits_of(base, [prompt]), atol=1e-4, rtol=0)
    logits.sum().backward()
    step(llm.model.parameters())
    assert all(not torch.equal(p, kept[name]) for name, p in trained.items())
    assert_unchanged(before, base.model)
    assert (logits_of(llm, [prompt]) - logits.detach()).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="reads compressed text at layer 1 already"):
        llm.reading_model(2)


def test_a_copy_of_shared_parameters_is_a_copy_and_may_be_trained(llm):
    copied = copy.deepcopy(llm.reading_model(1))
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in llm.model.parameters()}
    assert all(type(p) is nn.Parameter for p in copied.parameters())
    assert all(p.requires_grad for p in copied.requires_grad_(True).parameters())
    full = ExtensibleEmbedder.from_llm(
        LLM(reading_model(llm.model, 1), llm.tokenizer), entry_layer=1, adaptation="full", chunk_size=16, ratios=(1, 2)
    )
    assert all(p.requires_grad for p in full.stack.layers.parameters())


# -- precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi", "gpt_neox"])
def test_half_precision_is_near_the_whole_one(family, dtype):
    exact = tiny_llm(family)
    llm = LLM(tiny_model(family).to(dtype), tiny_tokenizer(), name="half")
    embedder = entering(llm)
    made = embedder.compress(DOCUMENT, ratio=2)
    assert made.embeddings.dtype is torch.float32
    assert all(torch.isfinite(each).all() for each in (made.embeddings, made.norms, made.mean_norms, made.weights))
    theirs = entering(exact).compress(DOCUMENT, ratio=2)
    assert (made.embeddings - theirs.embeddings).norm() / theirs.embeddings.norm() < 0.05
    logits = logits_of(llm, [prompt_of(llm, made.part, QUESTION)]).float()
    assert torch.isfinite(logits).all()
    reference = logits_of(exact, [prompt_of(exact, theirs.part, QUESTION)])
    assert (logits - reference).norm() / reference.norm() < 0.25
    assert len(llm.generate([prompt_of(llm, made.part, QUESTION)], GREEDY)[0].token_ids) > 0


def test_states_beyond_float16_become_its_largest_value():
    llm = LLM(tiny_model("llama").to(torch.float16), tiny_tokenizer(), name="half")
    found = part(entering(llm), DOCUMENT, 4)
    huge = replace(found, states=found.states * 1e6)
    assert huge.states.abs().max() > torch.finfo(torch.float16).max
    prompt = prompt_of(llm, huge, QUESTION)
    assert prompt.states.dtype is torch.float16
    assert torch.isfinite(prompt.states).all()
    assert torch.isfinite(logits_of(llm, [prompt])).all()
    assert clamp_to_dtype(torch.tensor([1e6, -1e6, 3.0]), torch.float16).tolist() == [65504, -65504, 3]
    assert clamp_to_dtype(torch.tensor([1e6]), torch.float32).tolist() == [1e6]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_states_that_are_not_finite_are_an_error(value):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = value
    embedder = entering(LLM(model, tiny_tokenizer(), name="broken"))
    ids = tiny_llm().encode(DOCUMENT)
    assert torch.isfinite(embedder.compress_ids([ids])[0].embeddings).all()
    ids = ids.copy()
    ids[5] = 7
    with pytest.raises(MismatchError, match="layer 1 of broken gives states that are not finite in torch.float32"):
        embedder.compress_ids([ids[:3], ids])


# -- threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_threads_that_compress_and_read_get_what_one_alone_gets(family):
    llm = LLM(tiny_model(family), tiny_tokenizer(), name="own")  # whose reading model is not made yet
    alone = tiny_llm(family)
    texts = [DOCUMENT, SENTENCES[150:330]]
    made = [part(entering(alone), text, 4) for text in texts]
    expected = [alone.generate([prompt_of(alone, own, QUESTION)], GREEDY)[0] for own in made]
    failures = []
    start = threading.Barrier(4)

    def work(check):
        try:
            start.wait()
            for _ in range(6):
                check()
        except BaseException as error:
            failures.append(error)

    def compress():
        for text, own in zip(texts, made, strict=True):
            assert torch.equal(part(entering(llm), text, 4).states, own.states)

    def read(at):
        prompt = prompt_of(llm, made[at], QUESTION)
        assert llm.generate([prompt], GREEDY)[0] == expected[at]
        assert "".join(llm.stream(prompt, GREEDY)) == expected[at].text

    checks = [compress, compress, lambda: read(0), lambda: read(1)]
    threads = [threading.Thread(target=work, args=(check,)) for check in checks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# -- what cannot be read in this way ------------------------------------------------------------------------------


def refused(model, match, layer=1):
    with pytest.raises(ConfigError, match=match):
        entering(LLM(model, tiny_tokenizer(), name="other"), layer)


def test_a_layout_without_plain_layers_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=2)
    )
    refused(model, "other: a gpt2 model has no decoder of plain layers and a final norm; use a Llama-")
    with pytest.raises(ConfigError, match="a gpt2 model has no decoder"):
        reading_model(model, 1, "other")


def test_an_llm_that_is_not_whole_and_here_is_refused():
    spread = tiny_model("llama")
    spread.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    refused(spread, "other is spread over 0, cpu, and its layers are shared")
    refused(tiny_model("llama").to("meta"), "other is spread over devices")
    one_place = tiny_model("llama")
    one_place.hf_device_map = {"": "cpu"}
    assert len(entering(LLM(one_place, tiny_tokenizer())).compress("a b c", ratio=2)) > 0


def test_a_quantised_llm_is_refused():
    class Packed(nn.Parameter):
        pass

    flagged = tiny_model("llama")
    flagged.is_quantized = True
    refused(flagged, "other is quantised, and the embedder shares its tensors as they are; load it in float32")
    packed = tiny_model("llama").eval()
    linear = packed.model.layers[0].mlp.up_proj
    linear.weight = Packed(linear.weight.data, requires_grad=False)
    refused(packed, "other is quantised")


def test_layers_that_take_no_further_arguments_are_refused():
    model = tiny_model("llama")

    class Narrow(type(model.model.layers[2])):
        def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
                    position_embeddings=None, cache=None):  # fmt: skip
            return super().forward(hidden_states, attention_mask, position_ids, past_key_values or cache, use_cache,
                                   position_embeddings=position_embeddings)  # fmt: skip

    model.model.layers[2].__class__ = Narrow
    refused(model, "other: Narrow.forward takes no further keyword arguments, by which states reach layer 1")


def test_an_llm_that_does_more_than_run_its_layers_is_refused():
    """Such as one that norms its embeddings with the final norm, or hands each layer something of its own."""
    twice = tiny_model("llama")

    class NormedFirst(type(twice.model)):
        def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
            embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            return super().forward(inputs_embeds=self.norm(embedded), **kwargs)

    twice.model.__class__ = NormedFirst
    refused(twice, "give other states by themselves than within it, so that entry_layer=1 would not be exact")
    counted = tiny_model("llama")

    class CountsLayers(type(counted.model)):
        def forward(self, *args, **kwargs):
            if len(self.layers) != 3:
                raise RuntimeError("3 layers are expected\nhere")
            return super().forward(*args, **kwargs)

    counted.model.__class__ = CountsLayers
    refused(counted, r"first 1 layers of other do not run by themselves \(3 layers are expected\); use entry_layer=0")


def test_the_bos_of_the_tokenizer_stands_before_a_chunk_and_not_in_it():
    llm = tiny_llm(bos=True)
    assert bos_tokenizer()("a").input_ids[0] == llm.bos_token_id == 0
    with_bos, without = entering(llm).compress(DOCUMENT, ratio=1), entering(tiny_llm()).compress(DOCUMENT, ratio=1)
    assert with_bos.anchors.tolist() == without.anchors.tolist() == llm.encode(DOCUMENT).tolist()
    assert (with_bos.embeddings - without.embeddings).abs().max() > 0.01

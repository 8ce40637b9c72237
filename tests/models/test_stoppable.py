"""A pass that nobody waits for ends at the next layer."""

from __future__ import annotations

import threading

import pytest
from tiny import LONG_PROMPT, tiny_model, tiny_tokenizer

from extemb_core.models.generation import Sampling, StreamedRow
from extemb_core.models.llm import LLM


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("leaving", [1, 2])
def test_a_prompt_that_nobody_waits_for_is_read_no_further(leaving, alike):
    llm = LLM(tiny_model("llama", max_position_embeddings=1024), tiny_tokenizer())
    gone, layers, pieces, start = threading.Event(), [], [], LONG_PROMPT * 8 if alike else ""
    cancelled = (gone, gone if leaving == 2 else threading.Event())
    rows = [
        StreamedRow(llm.encode(start + end).tolist(), Sampling(max_new_tokens=3), pieces.append, of_row)
        for end, of_row in zip(("Rivers", "Copper"), cancelled, strict=True)
    ]
    assert llm.shares_prefix([row.prompt for row in rows]) == alike

    def leave(*_):
        layers.append(1)
        gone.set()

    for layer in llm.model.model.layers:
        layer.register_forward_hook(leave)
    llm.stream_batch(rows)
    assert [row.result.finish_reason for row in rows[:leaving]] == ["cancelled"] * leaving
    assert pieces.count(None) == 2
    if leaving == 2:
        assert len(layers) == 1
    else:
        assert rows[1].result == llm.generate([rows[1].prompt], rows[1].sampling)[0]

"""Blocks with gaps are collected, and what is removed meanwhile stays removed."""

from __future__ import annotations

from functools import partial

from made import compressed

from extemb_core.store.maintenance import keys_in, move


def test_collecting_reads_the_list_of_documents_no_more_often_for_more_blocks(store, monkeypatch):
    reads = []
    for name in ("rows", "items"):
        whole = getattr(store.environment, name)
        monkeypatch.setattr(store.environment, name, lambda *args, whole=whole: reads.append(args[-1]) or whole(*args))
    counts = []
    for n_blocks in (2, 12):
        for at in range(n_blocks):
            store.put(*(compressed((n_blocks, at, n), n_tokens=400) for n in range(3)))
            store.remove([compressed((n_blocks, at, 0)).ref])
        monkeypatch.setattr("extemb_core.store.store._WRITE_BYTES", 1)
        reads.clear()
        assert store.gc() > 0
        counts.append(reads.count("entries"))
        assert store.verify().clean
    assert counts[0] == counts[1]
    assert len(store) == 2 * 14


def test_what_is_removed_while_blocks_are_collected_stays_removed(store):
    texts = [compressed(at, n_tokens=400) for at in range(3)]
    store.put(*texts)
    keys = keys_in(store._blocks, {0})
    store.remove([texts[0].ref])
    store.write(partial(move, store._blocks, keys))
    assert sorted(ref for ref, _ in store.items()) == sorted(text.ref for text in texts[1:])
    assert store.verify().clean

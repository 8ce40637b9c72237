"""Documents whose kind is lost, as earlier versions lost it: told, removed, read again; never another embedder's."""

from __future__ import annotations

import pytest
import torch
from made import FINGERPRINT, compressed

from extemb_core.errors import StoreCorruptError
from extemb_core.store.format import NUMBER
from extemb_core.store.store import EmbeddingStore

OTHER, THIRD = "77" * 16, "99" * 16
ONES = [compressed(at, n_tokens=n_tokens) for at, n_tokens in enumerate((0, 1, 300, 70))]
OTHERS = [compressed(at, fingerprint=OTHER, width=16) for at in range(2)]
THIRDS = [compressed(at, fingerprint=THIRD) for at in range(2)]  # as wide as the first


def lose(store, *numbers):
    """What was left of a first put that did not fit the map: everything but the rows of its kinds."""
    for number in numbers:
        assert store.write(lambda transaction, number=number: transaction.delete(
            NUMBER.pack(number), db=store.environment.database("kinds")))  # fmt: skip


def opened(folder, dtype="float32"):
    return EmbeddingStore.open(folder, dtype=dtype)


@pytest.fixture(params=["lost", "taken by another embedder"])
def hurt(request, tmp_path):
    """The kind of `ONES` is lost; in their block is one of `OTHERS`, which is not."""
    with opened(tmp_path / "s") as store:
        if request.param == "lost":
            store.put(*THIRDS)
            store.put(OTHERS[0], *ONES)
            lose(store, 2)
        else:
            store.put(*ONES, OTHERS[0])
            lose(store, 0, 1)
            store.put(*THIRDS)
            store.put(OTHERS[1])
            store.remove([OTHERS[1].ref], OTHER)
    with opened(tmp_path / "s") as store:
        yield store


def readable(store, *texts):
    for text in texts:
        found = store.finest(text.ref, text.fingerprint)
        assert torch.equal(found.embeddings, text.embeddings)
        assert (found.fingerprint, found.ratio) == (text.fingerprint, text.ratio)


def test_a_document_of_a_lost_kind_is_an_error_and_the_others_are_read(hurt):
    for text in ONES:
        with pytest.raises(StoreCorruptError, match=f"the embedder of {text.ref} are lost; compress any new document"):
            hurt.get(text.ref, FINGERPRINT, 4)
    for look in (hurt.stats, hurt.gc, lambda: list(hurt.items())):
        with pytest.raises(StoreCorruptError, match="are lost"):
            look()
    readable(hurt, OTHERS[0], *THIRDS)


def test_verifying_names_the_documents_of_a_lost_kind_and_nothing_else(hurt):
    found = hurt.verify()
    assert {ref for ref, _, _ in found.damaged} == {text.ref for text in ONES}
    assert all(name == "?" and "are lost" in reason for _, name, reason in found.damaged)
    assert found.n_documents == 3
    assert found.problems == ()


def test_a_document_of_a_lost_kind_can_be_removed_and_put_again(hurt):
    assert hurt.remove([ONES[2].ref]) == 1
    assert hurt.verify().problems == ()
    assert hurt.remove([text.ref for text in ONES], FINGERPRINT) == 3
    assert hurt.verify().clean
    readable(hurt, OTHERS[0])
    hurt.gc()
    assert hurt.stats().live_bytes == hurt.stats().block_bytes
    hurt.put(*ONES)
    readable(hurt, *ONES, OTHERS[0], *THIRDS)
    assert hurt.verify().clean


@pytest.mark.parametrize(
    "text",
    [ONES[2], ONES[2].at_ratio(8), compressed(2, n_tokens=300, ratio=2), compressed("new")],
    ids=["the same", "coarser", "finer", "another"],
)
def test_a_put_of_its_embedder_makes_everything_of_a_lost_kind_readable(hurt, text):
    hurt.put(text)
    rest = [one for one in ONES if one.ref != text.ref]
    readable(hurt, text if text.ratio != 8 else ONES[2], *rest, OTHERS[0], *THIRDS)
    assert hurt.verify().clean
    assert len(list(hurt.items())) == hurt.stats().n_documents
    hurt.remove([ONES[3].ref])
    hurt.gc()
    assert hurt.verify().clean
    readable(hurt, *(one for one in rest if one.ref != ONES[3].ref), OTHERS[0], *THIRDS)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_block_of_a_lost_kind_goes_with_its_last_document(tmp_path, dtype):
    with opened(tmp_path / "s", dtype) as store:
        store.put(*ONES)
        lose(store, 0)
        assert store.remove([text.ref for text in ONES]) == len(ONES)
        assert store.stats().block_bytes == 0
        assert store.verify().clean


def test_a_document_that_is_damaged_besides_takes_no_others_with_it(tmp_path):
    with opened(tmp_path / "s") as store:
        store.put(*ONES, OTHERS[0])
        lose(store, 0)
    data = tmp_path / "s" / "data.mdb"
    content = bytearray(data.read_bytes())
    content[content.index(ONES[2].embeddings.numpy().tobytes()) + 100] ^= 4
    data.write_bytes(content)
    with opened(tmp_path / "s") as store:
        store.remove([text.ref for text in ONES], FINGERPRINT)
        readable(store, OTHERS[0])
        assert store.verify().damaged == ()

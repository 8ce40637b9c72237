"""The FAISS index: exact where it is flat, near enough where it is not, and never a damaged file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from extemb_core.errors import ConfigError
from extemb_core.library.vector_index import VectorIndex, choose_factory

pytest.importorskip("faiss")


def unit(count, width=16, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nearest(vectors, query, k):
    return np.argsort(-(vectors @ query), kind="stable")[:k].tolist()


@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF8,PQ8x4"])
def test_what_is_near_is_found(factory):
    vectors = unit(600)
    index = VectorIndex(16, factory)
    index.add(range(1000, 1600), vectors)
    hits = 0
    for query in unit(20, seed=1):
        found = index.search(query, 10)
        assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
        hits += len({number - 1000 for number, _ in found} & set(nearest(vectors, query, 10)))
    assert hits >= {"Flat": 200, "HNSW32": 195, "IVF8,PQ8x4": 80}[factory]


@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "SQ8", "IVF2,Flat", "PCA8,HNSW16"])
def test_what_is_removed_is_not_found(factory, tmp_path):
    vectors = unit(50)
    index = VectorIndex(16, factory)
    index.add(range(50), vectors)
    index.remove([3, 4, 999])
    assert index.ids == set(range(50)) - {3, 4}
    found = {number for number, _ in index.search(vectors[3], 50)}
    if "PCA" in factory:  # is not exact
        assert found <= index.ids
    else:
        assert found == index.ids
        assert [index.search(vectors[at], 1)[0][0] for at in (0, 2, 5, 49)] == [0, 2, 5, 49]
    assert [len(index.search(vectors[3], k)) for k in (1, 5)] == [1, 5]  # whose nearest were removed
    index.save(tmp_path / "a.faiss", encoder="e")
    loaded = VectorIndex.load(tmp_path / "a.faiss", 16, encoder="e")
    assert loaded.ids == index.ids
    assert loaded.search(vectors[3], 50) == index.search(vectors[3], 50)
    index.remove(range(10, 30))
    assert index.should_be_made_anew() == (factory != "Flat")


def test_an_index_that_outgrew_its_kind_is_made_anew(monkeypatch):
    monkeypatch.setattr("extemb_core.library.vector_index._FLAT_UP_TO", 10)
    assert choose_factory(10) == "Flat"
    assert choose_factory(11) == "HNSW32"
    assert choose_factory(10_000_000).startswith("IVF8192,PQ")
    index = VectorIndex(16)
    index.add(range(11), unit(11))
    assert index.should_be_made_anew()
    chosen = VectorIndex(16, "Flat", "Flat")
    chosen.add(range(11), unit(11))
    assert not chosen.should_be_made_anew()


def test_an_empty_index_finds_nothing():
    assert VectorIndex(16).search(unit(1)[0], 5) == []


def test_a_file_that_is_not_whole_or_of_something_else_is_not_read(tmp_path):
    index = VectorIndex(16)
    index.add(range(30), unit(30))
    file = tmp_path / "a.faiss"
    index.save(file, encoder="e")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.faiss", "a.json"]
    assert VectorIndex.load(file, 16, encoder="other") is None
    assert VectorIndex.load(file, 8, encoder="e") is None
    assert VectorIndex.load(file, 16, "HNSW32", encoder="e") is None
    assert VectorIndex.load(tmp_path / "none.faiss", 16, encoder="e") is None
    content = file.read_bytes()
    file.write_bytes(content[:-7] + b"1234567")
    assert VectorIndex.load(file, 16, encoder="e") is None
    file.write_bytes(content)
    assert VectorIndex.load(file, 16, encoder="e").ids == set(range(30))
    (tmp_path / "a.json").write_text(json.dumps(["nothing"]))
    assert VectorIndex.load(file, 16, encoder="e") is None


@pytest.mark.parametrize("factory", ["IVF64,Flat", "PQ4x6", "NSG16,Flat"])
def test_vectors_that_are_too_few_to_train_an_index_are_found_in_a_flat_one(factory):
    vectors = unit(400)
    index = VectorIndex(16, factory, factory)
    index.add(range(20), vectors[:20])
    assert [index.search(vectors[at], 1)[0][0] for at in range(20)] == list(range(20))
    assert not index.should_be_made_anew()
    index.add(range(20, 400), vectors[20:])
    assert index.should_be_made_anew()
    index = VectorIndex(16, factory, factory)
    index.add(range(400), vectors)
    assert index.factory == factory
    assert not index.should_be_made_anew()


@pytest.mark.parametrize("factory", ["SQ8", "IVF4,Flat", "IVF4,SQ8"])
def test_an_index_that_outgrew_its_training_is_made_anew(factory, tmp_path):
    vectors = unit(1000)
    index = VectorIndex(16, factory, factory)
    index.add(range(200), vectors[:200])
    index.add(range(200, 799), vectors[200:799])
    index.save(tmp_path / "a.faiss")
    loaded = VectorIndex.load(tmp_path / "a.faiss", 16, factory)
    for one in (index, loaded):
        assert not one.should_be_made_anew()
        one.add([799], vectors[799:800])
        assert one.should_be_made_anew()
    whole = VectorIndex(16, factory, factory)
    whole.add(range(1000), vectors)
    assert not whole.should_be_made_anew()
    graph = VectorIndex(16, "HNSW8", "HNSW8")
    for at in range(0, 1000, 10):
        graph.add(range(at, at + 10), vectors[at : at + 10])
    assert not graph.should_be_made_anew()  # nothing in it is trained


def test_an_index_that_takes_nothing_more():
    index = VectorIndex(16, "NSG16,Flat")
    index.add(range(300), unit(300))
    with pytest.raises(ConfigError, match="index='NSG16,Flat' takes no more vectors"):
        index.add(range(300, 600), unit(300))


def test_an_index_that_faiss_does_not_know():
    with pytest.raises(ConfigError, match="index='Tree' is not an index that FAISS builds"):
        VectorIndex(16, "Tree")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
@pytest.mark.parametrize("suffix", [".faiss", ".json"])
def test_a_file_without_end_is_none(tmp_path, suffix):
    index = VectorIndex(16)
    index.add(range(5), unit(5))
    index.save(tmp_path / "a.faiss")
    assert VectorIndex.load(tmp_path / "a.faiss", 16) is not None
    (tmp_path / f"a{suffix}").unlink()
    (tmp_path / f"a{suffix}").symlink_to("/dev/zero")
    assert VectorIndex.load(tmp_path / "a.faiss", 16) is None

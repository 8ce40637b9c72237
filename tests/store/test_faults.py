"""Faults with real processes: killed at random moments, a full disk, several writers, many readers.

The soak tests kill more often, EXTEMB_SOAK times: `make soak`.
"""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from made import FINGERPRINT, anchored, compressed

from extemb_core.errors import StoreError
from extemb_core.library.vector_index import VectorIndex
from extemb_core.models.compressed import Compressed
from extemb_core.store.format import decode, encode
from extemb_core.store.store import EmbeddingStore
from extemb_core.store.transfer import export_store, import_shards

resource = pytest.importorskip("resource")
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
KILLS = [4, pytest.param(int(os.environ.get("EXTEMB_SOAK", "12")), marks=pytest.mark.soak, id="soak")]
TEXTS = [(anchored if at % 2 else compressed)(at, n_tokens=at % 90 + 1) for at in range(400)]


def as_read(text: Compressed) -> torch.Tensor:
    data, kept = encode(text, "float16")
    return decode(data, *text.embeddings.shape, kept, anchored=text.entry_layer > 0)["embeddings"]


READ = list(map(as_read, TEXTS))


def forked(work: Callable[[Callable[[int], None]], None]) -> tuple[int, int]:
    """Start `work(acknowledge)` in a process of its own; its id and where its acknowledgements can be read."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            # The parent's threads are not here, and the first parallel work would wait for them.
            torch.set_num_threads(1)
            os.close(reader)
            work(lambda number: os.write(writer, number.to_bytes(4, "big")))  # type: ignore[arg-type, return-value]
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    return child, reader


def finished(child: int, reader: int) -> tuple[int, list[int]]:
    """The exit code and what was acknowledged."""
    data = b""
    while piece := os.read(reader, 65536):
        data += piece
    os.close(reader)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, [int.from_bytes(data[at : at + 4], "big") for at in range(0, len(data) - len(data) % 4, 4)]


def killed(work: Callable[[Callable[[int], None]], None], acknowledged: int, after: float) -> list[int]:
    """Kill it so many seconds after so many acknowledgements, and return all of them."""
    child, reader = forked(work)
    numbers = [int.from_bytes(os.read(reader, 4), "big") for _ in range(acknowledged)]
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return numbers + finished(child, reader)[1]


@pytest.mark.parametrize("kills", KILLS)
def test_killed_while_writing_nothing_acknowledged_is_lost(tmp_path: Path, kills: int) -> None:
    draw = random.Random(1)
    kept: set[int] = set()
    for _ in range(kills):

        def work(acknowledge: Callable[[int], None], seed: int = draw.randrange(2**30)) -> None:
            own = random.Random(seed)
            with EmbeddingStore.open(tmp_path / "s") as store:
                while True:
                    some = own.sample(range(400), 5)
                    store.put(*(TEXTS[at] for at in some))
                    for at in some:
                        acknowledge(at)
                    if own.random() < 0.2:
                        gone = own.randrange(400)
                        acknowledge(1000 + gone)  # from now on it may be there or not
                        store.remove([TEXTS[gone].ref])
                    if own.random() < 0.1:
                        store.gc()

        for number in killed(work, draw.randrange(60), draw.uniform(0.0, 0.05)):
            if number < 1000:
                kept.add(number)
            else:
                kept.discard(number - 1000)
        if not (tmp_path / "s").exists():
            continue
        with EmbeddingStore.open(tmp_path / "s") as store:
            assert store.verify().clean
            for at in kept:
                found = store.get(TEXTS[at].ref, FINGERPRINT, 4)
                assert found is not None
                assert torch.equal(found.embeddings, READ[at])
    assert len(kept) > 20


@pytest.mark.parametrize("kills", KILLS)
def test_killed_while_exporting_the_next_export_is_whole(tmp_path: Path, kills: int) -> None:
    draw = random.Random(2)
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(*TEXTS[:200])
    for at in range(kills):
        out = tmp_path / f"out-{at}"

        def work(acknowledge: Callable[[int], None], out: Path = out) -> None:
            with EmbeddingStore.open(tmp_path / "s", "r") as store:
                acknowledge(0)
                export_store(store, out, shard_bytes=4000)

        killed(work, 1, draw.uniform(0.0, 0.15))
        with EmbeddingStore.open(tmp_path / "s", "r") as store, EmbeddingStore.open(tmp_path / f"copy-{at}") as copy:
            if (out / "manifest.json").exists():  # it was quicker
                assert import_shards(copy, out) == 200
                continue
            with pytest.raises(StoreError):
                import_shards(copy, out)
            export_store(store, out, shard_bytes=200_000)
            assert import_shards(copy, out) == 200
            assert copy.verify().n_documents == 200


@pytest.mark.parametrize("kills", KILLS)
def test_killed_while_saving_an_index_what_is_read_is_whole_or_nothing(tmp_path: Path, kills: int) -> None:
    pytest.importorskip("faiss")
    draw = random.Random(4)
    vectors = np.random.default_rng(0).standard_normal((3000, 64)).astype(np.float32)
    indices = []
    for count in (2000, 3000):
        index = VectorIndex(64)
        index.add(range(count), vectors[:count])
        indices.append(index)
    file = tmp_path / "passages.faiss"
    found = []
    for at in range(kills):

        def work(acknowledge: Callable[[int], None]) -> None:
            while True:
                for index in indices:
                    index.save(file, encoder="e")
                    acknowledge(0)

        # The first time perhaps before anything is there, the second likely before anything is written anew.
        killed(work, min(at, 3), 0.0 if at == 1 else draw.uniform(0.0, 0.05))
        loaded = VectorIndex.load(file, 64, encoder="e")
        if loaded is not None:
            same = next(index for index in indices if index.ids == loaded.ids)
            assert loaded.search(vectors[7], 5) == same.search(vectors[7], 5)
        found.append(loaded)
        indices[0].save(file, encoder="e")
        again = VectorIndex.load(file, 64, encoder="e")
        assert again is not None
        assert len(again.ids) == 2000
    assert any(loaded is not None for loaded in found)


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(*TEXTS[:50])
        size = store.stats().file_bytes

    def work(acknowledge: Callable[[int], None]) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 300_000, size + 300_000))
        with EmbeddingStore.open(tmp_path / "s") as store:

            def fill() -> None:
                for at in range(50, 400):
                    store.put(*(compressed((at, i), n_tokens=2000, chunk_size=2000) for i in range(4)))
                    acknowledge(at)

            with pytest.raises(StoreError, match="could not be written to"):
                fill()
            assert store.verify().clean
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
            with pytest.raises(StoreError, match="could not be written"):
                export_store(store, tmp_path / "out")
            assert {file.suffix for file in (tmp_path / "out").iterdir()} <= {".safetensors"}  # whole ones, no manifest

    code, numbers = finished(*forked(work))
    assert code == 0
    assert numbers
    with EmbeddingStore.open(tmp_path / "s") as store:
        assert store.verify().clean
        assert len(store) == 50 + 4 * len(numbers)
        store.put(*TEXTS)  # with room again


def test_writers_and_readers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extemb_core.store.lmdb_env._FIRST_MAP_BYTES", 2**20)
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(TEXTS[0])

    large = [compressed(f"large {at}", n_tokens=40_000, chunk_size=40_000) for at in range(60)]

    def write(numbers: range) -> Callable[[Callable[[int], None]], None]:
        def work(acknowledge: Callable[[int], None]) -> None:
            with EmbeddingStore.open(tmp_path / "s") as store:
                for at in numbers:
                    store.put(TEXTS[at], large[at])
                    acknowledge(at)

        return work

    def read(acknowledge: Callable[[int], None]) -> None:
        last = 0
        with EmbeddingStore.open(tmp_path / "s", "r") as store:
            while last < 60:
                for at in range(60):
                    found = store.get(TEXTS[at].ref, FINGERPRINT, 4)
                    assert found is None or torch.equal(found.embeddings, READ[at])
                assert len(store) >= last
                last = (len(store) + 1) // 2

    readers = [forked(read) for _ in range(4)]
    writers = [forked(write(range(start, 60, 2))) for start in (0, 1)]
    codes = [finished(*process)[0] for process in writers]
    if any(codes):  # or the readers would wait for ever
        for child, _ in readers:
            os.kill(child, signal.SIGKILL)
    assert codes + [finished(*process)[0] for process in readers] == [0] * 6
    with EmbeddingStore.open(tmp_path / "s", "r") as store:
        assert len(store) == 120
        assert store.stats().file_bytes > 16 * 2**20  # the map grew while they read
        assert store.verify().clean

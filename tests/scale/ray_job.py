"""Run by `test_corpus.py` in a process of its own: a corpus compressed on a cluster of two nodes, a worker killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from extemb_core.errors import ExtembError
from extemb_core.scale import corpus
from extemb_core.scale.worker import CompressWorker


class Dying(CompressWorker):
    """The first batch of all that comes to its end kills its process between the shard and the receipt."""

    def __init__(self, output, **settings):
        super().__init__(output, **settings)
        self._folder = Path(output).parent

    def __call__(self, rows):
        (self._folder / f"node-{ray.get_runtime_context().get_node_id()}").touch()
        return super().__call__(rows)

    def _write(self, name, texts):
        try:
            (self._folder / "killed").touch(exist_ok=False)
        except FileExistsError:
            return super()._write(name, texts)
        self._location.write(f"{name}.safetensors", lambda file: file.write_bytes(b"half"))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


def compress(inputs: Path, output: Path, folder: Path, **settings: object) -> dict:
    models = {"llm": folder / "llm", "embedder": folder / "embedder"}
    try:
        done = corpus.compress_corpus(inputs, output, **(models | settings), ray_address="auto")
    except ExtembError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return asdict(done.batch) | {"shards": len(done.shards)}


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    found = {"nodes": sum(node["Alive"] for node in ray.nodes())}
    corpus.CompressWorker = Dying
    found["killed"] = compress(folder / "rows.jsonl", folder / "out", folder, ratio=2, rows_per_batch=8, workers=2)
    found["used"] = len(list(folder.glob("node-*")))
    found["left"] = dict(Counter(file.suffix for file in (folder / "out").iterdir()))
    corpus.CompressWorker = CompressWorker
    found["again"] = compress(folder / "more", folder / "out", folder, ratio=2, rows_per_batch=8)
    found["column"] = compress(folder / "rows.jsonl", folder / "other", folder, column="body")
    found["dtype"] = compress(folder / "rows.jsonl", folder / "other", folder, llm_dtype="float8")
    found["device"] = compress(folder / "rows.jsonl", folder / "other", folder, device="tpu")
    ray.shutdown()
    cluster.shutdown()
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

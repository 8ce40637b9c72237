"""Count the word n-grams that held-out files share with training files: is what is measured in the training data?

    python benchmarks/overlap.py --train train_text.jsonl.zst train_qa.jsonl.zst --held-out dev_squad.jsonl.zst ... \
        --json benchmarks/results/overlap.json

For every held-out row: how many of its n-grams (lower-case words, 13 at a time) occur anywhere in the training files.
Fields "text" and "context" are compared. N-grams are compared by 64-bit hashes.
"""

from __future__ import annotations

import argparse
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from extemb_core.utils.jsonl import read_jsonl
from extemb_core.utils.progress import progress

_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def hashes(text: str, n: int) -> np.ndarray[Any, Any]:
    """Return (words - n + 1,) hashes of all n-grams; for a shorter text, one hash of all of it."""
    words = _WORD.findall(text.lower())
    if not words:
        return np.empty(0, dtype=np.uint64)
    n = min(n, len(words))
    single = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    total = np.zeros(len(words) - n + 1, dtype=np.uint64)
    for place in range(n):
        total = (total ^ single[place : place + len(total)]) * _FACTOR
        total ^= total >> np.uint64(29)
    return total


def texts(file: Path) -> Iterator[str]:
    for _, row in read_jsonl(file):
        yield str(row.get("text") or row.get("context") or "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", type=Path, required=True)
    parser.add_argument("--held-out", nargs="+", type=Path, required=True)
    parser.add_argument("--n", type=int, default=13)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    held_out = {file: [hashes(text, args.n) for text in dict.fromkeys(texts(file))] for file in args.held_out}
    wanted = np.unique(np.concatenate([row for rows in held_out.values() for row in rows]))
    seen = np.zeros(len(wanted), dtype=bool)
    with progress("training files", len(args.train)) as advance:
        for file in args.train:
            known = set()
            for text in texts(file):
                key = hash(text)
                if key not in known:  # many questions share one context
                    known.add(key)
                    found = hashes(text, args.n)
                    at = np.searchsorted(wanted, found).clip(max=len(wanted) - 1)
                    seen[at[wanted[at] == found]] = True
            advance(1)
    rows = {}
    for file, documents in held_out.items():
        shares = np.array([seen[np.searchsorted(wanted, row)].mean() for row in documents if len(row)])
        rows[file.name] = {
            "texts": len(shares),
            "mean_share": round(float(shares.mean()), 5),
            "largest_share": round(float(shares.max()), 4),
            "texts_above_10_percent": int((shares > 0.1).sum()),
        }
    record = {"n": args.n, "train": [file.name for file in args.train], "held_out": rows}
    args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

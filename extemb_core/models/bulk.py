"""Many texts or prompts, a batch at a time: no more than a batch is held in memory, or lost with the process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from extemb_core.utils.batches import batches
from extemb_core.utils.progress import progress

if TYPE_CHECKING:
    from extemb_core.models.compressed import Compressed
    from extemb_core.models.embedder import ExtensibleEmbedder
    from extemb_core.models.llm import LLM

Text = tuple[str, "np.ndarray[Any, Any]"]
"""A ref, and (T,) token ids."""

POSITIONS_AT_ONCE = 4096  # of prompts in one pass, padding included: bounds memory, and the padding of unlike lengths

_PASSES = 8  # forward passes of a batch
_CPU_CHUNKS, _MAX_CUDA_CHUNKS = 4, 128
_BYTES_PER_UNIT = 128  # of activations, for each token and unit of the hidden size; generous for a dense layer
_SHARE = 4  # of the free memory, activations take a quarter at most


def default_batch_size(llm: LLM, chunk_size: int) -> int:
    """Choose how many chunks of `chunk_size` tokens go through the layers at once on an LLM's device.

    4 on a CPU, where more is not quicker; on CUDA what a quarter of the free memory holds, 4 to 128.
    """
    if llm.device.type != "cuda":
        return _CPU_CHUNKS
    return max(_CPU_CHUNKS, min(_MAX_CUDA_CHUNKS, _cuda_tokens(llm) // chunk_size))


def positions_at_once(llm: LLM) -> int:
    """Choose how many positions of prompts and answers, padding included, are continued at once on an LLM's device.

    4096 on a CPU; on CUDA what a quarter of the free memory holds, if that is more. A prompt of more is alone.
    """
    return max(POSITIONS_AT_ONCE, _cuda_tokens(llm) if llm.device.type == "cuda" else 0)


def _cuda_tokens(llm: LLM) -> int:
    free, _ = torch.cuda.mem_get_info(llm.device)
    free += torch.cuda.memory_reserved(llm.device) - torch.cuda.memory_allocated(llm.device)  # held for the next pass
    return free // (_SHARE * _BYTES_PER_UNIT * llm.hidden_size)


def compress_in_batches(
    embedder: ExtensibleEmbedder,
    texts: Sequence[Text],
    *,
    ratio: int | None = None,
    batch_size: int | None = None,
    show_progress: bool | None = None,
) -> Iterator[list[Compressed]]:
    """Compress texts in the order given, for the caller to write each batch before the next is made.

    A batch is the tokens of 8 forward passes, and one text at least.

    Args:
        embedder: Compresses.
        texts: The ref and (T,) token ids of each.
        ratio: Tokens per embedding; what the embedder keeps when not given.
        batch_size: Chunks per forward pass; by the device when not given (see `default_batch_size`).
        show_progress: Show a bar over all texts; None shows it on a terminal.

    Raises:
        RatioError: The ratio was not trained.
    """
    chunk_size = embedder.config.chunk_size
    size = default_batch_size(embedder.llm, chunk_size) if batch_size is None else batch_size
    with progress("compress", sum(len(ids) for _, ids in texts), show_progress) as advance:
        for batch in batches(texts, lambda text: len(text[1]), _PASSES * size * chunk_size):
            refs, ids = zip(*batch, strict=True)
            yield embedder.compress_ids(ids, refs=refs, ratio=ratio, batch_size=size, show_progress=advance)

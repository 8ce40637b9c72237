"""Fill the same positions with something else: plain tokens chosen from the text in several ways, or noise.

Each baseline is a pure function of a text or its token ids (T,), or of embeddings, and of the number of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extemb_core.context.scoring import bm25_scores, ranking
from extemb_core.context.spans import split_into_sentences
from extemb_core.errors import ConfigError
from extemb_core.models.kv_prefix import Prefix
from extemb_core.models.llm import LLM
from extemb_core.utils.validation import whole_number

_LOGITS_AT_ONCE = 256  # positions, as logits take much memory

Ids = np.ndarray[Any, Any]


def nearest(ids: Ids, n: int) -> Ids:
    """Return the last `n` tokens, or all if there are fewer. ids: (T,)."""
    whole_number(n, "n", 0)
    return ids[max(0, len(ids) - n) :]


def head(ids: Ids, n: int) -> Ids:
    """Return the first `n` tokens, or all if there are fewer. ids: (T,)."""
    whole_number(n, "n", 0)
    return ids[:n]


def sinks_and_window(ids: Ids, n: int, sinks: int = 4) -> Ids:
    """Keep the tokens that StreamingLLM (Xiao et al., arXiv 2309.17453) keeps: the first and the most recent ones.

    As there, positions are slots of the cache, contiguous also across the gap in the text. This is the variant with
    re-computation: the tokens are read anew within the cache, whereas the states in a running stream's cache still
    carry something of tokens that have left it.

    Args:
        ids: (T,).
        n: Positions of the cache; if all tokens fit, all stay.
        sinks: Number of first tokens that stay; the other n - sinks are the most recent.

    Raises:
        ConfigError: The cache has fewer positions than sinks.
    """
    whole_number(n, "n", 0)
    if len(ids) <= n:
        return ids
    if not 0 <= sinks <= n:
        raise ConfigError(f"sinks={sinks} is not between 0 and the {n} positions of the cache; pass fewer")
    return np.concatenate([ids[:sinks], nearest(ids, n - sinks)])


@torch.no_grad()
def token_information(llm: LLM, ids: Ids, prefix: Sequence[int] | Ids = ()) -> Ids:
    """Measure how unexpected each token is to the LLM: its negative log-likelihood given those before it.

    A text longer than the window is read in windows, each beginning with a BOS if the LLM has one; each token is then
    scored once, given all tokens before it or at least half a window of them.

    Args:
        llm: LLM that predicts them.
        ids: (T,).
        prefix: Tokens before them, which are not scored.

    Returns:
        (T,) float32, in nats. If nothing stands before the first token, not even a BOS, it gets the maximum of the
        others, so that it counts as a surprise.
    """
    bos = [llm.bos_token_id] if llm.bos_token_id is not None else []
    text = np.concatenate([np.asarray(prefix, dtype=np.int64), np.asarray(ids, dtype=np.int64)])
    room = llm.context_window - len(bos)
    information = np.zeros(len(text), dtype=np.float32)
    unpredicted = not bos and not len(prefix)
    done = 1 if unpredicted else len(prefix)
    while done < len(text):
        start = max(0, min(done - room // 2, len(text) - room))  # the last window is a full one
        end = min(start + room, len(text))
        read = np.concatenate([np.array(bos, dtype=np.int64), text[start : end - 1]])
        hidden = llm.hidden(llm.embed(read)[None])[0, -(end - done) :]
        information[done:end] = _negative_log_likelihoods(llm, hidden, text[done:end])
        done = end
    if unpredicted:
        information[:1] = information[1:].max(initial=0)
    return information[len(prefix) :]


def select_tokens(llm: LLM, ids: Ids, n: int, segment: int = 200) -> Ids:
    """Select the `n` most informative tokens of a text, in their order.

    The token-level criterion of LLMLingua (Jiang et al., arXiv 2310.05736, iterative token-level prompt compression),
    with the LLM that reads the result as its small model too: the text is processed in segments, and a token's
    information is measured given what was kept of earlier segments and all of its own segment so far. Each segment
    keeps exactly its share of the budget, while the original keeps what is above a threshold estimated from it; the
    other parts of LLMLingua (choosing among demonstrations, aligning the small model) do not apply here.

    Args:
        llm: Judges the tokens. Of the tokens kept, it sees the most recent that fit its window beside the segment.
        ids: (T,).
        n: Tokens to keep; with n >= T the text is returned unchanged.
        segment: Tokens of a segment.

    Returns:
        (min(n, T),) ids. Of equally informative tokens, the earlier ones are kept.
    """
    whole_number(n, "n", 0)
    whole_number(segment, "segment")
    total = len(ids)
    if n >= total:
        return ids
    room = llm.context_window - int(llm.bos_token_id is not None)
    # While everything kept fits the window, it is read once; otherwise it is read anew with every segment.
    prefix = Prefix(llm) if n + min(segment, total) <= room and llm.reads_in_parts else None
    selected = ids[:0]
    for start in range(0, total, segment):
        part = ids[start : start + segment]
        due = (2 * n * (start + len(part)) + total) // (2 * total)  # the budget so far, rounded: n at the end
        if due == len(selected):
            continue
        if prefix is not None and prefix.last is not None:
            hidden = torch.cat([prefix.last[None], prefix.peek(part)[:-1]])
            information = _negative_log_likelihoods(llm, hidden, part)
        else:
            information = token_information(llm, part, nearest(selected, max(0, room - len(part))))
        chosen = part[np.sort(np.argsort(-information, kind="stable")[: due - len(selected)])]
        selected = np.concatenate([selected, chosen])
        if prefix is not None:
            prefix.read(chosen)
    return selected


def choose_sentences(llm: LLM, text: str, question: str, n: int) -> Ids:
    """Choose the sentences of a text that a question is about, as retrieval would within the same positions.

    Sentences (`split_into_sentences`) are ranked by BM25 against the question, those that share no word with it last,
    and equal ones in their order. They are taken in that order until there are `n` tokens; the last sentence may be
    cut. The result is in the order of the text.

    Args:
        llm: LLM whose tokens are counted.
        text: Text to choose from.
        question: The question about the text.
        n: Number of tokens.

    Returns:
        (min(n, T),) ids, T being the tokens of the text.
    """
    whole_number(n, "n", 0)
    ids, ends = llm.encode_with_ends(text)
    sentences = split_into_sentences(text, ends)
    scores = np.array(bm25_scores(question, sentences.texts))
    taken = np.zeros(len(ids), bool)
    for at in ranking(scores).tolist():
        start, stop = sentences.borders[at : at + 2].tolist()
        taken[start : min(stop, start + n)] = True
        n = max(0, n - (stop - start))
    return ids[taken]


def random_tokens(llm: LLM, n: int, seed: int) -> Ids:
    """Draw `n` token ids uniformly from those that text may become. Returns (n,) int32."""
    ordinary = np.setdiff1d(np.arange(len(llm.tokenizer)), llm.control_ids)
    return np.random.default_rng(seed).choice(ordinary, n).astype(np.int32)


def random_embeddings(like: Tensor, seed: int) -> Tensor:
    """Draw Gaussian vectors with the norms of others, to show what positions without content are worth.

    Args:
        like: (N, D).
        seed: Random seed; the draws are the same on every device.

    Returns:
        (N, D), each row in a random direction and as long as the same row of `like`; on its device, in its dtype.
    """
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    norms = torch.linalg.vector_norm(like.float(), dim=-1, keepdim=True).cpu()
    rows: Tensor = torch.nn.functional.normalize(noise, dim=-1) * norms
    return rows.to(like.device, like.dtype)


def _negative_log_likelihoods(llm: LLM, hidden: Tensor, following: Ids) -> Ids:
    """Score each token after a hidden state. hidden: (S, D), following: (S,) -> (S,)."""
    targets = torch.as_tensor(following, device=hidden.device).long()
    losses = [
        torch.nn.functional.cross_entropy(
            llm.logits(hidden[at : at + _LOGITS_AT_ONCE]).float(), targets[at : at + _LOGITS_AT_ONCE], reduction="none"
        )
        for at in range(0, len(targets), _LOGITS_AT_ONCE)
    ]
    return torch.cat(losses).cpu().numpy()

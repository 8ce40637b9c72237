"""How sentences are ranked by the words of a question, and what the second of them adds."""

from __future__ import annotations

import numpy as np

from extemb_core.context.focus import added_by_second
from extemb_core.context.scoring import bm25_scores, words_added


def test_what_a_second_sentence_adds_tells_one_place_from_several():
    sentences = ["The bridge was closed in 1987.", "The fog came in.", "The bridge closed."]
    assert words_added("The bridge, closed by fog?", sentences, 0, 2) == 0
    assert words_added("The bridge, closed by fog?", sentences, 0, 1) > words_added(
        "The bridge by fog?", sentences, 2, 0
    )
    assert words_added("fog", sentences, 0, 1) == 1
    assert words_added("?", sentences, 0, 1) == 0
    scores = np.array(bm25_scores("bridge closed by fog", sentences))
    assert added_by_second("bridge closed by fog", sentences, scores) == words_added(
        "bridge closed by fog", sentences, *np.argsort(-scores, kind="stable")[:2].tolist()
    )
    assert added_by_second("fog", ["The fog came in."], np.array([1.0])) == 0
    assert added_by_second("fog", sentences, np.array([0.0, 2.0, 0.0])) == 0

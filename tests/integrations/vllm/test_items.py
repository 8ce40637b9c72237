"""What a request may hold for a compressed text; no vLLM is needed to read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SENTENCES, entering, tiny_llm

from extemb_core import EmbeddingStore, ExtensibleLM
from extemb_core.errors import ConfigError, DocumentNotFoundError, MismatchError
from extemb_core.models.export import SERVED
from vllm_extemb.items import ItemReader

DOCUMENT = SENTENCES[:170]
FINGERPRINT = "ab" * 16
GOOD = {"anchors": [5, 6], "states": torch.ones(2, 32)}


def reader(**settings: Any) -> ItemReader:
    given = {"hidden_size": 32, "vocab_size": 400, "control_ids": np.array([0, 1, 2])} | settings
    return ItemReader({"entry_layer": 1, "fingerprint": FINGERPRINT}, **given)


@pytest.mark.parametrize("states", [GOOD["states"], np.ones((2, 32), np.float16), torch.ones(2, 32).bfloat16()])
def test_an_item_is_anchors_and_states(states: Any) -> None:
    item = reader().read({"anchors": torch.tensor([5, 6]), "states": states})
    assert (item.anchors, tuple(item.states.shape), item.around) == ([5, 6], (2, 32), None)


def test_it_may_bring_the_ids_around_it_control_tokens_among_them() -> None:
    whole = {"before": [1, 7], "after": [], "fingerprint": list(bytes.fromhex(FINGERPRINT))}
    assert reader().read(GOOD | whole).around == ([1, 7], [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"anchors": [5, 1]}, "anchors holds 1, a control token or none of the LLM's tokens, which no text becomes"),
        ({"anchors": [5, 400]}, "anchors holds 400"),
        ({"anchors": [5, -1]}, "anchors holds -1"),
        ({"before": [400], "after": []}, "before holds 400"),
        ({"before": [], "after": [-7]}, "after holds -7"),
        ({"anchors": [5]}, r"states are \(2, 32\) of torch.float32, and \(1, 32\) floating-point numbers belong to 1"),
        ({"anchors": [], "states": torch.ones(0, 32)}, "send one state for each of one or more anchors"),
        ({"states": torch.ones(2, 31)}, r"states are \(2, 31\)"),
        ({"states": torch.ones(2, 32).long()}, "of torch.int64"),
        ({"states": torch.full((2, 32), torch.nan)}, "not finite"),
        ({"fingerprint": [0] * 16}, "another fingerprint than abab"),
        ({"anchors": [5.5, 6.5]}, r"anchors is \(2,\) of torch.float32; send a list of whole numbers"),
        ({"anchors": [[5, 6]]}, r"anchors is \(1, 2\)"),
        ({"before": [1]}, "an item has the fields anchors, before, states; send anchors and states, or ref and ratio"),
        ({"pixels": [1]}, "an item has the fields anchors, pixels, states"),
        ({"ref": [0] * 16, "ratio": [2]}, "an item has the fields anchors, ratio, ref, states"),
    ],
)
def test_what_the_llm_would_not_read_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, MismatchError), match=message):
        reader().read(GOOD | fields)


def test_a_ref_is_found_in_the_store_and_read_at_its_ratio(tmp_path: Path) -> None:
    llm = tiny_llm()
    with EmbeddingStore.open(tmp_path / "store") as store:
        lm = ExtensibleLM(llm, entering(llm), store)
        lm.compress([DOCUMENT])
        ref = next(iter(store.items()))[0]
        expected = store.get(ref, lm.embedder.fingerprint, 8)
        assert expected is not None
    settings = {"entry_layer": 1, "fingerprint": lm.embedder.fingerprint}
    served = ItemReader(settings, hidden_size=32, vocab_size=400, store=str(tmp_path / "store"))
    name = list(bytes.fromhex(ref.removeprefix("ext:")))
    item = served.read({"ref": name, "ratio": [8]})
    assert item.anchors == expected.anchors.tolist()
    assert torch.equal(item.states, expected.embeddings)
    with pytest.raises(DocumentNotFoundError, match=f"no {ref} at ratio 3 from embedder {lm.embedder.fingerprint}"):
        served.read({"ref": name, "ratio": [3]})
    with pytest.raises(DocumentNotFoundError, match="no ext:0000"):
        served.read({"ref": [0] * 16, "ratio": [8]})
    for wrong in ({"ref": name[:3], "ratio": [8]}, {"ref": [256] * 16, "ratio": [8]}, {"ref": name, "ratio": [0]}):
        with pytest.raises(ConfigError, match="is none; send the 16 bytes of a ref, and one ratio"):
            served.read(wrong)
    with pytest.raises(ConfigError, match="this server has no store; start it with --hf-overrides"):
        reader().read({"ref": name, "ratio": [8]})


def test_vllm_is_told_of_every_architecture_that_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    import vllm_extemb

    registered: dict[str, str] = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))  # type: ignore[arg-type]
    vllm_extemb.register()
    assert registered == {name: f"vllm_extemb.models:{name}" for name in SERVED.values()}
    models = Path(vllm_extemb.__file__).with_name("models.py").read_text()
    assert all(f"class {name}(" in models for name in SERVED.values())


def test_the_plugin_is_found_without_loading_torch() -> None:
    import subprocess
    import sys

    code = "import sys, vllm_extemb; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

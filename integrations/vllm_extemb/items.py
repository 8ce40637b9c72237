"""Items of a request, one per compressed text: tensors by name, or the ref of a text in a store that vLLM can read.

| field | |
|---|---|
| `anchors` | (N,) ids, which stand in the prompt |
| `states` | (N, D), which take the anchors' place at the entry layer |
| `ref`, `ratio` | instead of both: the 16 bytes of a document's ref, and the ratio to read it at |
| `before`, `after` | ids around the anchors, in all items of a request or in none: together they are the whole prompt |
| `fingerprint` | the 16 bytes of the fingerprint of the embedder that made the states; checked if it is given |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from extemb_core.documents import REF_PREFIX
from extemb_core.errors import ConfigError, DocumentNotFoundError, MismatchError
from extemb_core.models.entry import AnchoredStates
from extemb_core.store.base import Store

METADATA = ("anchors", "ref", "ratio", "before", "after", "fingerprint")  # lists of numbers, in JSON or as tensors
_NAME_BYTES = 16  # of refs and fingerprints
_IDS = ("anchors", "before", "after")


@dataclass(frozen=True, eq=False)
class Item:
    """A compressed text of a request.

    Attributes:
        anchors: (N,) ids.
        states: (N, D).
        around: Ids before and after the anchors, if the request brings the whole prompt.
    """

    anchors: list[int]
    states: Tensor
    around: tuple[list[int], list[int]] | None = None


class ItemReader:
    """Reads and checks items for one LLM.

    Args:
        settings: "entry_layer" and "fingerprint", from the folder's config.json.
        hidden_size: D.
        vocab_size: V.
        control_ids: Ids that text never becomes, so that they cannot be anchors.
        store: Folder of the store in which refs are looked up.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        hidden_size: int,
        vocab_size: int,
        control_ids: Any = (),
        store: str | None = None,
    ) -> None:
        self.fingerprint = str(settings["fingerprint"])
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.control_ids = frozenset(map(int, control_ids))
        self._folder = store

    @cached_property
    def _store(self) -> Store:
        from extemb_core.store.shard_store import open_store

        store = open_store(self._folder, "r")
        if store is None:
            raise ConfigError(
                "an item has a ref, and this server has no store; start it with --hf-overrides "
                "'{\"extemb_store\": FOLDER}', or send states"
            )
        return store

    def read(self, fields: Mapping[str, Any]) -> Item:
        """Read one item.

        Raises:
            ConfigError: Its fields are not those listed in the module.
            MismatchError: This LLM cannot read these states or anchors.
            DocumentNotFoundError: The store does not have the document at that ratio.
        """
        names = set(fields) - {"before", "after", "fingerprint"}
        if names not in ({"anchors", "states"}, {"ref", "ratio"}) or ("before" in fields) != ("after" in fields):
            raise ConfigError(
                f"an item has the fields {', '.join(sorted(fields))}; send anchors and states, or ref and ratio, and "
                "before and after together"
            )
        numbers = {name: _whole_numbers(name, fields[name]) for name in METADATA if name in fields}
        if numbers.get("fingerprint") not in (None, list(bytes.fromhex(self.fingerprint))):
            raise MismatchError(
                f"states were made by an embedder with another fingerprint than {self.fingerprint}, which this LLM was "
                "exported with; use the same LLM and embedder on both sides"
            )
        if "ref" in numbers:
            anchors, states = self._stored(numbers["ref"], numbers["ratio"])
        else:
            anchors, states = numbers["anchors"], torch.as_tensor(fields["states"])
        self._check_states(anchors, states)
        for name, ids in (numbers | {"anchors": anchors}).items():
            wrong = [index for index in ids if not 0 <= index < self.vocab_size]
            wrong += [index for index in anchors if index in self.control_ids] if name == "anchors" else []
            if name in _IDS and wrong:
                raise MismatchError(
                    f"{name} holds {wrong[0]}, a control token or none of the LLM's tokens, which no text becomes; "
                    "compress the document again"
                )
        around = (numbers["before"], numbers["after"]) if "before" in numbers else None
        return Item(anchors, states, around)

    def _stored(self, name: list[int], ratio: list[int]) -> tuple[list[int], Tensor]:
        if len(name) != _NAME_BYTES or not all(0 <= byte < 256 for byte in name) or len(ratio) != 1 or ratio[0] < 1:
            raise ConfigError(f"ref={name} at ratio={ratio} is none; send the 16 bytes of a ref, and one ratio")
        ref = REF_PREFIX + bytes(name).hex()
        text = self._store.get(ref, self.fingerprint, ratio[0])
        if text is None or not isinstance(text.part, AnchoredStates):
            raise DocumentNotFoundError(
                f"the store of this server has no {ref} at ratio {ratio[0]} from embedder {self.fingerprint}; compress "
                "the document into it"
            )
        return [int(index) for index in text.part.anchors], text.part.states

    def _check_states(self, anchors: list[int], states: Tensor) -> None:
        expected = (len(anchors), self.hidden_size)
        if not anchors or tuple(states.shape) != expected or not states.is_floating_point():
            raise MismatchError(
                f"states are {tuple(states.shape)} of {states.dtype}, and {expected} floating-point numbers belong to "
                f"{len(anchors)} anchors; send one state for each of one or more anchors"
            )
        if not states.isfinite().all():
            raise MismatchError("states hold numbers that are not finite, which no LLM reads; compress the text again")


def _whole_numbers(name: str, values: Any) -> list[int]:
    tensor = torch.as_tensor(values)
    if tensor.ndim != 1 or (tensor.numel() and (tensor.is_floating_point() or tensor.is_complex())):
        raise ConfigError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}; send a list of whole numbers")
    return [int(value) for value in tensor.tolist()]

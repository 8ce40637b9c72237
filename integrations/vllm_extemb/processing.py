"""Let vLLM's front end read compressed documents, as a modality whose placeholders are the documents' anchors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from transformers import BatchFeature
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, ModalityDataItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
)
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo

from extemb_core.models.export import SETTINGS
from extemb_core.models.tokenization import TextEncoder
from vllm_extemb.items import METADATA, Item, ItemReader

PLACEHOLDER = "<|extemb|>"  # stands for a text in a message, if the request does not bring the whole prompt
MODALITY = "image"  # vLLM accepts tensors of an unknown modality only as image_embeds parts


class CompressedTexts(DictEmbeddingItems):
    """The compressed texts of a request, in the order of its prompt."""

    def __init__(self, items: list[Item]) -> None:
        ModalityDataItems.__init__(self, items, MODALITY)

    def get_count(self) -> int:
        return len(self.data)

    def get(self, index: int) -> Item:
        return self.data[index]

    def get_processor_data(self) -> Mapping[str, object]:
        return {}

    def get_passthrough_data(self) -> Mapping[str, object]:
        return {"states": [item.states for item in self.data]}


class CompressedTextParser(MultiModalDataParser):
    """Reads the dicts of `image_embeds` parts, whose fields vLLM has joined."""

    embedding_fields: ClassVar[Any] = {MODALITY: dict.fromkeys(METADATA, "metadata") | {"states": "embedding"}}

    def __init__(self, reader: ItemReader) -> None:
        super().__init__(expected_hidden_size=reader.hidden_size)
        self._reader = reader

    def _get_subparsers(self) -> Mapping[str, Any]:
        return {MODALITY: self._parse}

    def _parse(self, data: Any) -> CompressedTexts:
        if not isinstance(data, Mapping):
            raise ValueError(f"a compressed text is a {type(data).__name__}; send a dict of tensors in image_embeds")
        rows = zip(*data.values(), strict=True)
        return CompressedTexts([self._reader.read(dict(zip(data, row, strict=True))) for row in rows])


class ExtensibleInfo(BaseProcessingInfo):
    """Properties of the LLM for the front end."""

    @cached_property
    def reader(self) -> ItemReader:
        config, tokenizer = self.get_hf_config(), self.get_tokenizer()
        return ItemReader(
            getattr(config, SETTINGS),
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            control_ids=TextEncoder(tokenizer, self.model_id).control_ids,
            store=getattr(config, "extemb_store", None),
        )

    def get_data_parser(self) -> MultiModalDataParser:
        return CompressedTextParser(self.reader)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {MODALITY: None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {MODALITY: seq_len}


class ExtensibleDummyInputs(BaseDummyInputsBuilder[ExtensibleInfo]):
    """Inputs with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return PLACEHOLDER * mm_counts.get(MODALITY, 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        count, reader = mm_counts.get(MODALITY, 0), self.info.reader
        anchor = next(index for index in range(reader.vocab_size) if index not in reader.control_ids)
        states = torch.zeros(count, seq_len, reader.hidden_size)
        return {MODALITY: {"anchors": torch.full((count, seq_len), anchor), "states": states}} if count else {}


class ExtensibleProcessor(BaseMultiModalProcessor[ExtensibleInfo]):
    """Puts anchors where the compressed texts stand."""

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {name: MultiModalFieldConfig.batched(MODALITY) for name in hf_inputs}

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> dict[str, list[str]]:
        """Hash the content, ignoring a request's uuids, so that caches distinguish texts with the same anchors."""
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        items = inputs.mm_data_items.get(MODALITY)
        return {
            MODALITY: [
                MultiModalHasher.hash_kwargs(algorithm, anchors=item.anchors, states=item.states.contiguous())
                for item in items or ()
            ]
        }

    def _get_prompt_updates(
        self, mm_items: MultiModalDataItems, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        target = self.info.get_tokenizer().encode(PLACEHOLDER, add_special_tokens=False)
        return [PromptReplacement(MODALITY, target, lambda index: mm_items[MODALITY][index].anchors)]

    def _maybe_apply_prompt_updates(
        self, mm_items: MultiModalDataItems, mm_res: Any
    ) -> tuple[list[int], Mapping[str, list[PlaceholderFeaturesInfo]]]:
        """Assemble the prompt that the items bring; if they bring none, replace the prompt's placeholders."""
        items: list[Item] = mm_items[MODALITY].get_all() if mm_items else []
        brought = [item.around for item in items if item.around is not None]
        if not brought:
            return super()._maybe_apply_prompt_updates(mm_items, mm_res)
        if len(brought) < len(items):
            raise ValueError("some items of a request have before and after, and others not; send them in all or none")
        ids: list[int] = []
        places = []
        for index, (item, (before, after)) in enumerate(zip(items, brought, strict=True)):
            ids += before
            places.append(PlaceholderFeaturesInfo(MODALITY, index, len(ids), item.anchors, None))
            ids += [*item.anchors, *after]
        return ids, {MODALITY: places}

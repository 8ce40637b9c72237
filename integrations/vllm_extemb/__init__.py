"""extemb for vLLM: an LLM that reads compressed documents at its entry layer, from a folder of `extemb export --vllm`.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`.
"""

from __future__ import annotations

from extemb_core.models.export import SERVED

__all__ = ["register"]


def register() -> None:
    """Register the architectures with vLLM, which imports them when one is served."""
    from vllm import ModelRegistry

    for name in SERVED.values():
        ModelRegistry.register_model(name, f"vllm_extemb.models:{name}")

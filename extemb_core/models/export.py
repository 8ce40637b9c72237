"""Export an LLM, its reader merged in, as a Hugging Face folder that vLLM serves (see `integrations/vllm_extemb`)."""

from __future__ import annotations

import glob
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from extemb_core.errors import ConfigError
from extemb_core.utils.files import atomic_write_text, disk_errors, make_folder, parse_json, remove_left
from extemb_core.utils.quiet import quiet_transformers
from extemb_core.utils.validation import path_of

if TYPE_CHECKING:
    from extemb_core.models.embedder import ExtensibleEmbedder

SETTINGS = "extemb"  # key in the folder's config.json, which transformers ignores
SERVED = {name: f"Extensible{name}" for name in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")}
_JOINED = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"  # vLLM needs a template for chats


def export_for_vllm(embedder: ExtensibleEmbedder, folder: str | os.PathLike[str]) -> None:
    """Write an embedder's LLM as a folder for `vllm serve`; transformers reads it as the plain architecture.

    Above entry layer 0 its config.json names the architecture of the plugin, the entry layer, and the fingerprint of
    the embedder whose states it reads. At 0 it is the plain LLM, which reads `prompt_embeds`.

    Args:
        embedder: Embedder made for the LLM.
        folder: A new or empty folder; it is written whole or not at all.

    Raises:
        ConfigError: The folder is not empty or cannot be made, or the plugin has no such architecture.
    """
    target, llm, layer = path_of(folder), embedder.llm, embedder.config.entry_layer
    name = type(llm.model).__name__
    if layer and name not in SERVED:
        raise ConfigError(
            f"{llm.name} is a {name}, and the vLLM plugin serves {', '.join(SERVED)}; use one of these, or an embedder "
            "for entry layer 0"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already; name a new folder")
    make_folder(target.parent, ConfigError, "name a folder elsewhere")
    hidden = f".{target.name[:60]}.export-"
    remove_left(target.parent, f"{glob.escape(hidden)}*", folders=True)
    with tempfile.TemporaryDirectory(prefix=hidden, dir=target.parent) as temporary:
        made = Path(temporary)
        with quiet_transformers(), disk_errors(target):
            llm.model.save_pretrained(made)
            llm.tokenizer.save_pretrained(made)
        if not llm.tokenizer.chat_template:
            atomic_write_text(made / "chat_template.jinja", _JOINED)
        if layer:
            config = parse_json((made / "config.json").read_text(encoding="utf-8"))
            config["architectures"] = [SERVED[name]]
            config[SETTINGS] = {"entry_layer": layer, "fingerprint": embedder.fingerprint}
            atomic_write_text(made / "config.json", json.dumps(config, indent=2) + "\n")
        for file in made.iterdir():  # safetensors makes files that only their owner can read, as mkdtemp makes folders
            file.chmod((made / "config.json").stat().st_mode)
        made.chmod(target.parent.stat().st_mode)
        made.replace(target)

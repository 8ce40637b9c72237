"""`extemb serve`: an endpoint for clients of OpenAI's API."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from extemb_core.cli import options
from extemb_core.cli.config_options import options_from
from extemb_core.cli.output import library_output, print_note
from extemb_core.errors import ConfigError, DocumentError, optional_import
from extemb_core.serving.settings import ServerSettings
from extemb_core.utils.validation import path_of

_KEYS = "EXTEMB_API_KEYS"


@dataclass(frozen=True, kw_only=True)
class ServeOptions(options.ModelOptions, ServerSettings):
    """Options of `extemb serve`.

    Attributes:
        store: Folder of compressed documents that are read in addition to those of clients.
        encoder: A sentence-transformers model that finds passages.
        api_keys: A file of API keys, one a line; without it the variable EXTEMB_API_KEYS, separated by commas.
    """

    store: str | None = None
    encoder: str | None = field(default=None, metadata={"default": "static vectors from the wordllama wheel"})
    api_keys: str | None = field(default=None, metadata={"metavar": "FILE"})


@options_from(
    ServeOptions, "host", "port", "api_keys", "llm", "embedder", "store", "name", "data", "encoder", "max_new_tokens",
    "max_requests", "batch_size", "max_body_mib", "max_documents", "max_stored_documents", "memory_mib", "body_seconds",
    "request_seconds", "device", "dtype",
)  # fmt: skip
def serve(**settings: Any) -> None:
    """Answer clients of OpenAI's API, with documents in their requests: docs/server.md.

    Logs are lines of JSON on stderr, without text of documents, questions or answers. After Ctrl-C, the answers at work
    are finished.
    """
    file = settings.get("api_keys")
    try:
        words = (
            os.environ.get(_KEYS, "").split(",") if file is None else path_of(file).read_text("utf-8-sig").splitlines()
        )
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is no text of API keys ({error}); pass a file in UTF-8 with a key on a line"
        ) from error
    except OSError as error:
        raise DocumentError(
            f"{file} cannot be read ({error.strerror}); pass a file with an API key on a line"
        ) from error
    keys = tuple(word.strip() for word in words if word.strip())
    if file is not None and not keys:  # the server would be open to all who can reach it
        raise ConfigError(f"{file} holds no API key; put one on a line, or leave out --api-keys to ask for none")
    given = ServeOptions(**settings, keys=keys)
    for module in ("fastapi", "prometheus_client", "uvicorn"):
        optional_import(module, "server", "extemb serve", package=module.replace("_", "-"))
    with library_output():
        from extemb_core.serving.process import serve
        from extemb_core.store.shard_store import open_store

        lm = given.load(store=open_store(given.store, "r"))
        with suppress(KeyboardInterrupt):  # the way to stop it
            serve(
                lm,
                given,
                encoder=given.encoder,
                on_bound=lambda url: print_note(f"chat page at {url}/, API listening at {url}/v1"),
            )

"""Settings of the server. Nothing heavy is imported here: the command line reads its options off them."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field, fields

from extemb_core.errors import ConfigError
from extemb_core.utils.validation import whole_number

_KEY = re.compile(r"[\x21-\x7e]{16,512}")
_LAST_PORT = 65_535


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Address and limits of the server.

    Attributes:
        host: Address to listen at; all but loopback need an API key.
        port: Port to listen at; 0 is any that is free.
        name: Name of the model that clients ask for.
        data: Folder of the documents that clients add; a folder in it for each key.
        max_requests: Maximum requests at work or waiting; more clients get status 429.
        batch_size: Maximum requests in one forward pass.
        max_new_tokens: Maximum tokens of an answer if a client names no length.
        max_body_mib: Maximum size of a request, in MiB.
        max_documents: Maximum documents in a request.
        max_stored_documents: Maximum documents that a key may store.
        memory_mib: Embeddings of documents sent with questions, kept in memory for each key, in MiB.
        body_seconds: Seconds in which the body of a request must arrive.
        request_seconds: Seconds in which an answer must be finished.
        keys: API keys; without any, none is asked for.

    Raises:
        ConfigError: A value is not legal, or the server would be open to others without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = field(default=None, metadata={"default": "that of --llm"})
    data: str | None = field(default=None, metadata={"metavar": "DIR", "default": "in the user's data folder"})
    max_requests: int = 64
    batch_size: int = 32
    max_new_tokens: int = 256
    max_body_mib: int = 32
    max_documents: int = 256
    max_stored_documents: int = 10_000
    memory_mib: int = 512
    body_seconds: int = 30
    request_seconds: int = 300
    keys: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(setting.default, int):
                whole_number(value, setting.name, 0 if setting.name in ("port", "memory_mib") else 1)
        if self.port > _LAST_PORT:
            raise ConfigError(f"port={self.port} is none; pass 0 to {_LAST_PORT}, 0 for any that is free")
        for key in self.keys:
            if not _KEY.fullmatch(key):
                raise ConfigError(
                    f"an API key of {len(key)} characters is not 16 to 512 visible ASCII characters without spaces; "
                    "make one with: openssl rand -hex 32"
                )
        if not self.keys and not is_loopback(self.host):
            raise ConfigError(
                f"host={self.host!r} is open to other machines, and there is no API key; set EXTEMB_API_KEYS or pass "
                "--api-keys FILE, or listen at 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Return whether a host names this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"

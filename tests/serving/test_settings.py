"""What the server may be told to do, and what it refuses to be."""

from __future__ import annotations

import pytest
from served import KEYS

from extemb_core.errors import ConfigError
from extemb_core.serving.settings import ServerSettings, is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.7", "my.example", "localhost.example"])
def test_where_others_can_reach_it_there_is_a_key(host):
    with pytest.raises(ConfigError, match="is open to other machines, and there is no API key"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, keys=KEYS).keys == KEYS


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_loopback_needs_none(host):
    assert is_loopback(ServerSettings(host=host).host)


@pytest.mark.parametrize("key", ["short", "with spaces in it all over", "ä" * 20, "a" * 513, "a" * 20 + "\n"])
def test_a_key_is_long_and_can_be_sent_in_a_header(key):
    with pytest.raises(ConfigError, match=f"an API key of {len(key)} characters is not 16 to 512"):
        ServerSettings(keys=(key,))
    assert KEYS[0] not in repr(ServerSettings(keys=KEYS))


@pytest.mark.parametrize("name", ["batch_size", "max_requests", "max_body_mib", "body_seconds", "request_seconds"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_limits_are_positive_numbers(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r} is not a whole number of at least 1"):
        ServerSettings(**{name: value})
    assert ServerSettings(port=0, memory_mib=0).port == 0


def test_a_port_is_one_that_there_is():
    assert ServerSettings(port=65_535).port == 65_535
    with pytest.raises(ConfigError, match="port=65536 is none; pass 0 to 65535"):
        ServerSettings(port=65_536)

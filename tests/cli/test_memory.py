"""Memory of large blocks that were freed stays with the process, to be used again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from extemb_core.cli.memory import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit(3)
before = resident()
bytes([1]) * 200_000_000
print(resident() - before)
"""


def still_held(how):
    """Bytes of 200 MB that a process holds after it has freed them."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=False, env=plain)
    if done.returncode == 3:
        pytest.skip("the C library of this machine is not glibc")
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and sets glibc's malloc")
def test_freed_memory_stays():
    assert still_held("kept") > 150e6
    assert still_held("as it comes") < 50e6

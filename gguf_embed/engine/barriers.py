"""How llama.cpp's threads wait for one another in a process that shares its cores with others.

They meet at a barrier after each operation, some hundreds of times in a text. libgomp's threads
spin there for milliseconds before they sleep, which is right where nothing else wants the core.
Where something does (the requests of a server, its clients, other programs), the one that spins
keeps the core from the one that it waits for: a short text then takes up to a hundred times as
long. So they spin for some microseconds, and sleep then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

SPINS: Final = "1000"  # about 0.04 ms
_CHOSEN: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def waiting(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for the child process; none where the person who started us has chosen."""
    if any(name in environment for name in _CHOSEN):
        return {}
    return {"GOMP_SPINCOUNT": SPINS}

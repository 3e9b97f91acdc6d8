"""Memory given back to the system: glibc keeps what threads have freed, often for good."""

from __future__ import annotations

import ctypes
import sys


def give_back_memory() -> None:
    """Ask glibc to return freed pages; does nothing elsewhere."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)

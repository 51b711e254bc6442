"""Giving memory that was freed back to the system.

Tensors of a few MiB come from the heap, where glibc keeps what is freed between those that stay. A pass that allocates
many of them would seem to need far more memory than it ever uses at a time.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Give freed memory back, where the C library can; about a millisecond."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None with other C libraries, which have nothing like it or don't need it."""
    try:
        found: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
    return found

"""Ctrl-C while torch traces a model: it waits until the trace is over.

Where an interrupt meets torch's tracer, between C++ and the Python that it calls, torch may abort the whole
process. A trace is the one part of a capture that cannot be left anywhere; it takes seconds.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """An interrupt within is handled, as it would have been, when the block is left."""
    usual, came = signal.getsignal(signal.SIGINT), list[tuple[int, Any]]()
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if came:
            usual(*came[-1])

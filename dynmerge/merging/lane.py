"""Lane: one thread for work that nobody streams from, which lets the engine's threads go first."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

NICENESS = 10


def lane(name: str) -> ThreadPoolExecutor:
    """An executor of one thread at low priority."""
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=_give_way)


def _give_way() -> None:
    # On Linux niceness is a thread's own, and the threads that torch starts for it inherit it.
    if sys.platform == "linux":
        os.nice(NICENESS)

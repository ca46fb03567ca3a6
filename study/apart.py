"""Apart: the study's modules in processes of one thread, several at a time.

On two cores two such processes beat one of two threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def run_apart(module: str, calls: Sequence[Sequence[str]], jobs: int) -> None:
    """`python -m module` with the words of each call, `jobs` at a time.

    Raises CalledProcessError where one fails.
    """

    def one(words: Sequence[str]) -> None:
        command = [sys.executable, "-m", module, *words]
        subprocess.run(command, env=os.environ | ONE_THREAD, check=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, calls))

"""Says its word and how many threads it was given, for tests of processes apart."""

import os
import sys

if __name__ == "__main__":
    if sys.argv[1] == "fail":
        raise SystemExit(3)
    print(sys.argv[1], os.environ["OMP_NUM_THREADS"])

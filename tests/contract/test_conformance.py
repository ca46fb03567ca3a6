"""vLLM's published behaviour, restated as cases outside this repository."""

import re
import subprocess
import sys

import pytest

from tests.contract.server import ROOT, Served

CASES = ROOT.parent / "shared" / "conformance" / "run_conformance.py"
# Routes, refusals and messages: what an engine's own arithmetic has no part in.
GROUPS = "A,B,M"


@pytest.mark.skipif(not CASES.exists(), reason=f"no conformance cases at {CASES}")
def test_it_conforms_to_vllm(served: Served) -> None:
    command = [sys.executable, str(CASES), "--url", served.url, "--model", served.model]
    run = subprocess.run(
        [*command, "--lora", "ada", "--have", "lora", "--only", GROUPS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(r"^[1-9]\d* passed, 0 failed, 0 skipped", run.stdout, re.MULTILINE), run.stdout

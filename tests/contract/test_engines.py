"""Which engines the tests of this folder ran against."""

import pytest

from tests.contract.server import HAS_VLLM


@pytest.mark.vllm
@pytest.mark.skipif(
    not HAS_VLLM, reason="vLLM is not installed here: only the embedded engine is held to this"
)
def test_vllm_is_here() -> None:
    """Its skip is the one line that stands for all tests of an engine that is not here."""

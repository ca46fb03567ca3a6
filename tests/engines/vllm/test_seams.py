"""What dynmerge builds on in vLLM is there, and what is not is an error that names it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from warnings import catch_warnings, simplefilter

import pytest

from dynmerge.engines.vllm import seams
from dynmerge.engines.vllm.seams import SEAMS, Seam, check_seams
from dynmerge.errors import ConfigError

has_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

# vLLM wraps `can_replace_layer` in what takes anything, so that there is nothing to compare.
COMPARED = tuple(
    seam for seam in SEAMS if seam.parameters and not seam.name.endswith(".can_replace_layer")
)


@contextmanager
def quietly() -> Iterator[None]:
    """Importing vLLM warns of much that is not ours."""
    with catch_warnings():
        simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    "version", ["0.30.0", "0.30.0+cpu", "0.32.0+cpu", "0.33.1", "0.33.0.post1"]
)
def test_a_version_within_the_range_is_taken(version: str) -> None:
    seams._check_version(version)


@pytest.mark.parametrize("version", ["0.29.0", "0.9.2", "0.29.1rc1", "0.34.0", "0.34.1+cpu", "1.0"])
def test_a_version_outside_the_range_is_refused_with_the_range(version: str) -> None:
    with pytest.raises(ConfigError) as refused:
        seams._check_version(version)
    assert f"does not support vLLM {version}: it takes >=0.30,<0.34" in str(refused.value)


@pytest.mark.parametrize("version", ["0.34.0rc1", "0.34.0.dev7"])
def test_what_comes_before_the_first_unsupported_release_is_refused_too(version: str) -> None:
    with pytest.raises(ConfigError, match=r"<0\.34"):
        seams._check_version(version)


@pytest.mark.parametrize("version", ["nightly", "", "dev"])
def test_what_is_no_version_is_refused_with_the_range(version: str) -> None:
    with pytest.raises(ConfigError, match=rf"does not know vLLM {version}: it takes >=0.30,<0.34"):
        seams._check_version(version)


@pytest.mark.vllm
@pytest.mark.oldest
@has_vllm
def test_this_vllm_is_as_dynmerge_knows_it() -> None:
    with quietly():
        check_seams()


@pytest.mark.vllm
@pytest.mark.oldest
@has_vllm
@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_a_name_that_is_gone_is_named(seam: Seam, monkeypatch: pytest.MonkeyPatch) -> None:
    for gone in (
        replace(seam, name=f"{seam.name}_of_old"),
        replace(seam, module=f"{seam.module}_of_old"),
    ):
        monkeypatch.setattr(seams, "SEAMS", (gone,))
        with quietly(), pytest.raises(ConfigError) as refused:
            check_seams()
        assert str(refused.value).endswith(
            f"is not as dynmerge knows it has no {gone.module}.{gone.name}"
        )
        assert str(refused.value).startswith("vLLM 0.")


@pytest.mark.vllm
@pytest.mark.oldest
@has_vllm
@pytest.mark.parametrize("seam", COMPARED, ids=lambda seam: seam.name)
def test_another_parameter_is_named(seam: Seam, monkeypatch: pytest.MonkeyPatch) -> None:
    more = replace(seam, parameters=(*seam.parameters, "scale"))
    renamed = replace(seam, parameters=tuple(f"{name}_of_old" for name in seam.parameters))
    for other in (more, renamed):
        monkeypatch.setattr(seams, "SEAMS", (*SEAMS, other))
        with quietly(), pytest.raises(ConfigError) as refused:
            check_seams()
        assert f"{seam.name} takes (" in str(refused.value)
        assert f"{other.parameters[-1]})" in str(refused.value)


@pytest.mark.vllm
@has_vllm
def test_the_name_is_replaced_once_and_knows_the_class_that_stood_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with quietly():
        from vllm.v1.worker import lora_model_runner_mixin as runner

        stock = runner.LRUCacheWorkerLoRAManager
    monkeypatch.setattr(runner, seams.REPLACED, stock)  # put back in the end
    seams.replace_manager()
    seams.replace_manager()
    check_seams()
    choice = runner.LRUCacheWorkerLoRAManager
    assert isinstance(choice, seams._Choice)
    assert choice._stock is stock

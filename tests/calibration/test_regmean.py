"""Second moments against a loop over tokens, on each adapter's model written out."""

import pytest
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from dynmerge.adapters.adapter import Adapter
from dynmerge.calibration.regmean import second_moments
from dynmerge.errors import ExamplesError
from dynmerge.student import Student
from dynmerge.texts.passages import Passages
from tests import reference
from tests.calibration.network import RANKS, Network, Points, network_bank
from tests.conftest import tiny_model


def test_moments_are_means_over_the_tokens_of_each_adapters_own_texts(
    pupil: Student, skilled: dict[str, Adapter], texts: dict[str, Passages]
) -> None:
    found = second_moments(pupil, texts, batch=2)
    assert len(found) == len(pupil.bank.modules)
    assert isinstance(pupil.model, PreTrainedModel)
    for task, name in enumerate(pupil.bank.names):
        model = reference.written_out(tiny_model(), reference.merged_deltas(skilled, {name: 1.0}))
        tokens = [passage.tokens for passage in texts[name].passages]
        for module, S in zip(pupil.bank.modules, found, strict=True):
            inputs = reference.layer_inputs(model, module.name, tokens)
            expected = reference.second_moment(inputs, module.V)
            assert_close(S[task].double(), expected, atol=1e-4, rtol=1e-3)


def test_batches_do_not_matter(pupil: Student, texts: dict[str, Passages]) -> None:
    for one, other in zip(
        second_moments(pupil, texts, batch=1), second_moments(pupil, texts, batch=9), strict=True
    ):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


class Short(Network):
    """As a model of experts, of which one is not asked."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.get_submodule("d")(self.get_submodule("a")(x).tanh())
        return found


def test_a_layer_that_reads_nothing_is_named() -> None:
    student = Student(Short(), network_bank())
    points = {name: Points(student.model, task, 4, task) for task, name in enumerate(RANKS)}
    with pytest.raises(ExamplesError, match=r"^b read nothing of 'ada': there were no texts, or"):
        second_moments(student, points)

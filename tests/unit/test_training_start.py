"""What a stage starts from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pairvpr.errors import UserError
from pairvpr.models.weights import Weights, untrained_state
from pairvpr.training.start import ENCODER, stage_one_start_weights, stage_two_start_weights
from tests.support.small import small_model_config

CONFIG = small_model_config()


@pytest.fixture(scope="module")
def stage_one() -> dict[str, Tensor]:
    """A stage-one state dict of another seed."""
    return untrained_state(CONFIG, seed=5, pair_classifier_token=False)


def _assert_equal(weights: Weights, expected: dict[str, Tensor]) -> None:
    assert weights.arrays.keys() == expected.keys()
    for name, array in weights.arrays.items():
        np.testing.assert_array_equal(array, expected[name].numpy(), name)


def test_dinov2_weights_fill_the_encoder_alone(tmp_path: Path, stage_one: dict[str, Tensor]) -> None:
    file = tmp_path / "dinov2.pth"
    encoder = {name.removeprefix(ENCODER): tensor for name, tensor in stage_one.items() if name.startswith(ENCODER)}
    torch.save(encoder, file)
    fresh = untrained_state(CONFIG, seed=1, pair_classifier_token=False)
    expected = {name: stage_one[name] if name.startswith(ENCODER) else tensor for name, tensor in fresh.items()}
    _assert_equal(stage_one_start_weights(CONFIG, str(file), seed=1), expected)
    del encoder["norm.weight"]
    torch.save(encoder, file)
    with pytest.raises(UserError, match=r"^train\.start=.*1 missing: norm\.weight"):
        stage_one_start_weights(CONFIG, str(file), seed=1)


def test_a_whole_stage_one_file_is_taken_as_it_is(tmp_path: Path, stage_one: dict[str, Tensor]) -> None:
    torch.save({"model": stage_one, "epoch": 3}, tmp_path / "one.pth")
    _assert_equal(stage_one_start_weights(CONFIG, str(tmp_path / "one.pth"), seed=1), stage_one)


def test_seeds_decide_random_starts() -> None:
    first, again, other = (stage_two_start_weights(CONFIG, None, seed) for seed in (1, 1, 2))
    assert first.untrained
    assert first.sha256 == again.sha256 != other.sha256
    _assert_equal(first, untrained_state(CONFIG, seed=1))
    assert not np.array_equal(first.arrays["globalizer.0.weight"], other.arrays["globalizer.0.weight"])


def test_stage_two_goes_on_from_either_stage(tmp_path: Path, stage_one: dict[str, Tensor]) -> None:
    torch.save({"model": stage_one}, tmp_path / "one.pth")
    from_one = stage_two_start_weights(CONFIG, str(tmp_path / "one.pth"), seed=0)
    np.testing.assert_array_equal(from_one.arrays["globalizer.0.weight"], stage_one["globalizer.0.weight"].numpy())
    stage_two = untrained_state(CONFIG, seed=6)
    torch.save(stage_two, tmp_path / "two.pth")
    _assert_equal(stage_two_start_weights(CONFIG, str(tmp_path / "two.pth"), seed=0), stage_two)
    del stage_two["dec_norm.bias"]
    torch.save(stage_two, tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"^train\.start=.*1 missing: dec_norm\.bias"):
        stage_two_start_weights(CONFIG, str(tmp_path / "two.pth"), seed=0)
    with pytest.raises(UserError, match=r"^train\.start=.*no such file"):
        stage_two_start_weights(CONFIG, str(tmp_path / "nothing.pth"), seed=0)

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_lib.evaluation.open_loop import baseline_chunks, open_loop_metrics


def chunks(seed: int = 0, samples: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = rng.normal(0, 0.4, (samples, 8, 7)).astype(np.float32)
    target[..., 6] = 1.0
    return target, np.ones(target.shape[:2], bool)


def test_perfect_predictions_have_no_error():
    target, mask = chunks()
    found = open_loop_metrics(target, target, mask)
    assert found["translation_mae_mm"] == found["rotation_rmse_deg"] == found["path_error_mm"] == 0
    assert found["dimensions"]["dx"]["r2"] == pytest.approx(1)
    assert found["dimensions"]["gripper"]["r2"] is None  # it does not vary: no figure is invented


def test_a_known_offset_gives_known_errors():
    target, mask = chunks()
    predicted = target + np.array([3, 4, 0, 0, 0, 2, 0], np.float32)
    found = open_loop_metrics(predicted, target, mask)
    assert found["translation_mae_mm"] == pytest.approx(5, abs=1e-5)
    assert found["rotation_mae_deg"] == pytest.approx(2, abs=1e-5)
    assert found["path_error_mm"] == pytest.approx(40, abs=1e-4)  # eight steps of 5 mm in the same direction
    assert found["by_step"]["translation_mae_mm"] == pytest.approx([5] * 8, abs=1e-5)


@given(seed=st.integers(0, 10_000))
def test_masked_steps_never_count(seed):
    target, mask = chunks(seed)
    mask[np.random.default_rng(seed).random(mask.shape) < 0.4] = False
    mask[0] = True
    predicted = target + 0.1
    spoiled = np.where(mask[..., None], predicted, 1e6)
    assert open_loop_metrics(spoiled, target, mask) == open_loop_metrics(predicted, target, mask)


def test_the_mean_predictor_explains_nothing():
    target, mask = chunks()
    found = open_loop_metrics(np.broadcast_to(target.mean((0, 1)), target.shape), target, mask)
    assert found["dimensions"]["dy"]["r2"] == pytest.approx(0, abs=1e-4)


def test_trap_32_baselines_know_only_the_past():
    previous = np.arange(14, dtype=np.float32).reshape(2, 7)
    found = baseline_chunks(previous, np.full(7, 0.5), horizon=3)
    assert (found["persistence"] == previous[:, None]).all()
    assert (found["mean"] == 0.5).all()
    assert not found["zero"].any()


def test_trap_33_paths_are_compared_over_the_same_span():
    target, mask = chunks()
    mask[:30, 4:] = False  # chunks cut short by the end of an episode do not enter the path error
    predicted = target.copy()
    predicted[:30, :4, 0] += 100
    assert open_loop_metrics(predicted, target, mask)["path_error_mm"] == 0


def test_shapes_and_emptiness_are_refused():
    target, mask = chunks()
    with pytest.raises(ValueError, match="shapes differ"):
        open_loop_metrics(target[:, :4], target, mask)
    with pytest.raises(ValueError, match="no valid step"):
        open_loop_metrics(target, target, ~mask)

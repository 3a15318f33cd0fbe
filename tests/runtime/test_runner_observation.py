"""What the policy sees in a run is what it saw in training: a recorded episode is played back and every observation
compared."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from synthetic import write_dataset

from vla_lib.episodes import load_prepared
from vla_lib.features.cache import FeatureCache
from vla_lib.policy.config import PolicyConfig
from vla_lib.policy.policy import Policy
from vla_lib.runtime.clock import Latency, SimulatedClock
from vla_lib.runtime.expert import GOALS, PolicyExpert
from vla_lib.runtime.robot_io import Observation
from vla_lib.runtime.runner import Runner, RunnerSettings
from vla_lib.runtime.safety import SafetyLimits
from vla_lib.runtime.vlm_worker import Features, SimulatedVlm
from vla_lib.training.samples import SampleSet

BOX = ((-1e3, 1e3),) * 3
STEPS = 30


class Playback:
    """An episode as a robot: what was recorded up to now. Pictures are stood in for by the number of the step."""

    moves = False

    def __init__(self, episode, clock):
        self.episode, self.clock, self._read = episode, clock, 0

    def read_observation(self) -> Observation:
        k = min(round(self.clock.now() * 10), len(self.episode) - 1)
        now, end = float(self.episode.timestamp[k]), int(self.episode.sensor_index[k])
        begin, self._read = self._read, end
        return Observation(
            timestamp=now,
            state=self.episode.state[k],
            state_timestamp=now,
            pictures={"step": np.array([4 * [k] + [k + 100]])},  # not blank
            picture_timestamps={"step": now},
            sensor=self.episode.sensor[begin:end],
            sensor_timestamps=self.episode.sensor_timestamp[begin:end],
            instruction=self.episode.instruction,
        )

    def send_action(self, action) -> None:
        pass

    def stop(self, reason) -> None:
        pass


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    root = tmp_path_factory.mktemp("recorded")
    (path,) = write_dataset(root, {"part1": 1}, steps=STEPS, stride=1, lead_s=1.2)
    return load_prepared(path), FeatureCache.open(root)


def small_policy(cache, window: int = 65, head: str = "regression") -> Policy:
    layout = cache.layout
    torch.manual_seed(0)
    config = PolicyConfig(
        head,
        layout.views,
        cache.binding["hidden_size"],
        tuple(layout.view_id.tolist()),
        tuple(layout.row.tolist()),
        tuple(layout.col.tolist()),
        sensor_window_size=window,
        width=16,
        layers=1,
        heads=2,
    )
    policy = Policy(config).eval()
    with torch.no_grad():
        for weights in policy.parameters():  # a new policy's head is zero, and would answer everything alike
            weights.normal_(0.0, 0.2)
    return policy


class Recorder(PolicyExpert):
    """Keeps every observation batch."""

    def __call__(self, features, age_s, state, window):
        self.seen = [*getattr(self, "seen", []), self.observation(features, age_s, state, window)]
        return super().__call__(features, age_s, state, window)


@pytest.mark.parametrize("window", (65, 650))
@pytest.mark.parametrize("latency_ms", (0.0, 200.0, 300.0))
def test_live_observations_are_the_training_samples(recorded, window, latency_ms):
    episode, cache = recorded
    features = cache.episode(episode)
    samples = SampleSet([episode], cache, sensor_window_size=window, vlm_reuse_count=3, vlm_latency_ms=latency_ms)
    clock = SimulatedClock({"vlm": Latency(latency_ms)})
    expert = Recorder(small_policy(cache, window))
    vlm = SimulatedVlm(
        lambda pictures, instruction: (features.tokens[pictures["step"][0, 0]], features.mask[pictures["step"][0, 0]]),
        clock,
    )
    limits = SafetyLimits(workspace_mm=BOX, sensor_frozen_s=9.0)  # the synthetic sensor has no noise
    log = Runner(Playback(episode, clock), expert, vlm, clock, RunnerSettings(), limits).run(STEPS / 10)
    acted = [tick.step for tick in log.ticks if tick.mode == "act"]
    assert acted == list(range(round(latency_ms / 100), STEPS))  # from the first finished features on, at every step
    batch = samples.batch(acted)
    for place, seen in enumerate(expert.seen):
        assert set(seen) == {"vl_tokens", "vl_mask", "vl_age_s", "vl_state", "state", "sensor", "sensor_mask"}
        for name, value in seen.items():
            assert value.dtype == batch[name].dtype and value.shape[1:] == batch[name].shape[1:], name
            assert torch.equal(value[0], batch[name][place]), f"{name} at step {acted[place]}"


def test_masked_inputs_are_masked_as_missing_ones(recorded):
    episode, cache = recorded
    features = cache.episode(episode)
    policy = small_policy(cache)
    given = Features(features.tokens[0], features.mask[0], 0, 0.0, episode.state[0])
    window = np.array(episode.sensor[:65])
    whole = PolicyExpert(policy).observation(given, 0.1, episode.state[0], window)
    blind = PolicyExpert(policy, "vl").observation(given, 0.1, episode.state[0], window)
    numb = PolicyExpert(policy, "sensor").observation(given, 0.1, episode.state[0], window)
    assert not blind["vl_mask"].any() and whole["vl_mask"].all() and blind["sensor_mask"].all()
    assert not numb["sensor_mask"].any() and not numb["sensor"].any() and numb["vl_mask"].all()
    other = Features(features.tokens[0] + 5, features.mask[0], 0, 0.0, episode.state[0])
    act = PolicyExpert(policy, "vl")
    assert np.array_equal(act(given, 0.1, episode.state[0], window), act(other, 0.1, episode.state[0], window))
    act = PolicyExpert(policy, "sensor")
    assert np.array_equal(act(given, 0.1, episode.state[0], window), act(given, 0.1, episode.state[0], window + 50))
    act = PolicyExpert(policy)
    assert not np.array_equal(act(given, 0.1, episode.state[0], window), act(other, 0.1, episode.state[0], window))
    assert not np.array_equal(act(given, 0.1, episode.state[0], window), act(given, 0.1, episode.state[0], window + 50))


def test_the_goal_is_the_mean_of_what_the_newest_pictures_tell(recorded):
    """Truth: the policy's own goals of each tick, averaged here; yaws meet across 180 degrees."""
    episode, cache = recorded
    features = cache.episode(episode)
    policy = small_policy(cache)
    policy.normaliser.goal_mean.copy_(torch.tensor([100.0, 0.0, 179.0]))
    expert = PolicyExpert(policy)
    given = {}
    predict, policy.predict = policy.predict, lambda *a, goal, **k: (given.update(goal=goal), predict(*a, goal=goal))[1]
    window, each = np.array(episode.sensor[:65]), []
    for step in range(0, 3 * (GOALS + 2), 3):
        state = episode.state[step]
        seen = Features(features.tokens[step], features.mask[step], step, 0.0, state)
        for _ in range(2):  # the second time no new picture has come
            expert(seen, 0.1, episode.state[step], window)
        each.append(policy.goal(expert.observation(seen, 0.1, state, window))[0].numpy())
        newest = np.array(each[-GOALS:])
        assert given["goal"][0, :2].numpy() == pytest.approx(newest[:, :2].mean(0), abs=1e-3)
        turned = np.degrees(np.angle(np.exp(1j * np.radians(newest[:, 2] - newest[-1, 2]))))
        assert given["goal"][0, 2] == pytest.approx(newest[-1, 2] + turned.mean(), abs=1e-3)
    expert(Features(features.tokens[0], features.mask[0], 0, 0.0, episode.state[0]), 0.1, episode.state[0], window)
    assert given["goal"][0].numpy() == pytest.approx(each[0], abs=1e-3)  # another run: nothing of the one before


def test_a_diffusion_policy_draws_anew_at_every_call_and_alike_by_the_seed(recorded):
    episode, cache = recorded
    policy = small_policy(cache, head="diffusion")
    features = cache.episode(episode)
    seen = (
        Features(features.tokens[0], features.mask[0], 0, 0.0, episode.state[0]),
        0.1,
        episode.state[0],
        np.array(episode.sensor[:65]),
    )
    one, same, other = PolicyExpert(policy, seed=4), PolicyExpert(policy, seed=4), PolicyExpert(policy, seed=5)
    first, second = one(*seen), one(*seen)
    assert np.array_equal(first, same(*seen)) and np.array_equal(second, same(*seen))
    assert not np.array_equal(first, second) and not np.array_equal(first, other(*seen))


def test_the_usual_step_follows_the_training_statistics(recorded):
    policy = small_policy(recorded[1])
    policy.normaliser.action_mean.copy_(torch.tensor([0.3, 0, 0, 0, 0, 0, 1.0]))
    policy.normaliser.action_std.copy_(torch.tensor([0, 0, 0.4 / 3, 0, 0, 1.0, 1.0]))
    policy.normaliser.action_varies.copy_(torch.tensor([1.0, 1, 1, 1, 1, 1, 0]))
    assert PolicyExpert(policy).usual_step() == pytest.approx((0.5, 3.0))

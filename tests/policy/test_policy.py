"""The policy: shapes, units, what each input does, dtypes, strictness; for both heads."""

import dataclasses

import pytest
import torch

from vla_lib.core.errors import UserError
from vla_lib.policy.config import HEADS, PolicyConfig
from vla_lib.policy.goal import GoalReader
from vla_lib.policy.policy import Policy
from vla_lib.policy.trunk import Attention

VIEW = tuple([0] * 6 + [1] * 6 + [-1])
ROW = tuple([0, 0, 0, 1, 1, 1] * 2 + [-1])
COL = tuple([0, 1, 2, 0, 1, 2] * 2 + [-1])


def make_config(**changes) -> PolicyConfig:
    values = {
        "head": "regression",
        "views": ("View1_left", "View5"),
        "token_dim": 8,
        "token_view": VIEW,
        "token_row": ROW,
        "token_col": COL,
    }
    return PolicyConfig(**(values | {"sensor_window_size": 13, "width": 32, "layers": 2, "heads": 2} | changes))


def make_policy(**changes) -> Policy:
    torch.manual_seed(0)
    policy = Policy(make_config(**changes))
    torch.nn.init.normal_(policy.head.out.weight, std=0.2)  # as if trained: a new head says the mean for anything
    return policy.eval()


def observe(count=3, window=13, dtype=torch.float32, seed=1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "vl_tokens": torch.randn(count, len(VIEW), 8, generator=generator).to(dtype),
        "vl_mask": torch.ones(count, len(VIEW), dtype=torch.bool),
        "vl_age_s": torch.rand(count, generator=generator) * 0.2,
        "vl_state": torch.randn(count, 12, generator=generator),
        "state": torch.randn(count, 12, generator=generator),
        "sensor": torch.randn(count, window, 1026, generator=generator),
        "sensor_mask": torch.ones(count, dtype=torch.bool),
    }


@pytest.mark.parametrize("head", HEADS)
def test_predict_gives_a_chunk_and_is_repeatable(head):
    policy = make_policy(head=head)
    chunk = policy.predict(observe())
    assert chunk.shape == (3, 8, 7) and chunk.dtype == torch.float32
    assert torch.isfinite(chunk).all()
    assert torch.equal(chunk, policy.predict(observe()))


def test_of_several_sampled_chunks_the_median_is_predicted():
    policy, noise = make_policy(head="diffusion"), torch.randn(3, 5, 8, 7)
    each = torch.stack([policy.predict(observe(), noise=noise[:, k : k + 1]) for k in range(5)])
    assert each.std(0).mean() > 0.01
    assert torch.allclose(policy.predict(observe(), noise=noise), each.median(0).values, atol=1e-5)


def test_draws_of_a_sample_share_its_context_and_nothing_else():
    policy = make_policy(head="diffusion")
    batch = observe() | {"action": torch.randn(3, 8, 7), "goal": torch.randn(3, 3)}
    draws = policy.draw(3, torch.Generator().manual_seed(0))
    alone = [
        policy(batch, {name: value[:, k : k + 1] for name, value in draws.items()})
        for k in range(draws["timestep"].shape[1])
    ]
    assert torch.allclose(policy(batch, draws), torch.stack(alone).mean(0), atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["vl_tokens", "vl_state", "state", "sensor", "vl_mask", "sensor_mask"])
def test_every_input_reaches_the_actions(head, name):
    policy, observation = make_policy(head=head), observe()
    before = policy.predict(observation)
    value = observation[name]
    observation[name] = ~value if value.dtype == torch.bool else value + 1.5 * torch.linspace(0, 1, value.shape[-1])
    if name == "vl_mask":
        observation[name][:, :4] = True
    assert (policy.predict(observation) - before).abs().max() > 1e-4


def test_without_sensor_nothing_of_it_remains():
    policy, observation = make_policy(sensor_enabled=False), observe()
    assert not any("sensor" in name for name in policy.state_dict())
    before = policy.predict(observation)
    del observation["sensor"], observation["sensor_mask"]
    assert torch.equal(before, policy.predict(observation))


@pytest.mark.parametrize("head", HEADS)
def test_without_vl_no_token_is_seen_in_training_or_after(head):
    policy, observation = make_policy(head=head, vl_enabled=False), observe()
    before = policy.predict(observation)
    hidden = observation | {"vl_tokens": observation["vl_tokens"] + 3.0, "vl_mask": ~observation["vl_mask"]}
    assert torch.equal(before, policy.predict(hidden))
    batch = {"action": torch.zeros(len(before), 8, 7), "goal": torch.zeros(len(before), 3)}
    draws = policy.train().draw(len(before), torch.Generator().manual_seed(0))
    assert torch.equal(policy(observation | batch, draws), policy(hidden | batch, draws))


def test_samples_of_a_batch_do_not_touch_each_other():
    policy, observation = make_policy(), observe(4)
    alone = policy.predict({k: v[2:3] for k, v in observation.items()})
    assert torch.allclose(policy.predict(observation)[2:3], alone, atol=1e-5)


def test_missing_views_are_ignored_and_may_all_be_missing():
    policy, observation = make_policy(), observe()
    observation["vl_mask"][:, 6:12] = False
    before = policy.predict(observation)
    observation["vl_tokens"][:, 6:12] = 1e3
    assert torch.equal(before, policy.predict(observation))
    observation["vl_mask"][:] = False
    assert torch.isfinite(policy.predict(observation)).all()


def test_a_window_that_is_not_full_is_ignored():
    policy, observation = make_policy(), observe()
    observation["sensor_mask"][1] = False
    before = policy.predict(observation)
    observation["sensor"][1] = 500.0
    assert torch.equal(before, policy.predict(observation))


def test_the_depth_of_a_peak_survives_the_encoder():
    """Peaks one bin (of 1025) apart give different tokens, monotonously over many bins: the depth resolution is not
    pooled away."""
    policy = make_policy()
    bins = torch.arange(1025.0)

    def tokens(position):
        sensor = torch.zeros(1, 13, 1026)
        sensor[..., 1:] = 5 * torch.exp(-0.5 * ((bins - position) / 6) ** 2)
        return policy.sensor_encoder(sensor, torch.tensor([True]), policy.normaliser)

    base = tokens(400.0)
    distance = [float((tokens(400.0 + shift) - base).detach().norm()) for shift in (1, 8, 64)]
    assert 1e-3 < distance[0] < distance[1] < distance[2]


@pytest.mark.parametrize("head", HEADS)
def test_trap_26_all_dtypes_predict_the_same(head):
    policy = make_policy(head=head)
    reference = policy.predict(observe())
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.allclose(policy.predict(observe(dtype=dtype)), reference, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = policy.predict(observe(dtype=torch.bfloat16))
    assert mixed.dtype == torch.float32 and torch.allclose(mixed, reference, atol=0.2)


def test_trap_21_actions_are_normalised_and_the_clamp_follows_their_range():
    """Actions of many standard deviations can be sampled: x0 is clamped to the range of the normalised training
    actions, not to +-1."""
    policy = make_policy(head="diffusion", diffusion_timesteps=20)
    statistics = {
        "action_mean": torch.tensor([0.3, 0, 0, 0, 0, 0, 1.0]),
        "action_std": torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0]),
        "action_range": torch.tensor(4.0),
        **{
            "state_mean": torch.zeros(12),
            "state_std": torch.ones(12),
            "goal_mean": torch.zeros(3),
            "goal_std": torch.ones(3),
            "token_mean": torch.zeros(13, 8),
            "token_std": torch.ones(8),
        },
        **{"sensor_mean": torch.zeros(1026), "sensor_std": torch.ones(1026)},
    }
    policy.normaliser.load_statistics(statistics)
    wanted = policy.head.compressed(
        policy.normaliser, torch.full((1, 8, 7), 3.5)
    )  # a model that always sees x0 = 3.5 standard deviations
    scheduler = policy.head.scheduler

    def perfect(read, noisy, timestep):
        alpha = scheduler.alphas_cumprod[timestep][:, None, None]
        noise = (noisy - alpha.sqrt() * wanted) / (1 - alpha).sqrt()
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * wanted

    policy.head.velocity = perfect
    chunk = policy.predict(observe(2), ddim_steps=10)
    assert torch.allclose(chunk[..., 0], torch.tensor(0.3 + 3.5 * 0.1), atol=1e-3)
    assert (chunk[..., 6] == 1.0).all()  # a constant dimension comes back exactly


def test_normaliser_inverts_and_zero_spread_does_not_explode():
    policy = make_policy()
    n = policy.normaliser
    zeros = {
        "action_mean": torch.arange(7.0),
        "action_std": torch.tensor([1, 2, 3, 1e-9, 0, 0.5, 0]),
        "action_range": torch.tensor(2.0),
    }
    zeros |= {
        "state_mean": torch.zeros(12),
        "state_std": torch.zeros(12),
        "goal_mean": torch.zeros(3),
        "goal_std": torch.zeros(3),
        "token_mean": torch.zeros(13, 8),
        "token_std": torch.zeros(8),
    }
    zeros |= {"sensor_mean": torch.zeros(1026), "sensor_std": torch.zeros(1026)}
    n.load_statistics(zeros)
    action = torch.randn(5, 7)
    back = n.raw_action(n.action(action))
    live = [0, 1, 2, 5]
    assert torch.allclose(back[:, live], action[:, live], atol=1e-5)
    assert torch.equal(back[:, [3, 4, 6]], torch.tensor([3.0, 4.0, 6.0]).expand(5, 3))
    assert torch.isfinite(policy.predict(observe())).all()


@pytest.mark.parametrize("head", HEADS)
def test_loss_has_one_figure_a_step_and_ignores_constant_dimensions(head):
    policy = make_policy(head=head).train()
    policy.normaliser.action_varies[6] = 0
    batch = observe() | {"action": torch.randn(3, 8, 7), "goal": torch.randn(3, 3)}
    draws = policy.draw(3, torch.Generator().manual_seed(0))
    loss = policy(batch, draws)
    assert loss.shape == (3, 8)
    batch["action"][..., 6] = 1e6
    assert torch.equal(policy(batch, draws), loss)


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_gets_a_gradient(head):
    """A parameter without one would stop distributed training, and be dead weight in any."""
    policy = make_policy(head=head).train()
    batch = observe() | {"action": torch.randn(3, 8, 7), "goal": torch.randn(3, 3)}
    batch["sensor_mask"][0] = False
    policy(batch, policy.draw(3, torch.Generator().manual_seed(0))).mean().backward()
    assert [name for name, p in policy.named_parameters() if p.grad is None] == []


def test_predict_refuses_training_mode_and_other_layouts():
    policy = make_policy()
    with pytest.raises(UserError, match="13 VL tokens of width 8.*View1_left, View5.*12 of width 8"):
        policy.predict(observe() | {"vl_tokens": torch.zeros(3, 12, 8), "vl_mask": torch.ones(3, 12, dtype=torch.bool)})
    with pytest.raises(UserError, match="reads 13 sensor samples, the observation has 20"):
        policy.predict(observe(window=20))
    with pytest.raises(UserError, match="the observation has none"):
        policy.predict({k: v for k, v in observe().items() if k != "sensor"})
    with pytest.raises(RuntimeError, match="eval"):
        policy.train().predict(observe())


def test_config_round_trip_and_refusals():
    config = make_config(head="diffusion")
    assert PolicyConfig.from_dict(config.record()) == config
    for changes in (
        {"head": "x"},
        {"width": 30, "heads": 4},
        {"token_row": (0,)},
        {"ddim_steps": 200},
    ):
        with pytest.raises(UserError):
            dataclasses.replace(config, **changes)
    with pytest.raises(UserError, match="cannot be built by this version .--colour is no setting"):
        PolicyConfig.from_dict(config.record() | {"colour": 1})
    older = {name: value for name, value in config.record().items() if name != "vl_ages_s"}
    with pytest.raises(UserError, match="trained by an earlier version.*train anew"):
        PolicyConfig.from_dict(older)


def test_attention_has_no_bias_whose_gradient_is_rounding():
    assert all("bias" not in name for name, _ in Attention(8, 2).named_parameters())


def test_the_cosine_schedule_ends_in_pure_noise():
    """Noise at the last timestep is pure noise, at the first almost none (cosine schedule)."""
    alphas = make_policy(head="diffusion").head.scheduler.alphas_cumprod
    assert alphas[0] > 0.999 and alphas[-1] < 1e-4 and (alphas.diff() < 0).all()


@pytest.mark.parametrize("head", HEADS)
def test_vl_reaches_the_actions_through_the_goal_alone(head):
    """Given a goal, tokens change nothing; without one, the policy follows what its reader says of the tokens."""
    policy, observation = make_policy(head=head), observe()
    goal = torch.randn(3, 3)
    other = observation | {"vl_tokens": observation["vl_tokens"] + 3.0, "vl_state": observation["vl_state"] + 1.0}
    assert torch.equal(policy.predict(observation, goal=goal), policy.predict(other, goal=goal))
    assert not torch.equal(policy.predict(observation), policy.predict(other))
    assert torch.equal(policy.predict(other), policy.predict(observation, goal=policy.goal(other)))
    assert make_policy(head=head, vl_enabled=False).goal(observation) is None


def test_the_trunk_learns_from_true_goals_and_the_reader_from_tokens():
    policy = make_policy().train()
    policy.normaliser.goal_std[:] = torch.tensor([5.0, 5.0, 20.0])
    batch = observe() | {"action": torch.randn(3, 8, 7), "goal": torch.tensor([[1.0, 2.0, 179.0]] * 3)}
    given = {}
    policy.goal_token.register_forward_hook(lambda module, inputs, out: given.update(goal=inputs[0]))
    loss = policy(batch, {})
    assert torch.equal(given["goal"], batch["goal"])
    # the reader's own error is added to every step alike, its yaw's shortest way: 10 degrees from 179 to -171
    policy.goal_reader.read = torch.nn.Sequential(torch.nn.Linear(policy.goal_reader.read[0].in_features, 3))
    for values in (policy.goal_reader.read[0].weight, *policy.goal_reader.straight.parameters()):
        torch.nn.init.zeros_(values)
    exact, turned = torch.tensor([1.0 / 5, 2.0 / 5, 179.0 / 20]), torch.tensor([1.0 / 5, 2.0 / 5, -171.0 / 20])
    losses = []
    for answer in (exact, turned):
        policy.goal_reader.read[0].bias.data = answer
        losses.append(policy(batch, {}))
    assert loss.shape == (3, 8)
    assert torch.allclose(losses[1] - losses[0], torch.full((3, 8), 0.1 * (10 / 20 - 0.05) / 3), atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_view_dropout_hides_whole_views_in_training_only(head):
    policy = make_policy(head=head, view_dropout=0.5)
    batch = observe() | {"action": torch.randn(3, 8, 7), "goal": torch.randn(3, 3)}
    draws = policy.draw(3, torch.Generator().manual_seed(0))
    assert draws["hide_view"].shape == (3, 2)
    draws["hide_view"] = torch.tensor([[False, True]] * 3)
    hidden = batch | {"vl_mask": batch["vl_mask"].clone()}
    hidden["vl_mask"][:, 6:12] = False
    shown = {k: v for k, v in draws.items() if k != "hide_view"}
    assert torch.equal(policy.train()(batch, draws), policy(hidden, shown))
    assert torch.equal(policy.eval()(batch, draws), policy(batch, shown))


@pytest.mark.parametrize("head", HEADS)
def test_token_noise_is_of_the_asked_spread_and_in_training_only(head):
    policy, seen = make_policy(head=head, token_noise=0.5), []
    batch = observe() | {"action": torch.randn(3, 8, 7), "goal": torch.randn(3, 3)}
    policy.goal_reader.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    draws = policy.draw(3, torch.Generator().manual_seed(0))
    policy.eval()(batch, draws)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        policy.train()(batch, draws)
    clean, first, again, other = seen
    noise = first - clean
    assert torch.equal(first, again) and not torch.equal(first, other)  # a run that is resumed draws the same
    assert 0.45 < float(noise.std()) < 0.55 and abs(float(noise.mean())) < 0.05
    assert torch.equal(clean, policy.eval().normaliser.tokens(batch["vl_tokens"]))


def scenes(count: int, seed: int, needle: bool) -> tuple[torch.Tensor, ...]:
    """Tokens, mask and state of two views of 4x6 cells, each moved by up to a cell, and the goal: a target
    somewhere, in channel 0, and the needle's tip in channel 1 (not without `needle`), whose place the state tells."""
    generator = torch.Generator().manual_seed(seed)
    target, tip = 2 * torch.rand(2, count, 2, generator=generator) - 1
    moved = torch.rand(count, 2, 2, generator=generator) - 0.5  # of each view
    places = torch.cartesian_prod(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 6))
    tokens = 0.01 * torch.randn(count, 49, 4, generator=generator)
    for channel, thing in enumerate((target, tip) if needle else (target,)):
        away = places - (thing[:, None] + moved)[:, :, None]  # (n, views, cells, 2)
        tokens[:, :48, channel] += torch.exp(-away.square().sum(-1) / 0.2).flatten(1)
    state = torch.zeros(count, 12)
    state[:, 6:8] = tip
    return tokens, torch.ones(count, 49, dtype=torch.bool), state, target


def test_a_camera_that_was_moved_is_seen_by_the_tip():
    """Each scene's cameras stand elsewhere: only the needle, whose place is known, can tell where the target is."""
    row, col = (tuple(v) for v in zip(*[(k // 6, k % 6) for k in range(24)], strict=True))
    views = {"token_view": (0,) * 24 + (1,) * 24 + (-1,), "token_row": (*row, *row, -1), "token_col": (*col, *col, -1)}
    missed = {}
    for needle in (True, False):
        torch.manual_seed(0)
        reader = GoalReader(make_config(**views, token_dim=4))
        optimiser = torch.optim.Adam(reader.parameters(), 1e-2)
        for step in range(250):
            *seen, target = scenes(32, step, needle)
            goal, off = reader(*seen)
            loss = (goal[:, :2] - target).abs().mean() + 0.1 * off.abs().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        *seen, target = scenes(500, 10_000, needle)
        with torch.no_grad():
            missed[needle] = float((reader(*seen)[0][:, :2] - target).norm(dim=1).median())
    assert missed[True] < 0.6 * missed[False], missed


def test_a_view_that_is_not_seen_says_nothing_of_the_tip():
    policy, observation = make_policy(), observe()
    observation["vl_mask"][:, 6:12] = False
    _, off = policy.normalised_goal(observation)
    assert off.shape == (3, 2, 3) and off[:, 0].abs().min() > 0 and not off[:, 1].any()

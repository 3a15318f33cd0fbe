"""A policy's losses and errors (mm, degrees) on held-out samples, beside the zero, mean and persistence baselines."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vla_lib.policy.policy import Policy
from vla_lib.training.live_vlm import LiveSamples
from vla_lib.training.samples import SampleSet

BASELINES = ("zero", "mean", "persistence")


@torch.no_grad()
def validate(
    policy: Policy,
    samples: SampleSet | LiveSamples,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
    seed: int = 0,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Errors over all valid steps of all chunks; each process takes its share and `reduce` sums over the processes.

    val/loss_epoch: the training loss (noise loss for diffusion); val/action_loss: Huber loss of the predicted actions
    in standard deviations of the training actions, the same measure for both models and for
    val/baseline_<name>_action_loss; val/mae_mm and val/mae_deg: mean absolute error of an axis (diffusion: of one
    sampled chunk). Noise belongs to the sample, so the figures do not depend on the number of processes. The policy
    is put into eval mode and left as it was; `autocast` surrounds its calls. `stop` is asked before each batch: where
    one process is to stop, it leaves out the rest, and all of them return None."""
    was_training = policy.training
    policy.eval()
    device, normaliser = policy.queries.device, policy.normaliser
    names = ("model", *BASELINES)
    # valid steps, loss, then Huber, mm and degrees of each name; processes that stopped
    sums = torch.zeros(3 + 3 * len(names), dtype=torch.float64, device=device)
    own = np.arange(len(samples))[rank::world]
    for start in range(0, len(own), batch_size):
        if stop():
            sums[-1] = 1
            break
        numbers = own[start : start + batch_size]
        batch = {k: v.to(device) for k, v in samples.batch(numbers).items()}
        mask = batch["action_mask"][..., None]  # (B, H, 1)
        drawn = [policy.draw(1, torch.Generator().manual_seed(seed * 1_000_003 + int(i))) for i in numbers]
        draws = {k: torch.cat([d[k] for d in drawn]).to(device) for k in drawn[0]}
        with autocast():
            loss = policy(batch, draws)  # (B, H)
            predicted = policy.predict(batch, noise=draws["noise"][:, :1] if "noise" in draws else None)  # (B, H, 7)
        sums[0] += mask.sum()
        sums[1] += (loss.double() * mask[..., 0]).sum()
        target = batch["action"]
        guesses = {
            "model": predicted,
            "zero": torch.zeros_like(target),
            "mean": normaliser.action_mean.expand_as(target),
            "persistence": batch["previous_action"][:, None].expand_as(target),
        }
        for at, guess in zip(range(2, len(sums), 3), (guesses[name] for name in names), strict=False):
            huber = F.smooth_l1_loss(normaliser.action(guess), normaliser.action(target), reduction="none").double()
            error = (guess - target).abs().double()
            sums[at] += (huber * mask).sum() / normaliser.action_varies.sum().clamp_min(1)
            sums[at + 1] += (error[..., :3] * mask).sum() / 3
            sums[at + 2] += (error[..., 3:6] * mask).sum() / 3
    policy.train(was_training)
    sums = reduce(sums)
    if sums[-1]:
        return None
    values = (sums[1:-1] / sums[0].clamp_min(1)).tolist()
    result = {"val/loss_epoch": values[0]}
    for k, name in enumerate(names):
        prefix = "val/" if name == "model" else f"val/baseline_{name}_"
        for part, value in zip(("action_loss", "mae_mm", "mae_deg"), values[1 + 3 * k :], strict=False):
            result[prefix + part] = value
    return result

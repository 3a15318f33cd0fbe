"""The state of a run: everything that training changes, and so everything that a resumed run takes up again."""

import math
import time
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vla_lib.policy.policy import Policy
from vla_lib.training.checkpoint import load_weights
from vla_lib.training.live_vlm import LiveVlm
from vla_lib.training.settings import TrainingSettings

T_BINS = 10  # of the diffusion timestep histogram


class Tally:
    """Counts since the newest validation, of all processes' draws; they go into its row in metrics.jsonl.

    `ages`: most VL ages that occur (steps); `timesteps`: of the diffusion schedule, 0 for regression.
    """

    def __init__(self, ages: int, timesteps: int = 0) -> None:
        self._sizes = ages, timesteps
        self._counts = {"ages": np.zeros(ages, np.int64), "timesteps": np.zeros(T_BINS if timesteps else 0, np.int64)}
        self._waited_s = self._took_s = 0.0

    def add(self, ages: np.ndarray, timesteps: list[np.ndarray], waited_s: float, took_s: float) -> None:
        self._counts["ages"] += np.bincount(ages, minlength=self._sizes[0])
        if timesteps:
            self._counts["timesteps"] += np.histogram(np.concatenate(timesteps), T_BINS, (0, self._sizes[1]))[0]
        self._waited_s += waited_s
        self._took_s += took_s

    def empty(self) -> "Tally":
        return Tally(*self._sizes)

    @property
    def wait_share(self) -> float:
        """Share of the time that was waited for data, 0..1."""
        return self._waited_s / max(self._took_s, 1e-9)

    def row(self) -> dict[str, Any]:
        """What stands beside a validation's figures."""
        row = {"train/loader_wait_share": self.wait_share, "train/vl_reuse_counts": self._counts["ages"].tolist()}
        return row | ({"train/diffusion_t_counts": self._counts["timesteps"].tolist()} if self._sizes[1] else {})

    def state_dict(self) -> dict[str, Any]:
        counts = {name: values.tolist() for name, values in self._counts.items()}
        return {"counts": counts, "waited_s": self._waited_s, "took_s": self._took_s}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._counts = {name: np.array(values, np.int64) for name, values in state["counts"].items()}
        self._waited_s, self._took_s = state["waited_s"], state["took_s"]


class Trained(nn.Module):
    """All weights that are trained and averaged: the policy's and, in stage 2, LoRA's. Never called."""

    def __init__(self, policy: Policy, adapter: nn.ParameterList) -> None:
        super().__init__()
        self.policy, self.adapter = policy, adapter


class TrainState:
    """Weights, their average, the optimiser and the counters of a run.

    `live` is stage 2's VLM, whose LoRA weights are trained and averaged beside the policy's. The average is what is
    validated, saved and put on the robot.
    """

    def __init__(self, settings: TrainingSettings, policy: Policy, live: LiveVlm | None, tally: Tally) -> None:
        self.policy, self.live, self.tally = policy, live, tally
        self.step = 0  # optimiser steps
        self.epoch = self.position = 0  # whole epochs, and draws of the next one that are used
        self.validated = 0  # step of the newest validation
        self.metrics: dict[str, float] = {}  # of the newest validation
        self.best: dict[str, Any] = {}  # of the best one: action_loss, step, epoch, metrics
        self.wandb_id = f"{int(time.time()):x}-{settings.seed}"
        self._began, self._before_s = time.monotonic(), 0.0

        self.trained = Trained(policy, nn.ParameterList(live.weights.values() if live else ()))
        self._decay = settings.ema_decay
        self._average = AveragedModel(self.trained, multi_avg_fn=self._blend).eval().requires_grad_(False)
        self._averaged = cast(Trained, self._average.module)
        # the initial weights are the first of the average; with 0 the first step would replace them
        self._average.n_averaged.fill_(1)
        weights = list(self.trained.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in weights if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))

    @property
    def averaged(self) -> Policy:
        """The policy with averaged weights, in eval mode."""
        return self._averaged.policy

    @property
    def averaged_adapter(self) -> list[Tensor]:
        """The averaged LoRA weights; none in stage 1."""
        return list(self._averaged.adapter)

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, those before a resumption too."""
        return self._before_s + time.monotonic() - self._began

    def take_step(self, draws: int) -> None:
        """Move the weights along their gradients; `draws`: samples of all processes that the step used."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.position += draws
        self._average.update_parameters(self.trained)

    def close_validation(self, found: dict[str, float], samples: int) -> dict[str, Any]:
        """Take in a validation's figures (none where nothing is held out) and begin the next epoch where this one's
        draws are used up; `samples`: draws of an epoch. Returns the validation's row of metrics.jsonl."""
        part = self.position / samples
        if part >= 1:
            self.epoch, self.position = self.epoch + 1, 0
        epochs = self.epoch + (round(part, 4) if part < 1 else 0)
        row = {"epoch": epochs, "step": self.step, "elapsed_s": round(self.elapsed_s, 3), **self.tally.row(), **found}
        self.validated, self.tally = self.step, self.tally.empty()
        if found:
            self.metrics, loss = found, found["val/action_loss"]
            if loss < self.best.get("action_loss", math.inf):
                self.best = {"action_loss": loss, "step": self.step, "epoch": epochs, "metrics": found}
        return row

    def _blend(self, average: Iterable[Tensor], weights: Iterable[Tensor], _: Tensor | int) -> None:
        # the decay grows to its full value with the steps, so early weights are soon forgotten; 0: no averaging
        decay = min(self._decay, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(average, weights, None)

    def state_dict(self) -> dict[str, Any]:
        """The state's part of a checkpoint (see checkpoint.py); the tensors are not copied."""
        training = {
            "model": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": self.position,
            "validated": self.validated,
            "tally": self.tally.state_dict(),
            "best": self.best,
            "elapsed_s": self.elapsed_s,
            "wandb_id": self.wandb_id,
        } | ({"adapter": self.live.record()} if self.live else {})
        return {
            "policy": self.averaged.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "metrics": self.metrics,
            "training": training,
        } | ({"adapter": self.live.record(self.averaged_adapter)} if self.live else {})

    def load_state_dict(self, content: dict[str, Any], where: str) -> None:
        """Go on from a checkpoint's content. Raises UserError, naming `where`, where its weights do not fit."""
        training = content["training"]
        load_weights(self.policy, training["model"], where)
        load_weights(self.averaged, content["policy"], where)
        if self.live:
            self.live.load(training["adapter"])
            for own, saved in zip(self.averaged_adapter, content["adapter"]["weights"].values(), strict=True):
                own.copy_(saved)
        self.optimizer.load_state_dict(training["optimizer"])
        self.tally.load_state_dict(training["tally"])
        self.step, self.epoch, self.metrics = content["step"], content["epoch"], content["metrics"]
        self.position, self.validated, self.best = training["position"], training["validated"], training["best"]
        self._before_s, self.wandb_id = training["elapsed_s"], training["wandb_id"]

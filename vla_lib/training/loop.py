"""Settings in; a trained policy, its checkpoints and its metrics out. One loop for both models, on one process or many.

How equal results are had: every random number follows from (seed, epoch) or (seed, step) and the sample's place among all processes'
draws, never from a process's own generator. The loss of a step is a sum over its valid action steps divided by their number over all
processes and micro-batches, which each process knows from its tables. So two processes of batch b do what one of batch 2b does, and a
resumed run does what the uninterrupted one does.
"""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_lib.core.errors import UserError
from vla_lib.core.files import write_json
from vla_lib.core.progress import Progress
from vla_lib.core.run_folder import new_folder
from vla_lib.policy.policy import Policy
from vla_lib.training import reporting, starting_point
from vla_lib.training.checkpoint import load_weights
from vla_lib.training.data import prepare_data
from vla_lib.training.device import open_accelerator
from vla_lib.training.ema import AveragedPolicy
from vla_lib.training.live_vlm import LivePolicy, LiveSamples, LiveVlm
from vla_lib.training.metrics import MetricsLog, truncate
from vla_lib.training.process import StopRequest
from vla_lib.training.record import recorded
from vla_lib.training.sampler import EpochPlan, MicroBatch, draw_epoch, step_seed
from vla_lib.training.samples import batches
from vla_lib.training.saving import EPOCH_SAVE_S, Saver, needing_room
from vla_lib.training.schedule import learning_rate
from vla_lib.training.settings import TrainingSettings
from vla_lib.training.statistics import training_statistics
from vla_lib.training.tally import Tally
from vla_lib.training.validation import validate


def train(settings: TrainingSettings) -> dict[str, Any]:
    """Train, and return what results.json holds. Raises UserError for bad input, a lost checkpoint, or memory that does not suffice."""
    accelerator = open_accelerator(settings)
    try:
        with StopRequest() as stop:
            return Trainer(settings, accelerator, stop).run()
    finally:
        with contextlib.suppress(Exception):
            accelerator.end_training()


class Trainer:
    """One training on this process. `run` is the whole of it; the methods are its parts in order."""

    def __init__(self, settings: TrainingSettings, accelerator: Any, stop: StopRequest):
        self.settings, self.accelerator, self.stop = settings, accelerator, stop
        self.main = accelerator.is_main_process
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.run_dir = self._run_dir()
        self.latest = self.run_dir / "checkpoints" / settings.checkpoints.latest
        self.step, self.epoch, self.position = 0, 0, 0  # optimiser steps; epoch and draws of it already used
        self.validated = 0  # step of the newest validation
        self.elapsed_s, self.best = 0.0, {}
        self.metrics: dict[str, float] = {}
        self.live: LiveVlm | None = None  # stage 2's
        self.wandb_id = f"{int(time.time()):x}-{settings.seed}"

    def run(self) -> dict[str, Any]:
        """Everything. Returns the results."""
        before = self._previous()
        with recorded(self), reporting.memory_remedies(self.settings):
            return self._train(before)

    def _train(self, before: dict[str, Any] | None) -> dict[str, Any]:
        settings = self.settings
        self.data = prepare_data(settings, before["split"] if before else None)
        if self.main:
            print("\n".join(reporting.data_lines(self.data)), flush=True)
        self._build(before)
        log = None
        if self.main:
            truncate(self.run_dir / "metrics.jsonl", self.step, self.validated)
            log = MetricsLog(self.run_dir, settings.project, settings.wandb_mode, settings.record(), self.wandb_id)
        self.log = log
        self.started = time.monotonic()
        self.saver = Saver(self)
        if before is None:
            self.saver.newest()  # there is always something to resume from
        try:
            with Progress(
                self.steps_left,
                f"{settings.name}" + (f" (from step {self.step})" if self.step else ""),
                "steps",
                settings.log_every_s,
                self.main,
            ) as progress:
                while not self._finished() and not self.stopped:
                    self._epoch(progress)
            return self._end()
        finally:
            if log:
                log.close()

    # ---- before the first step

    def _run_dir(self) -> Path:
        if self.settings.run_dir is not None:
            return self.settings.run_dir
        if self.settings.resume:
            raise UserError("--resume needs --run-dir, the folder of the run to go on with.")
        from accelerate.utils import broadcast_object_list

        folder = [str(new_folder(self.settings.name)) if self.main else ""]
        return Path(broadcast_object_list(folder)[0])

    def _previous(self) -> dict[str, Any] | None:
        """The checkpoint to go on from, or None for a new run. A run folder with checkpoints is never trained over."""
        if self.settings.resume:
            return starting_point.previous(self.settings, self.latest)
        taken = starting_point.taken(self.latest)
        self.accelerator.wait_for_everyone()  # all have looked before anyone writes
        if taken:
            raise UserError(taken)
        return None

    def _build(self, before: dict[str, Any] | None) -> None:
        settings, data, device = self.settings, self.data, self.accelerator.device
        torch.manual_seed(settings.seed)
        policy = Policy(data.policy_config(settings))
        if before is not None:
            starting_point.check_previous(before, data, self.latest)
            load_weights(policy, before["training"]["model"], str(self.latest))
        elif settings.live_vlm:
            load_weights(policy, starting_point.stage1(settings)["policy"], str(settings.stage1_checkpoint))
        elif self.main:
            policy.normaliser.load_statistics(training_statistics(data.train))
        self.policy = self.trained = policy.to(device)
        if settings.live_vlm:
            self.trained = self._bring_vlm(before)
        if (
            self.world > 1
        ):  # one process made the statistics; parameters are sent along, so that all start from the same bits
            for tensor in self.trained.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
        self.averaged = AveragedPolicy(policy, settings.ema_decay, self.lora)
        self.tally = self._new_tally()
        matrices = [p for p in self.trained.parameters() if p.ndim >= 2]
        vectors = [p for p in self.trained.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
        if before is not None:
            state = before["training"]
            load_weights(self.averaged.policy, before["policy"], str(self.latest))
            for own, name in zip(self.averaged.adapter, self.live.weights if self.live else (), strict=True):
                own.copy_(before["adapter"]["weights"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.epoch, self.position = before["step"], before["epoch"], state["position"]
            self.elapsed_s, self.best, self.metrics = state["elapsed_s"], state["best"], before["metrics"]
            self.wandb_id = state["wandb_id"]
            self.validated = state.get("validated", self.step)  # it may be older than this and the next
            if "tally" in state:
                self.tally.load(state["tally"])
        self.model = self.accelerator.prepare_model(self.trained)
        if self.main:
            precision = self.accelerator.mixed_precision.replace("no", "float32")
            print(
                f"{sum(p.numel() for p in self.trained.parameters()):,} parameters, {self.world} process(es) on {device.type}, {precision}",
                flush=True,
            )
            if before is not None:
                print(f"resumed {self.latest} at step {self.step}, epoch {self.epoch}", flush=True)

    def _bring_vlm(self, before: dict[str, Any] | None) -> torch.nn.Module:
        """Stage 2: the policy and the VLM's LoRA weights as one module to train."""
        self.live = LiveVlm(self.settings, self.data, self.accelerator.device)
        if before is not None:
            self.live.load(before["training"]["adapter"])
        self.live.prepare(self.data, self.accelerator, self.settings.log_every_s)
        return LivePolicy(self.policy, self.live, self.data.train)

    @property
    def lora(self) -> list[torch.nn.Parameter]:
        """The VLM's LoRA weights; none in stage 1."""
        return list(self.live.weights.values()) if self.live else []

    @property
    def steps_left(self) -> int:
        """Optimiser steps to the end of the run, taken by as many processes as there are now."""
        s = self.settings
        if s.max_steps:
            return max(0, s.max_steps - self.step)
        whole = max(0, s.epochs - self.epoch - 1) * len(self._plan(0, 0))
        return whole + (len(self._plan(self.epoch, self.position)) if self.epoch < s.epochs else 0)

    def _plan(self, epoch: int, position: int) -> EpochPlan:
        s = self.settings
        draws = draw_epoch(self.data.weights, len(self.data.train), s.seed, epoch)
        return EpochPlan(draws, s.batch_size, s.grad_accum_steps, self.rank, self.world, position)

    def _new_tally(self) -> Tally:
        return Tally(int(self.data.train.age_steps.max()) + 1, getattr(self.settings, "diffusion_timesteps", 0))

    def _finished(self) -> bool:
        """Whether all steps are done, and the last one is validated."""
        s = self.settings
        return s.max_steps <= self.step == self.validated if s.max_steps else self.epoch >= s.epochs

    # ---- training

    stopped = ""

    def _epoch(self, progress: Progress) -> None:
        """Train the rest of the current epoch, if any, and validate; a stop request ends it with a checkpoint from which it goes on."""
        settings, data = self.settings, self.data
        steps = list(self._plan(self.epoch, self.position).steps())
        if settings.max_steps:
            steps = steps[: max(0, settings.max_steps - self.step)]
        requests = [(m.indices, m.counts) for step in steps for m in step]
        loader = batches(data.train, requests, settings.num_workers, self.accelerator.device.type == "cuda")
        began = time.monotonic()
        for micros in steps:
            waited, timesteps = self._step(micros, loader)
            ages = data.train.age_steps[np.concatenate([m.shared for m in micros])]
            now = time.monotonic()
            self.tally.add(ages, timesteps, waited, now - began)
            began = now
            progress.update(1, reporting.step_note(self.row, settings.loss_key, self.epoch, self.tally.wait_share))
            if self.stopped:
                break
            if self.saver.due():
                self.saver.newest()
        if not self.stopped:
            if self.saver.due(EPOCH_SAVE_S):
                self.saver.newest()  # a validation may take long
            self._validate()
        if self.stopped or self.saver.due(EPOCH_SAVE_S):
            self.saver.newest(must=bool(self.stopped))

    def _step(self, micros: list[MicroBatch], loader: Any) -> tuple[float, np.ndarray | None]:
        """One optimiser step. Returns the seconds waited for data and the diffusion timesteps of all processes (None for regression)."""
        settings, data, accelerator, device = self.settings, self.data, self.accelerator, self.accelerator.device
        shared = np.concatenate([m.shared for m in micros])
        valid = int(
            data.train.valid_actions[shared].sum()
        )  # action steps that count, over all processes and micro-batches
        lr = learning_rate(self.settings, self.step, self._done())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if settings.dropout:
            torch.manual_seed(step_seed(settings.seed, self.step, self.rank))
        generator = torch.Generator().manual_seed(step_seed(settings.seed, self.step))
        self.model.train()
        waited, timesteps = 0.0, []
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, stop requests
        for number, micro in enumerate(micros):
            before = time.monotonic()
            batch = next(loader)
            waited += time.monotonic() - before
            drawn = self.policy.draw(
                micro.size, generator
            )  # of all processes: the noise belongs to the place in the draws
            if "timestep" in drawn:
                timesteps.append(drawn["timestep"][: len(micro.shared)].flatten().numpy())
            own = slice(micro.offset, micro.offset + settings.batch_size)
            draws = {k: v[own].to(device) for k, v in drawn.items()}
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            last = number == len(micros) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                loss = self.model(batch, draws)  # (B, H), through the wrapped module: it averages the gradients
                counted = loss.float() * batch["action_mask"] * batch["count"][:, None]
                sums[0] += counted.detach().double().sum()
                if settings.sensor_enabled:
                    counted = counted * torch.where(batch["sensor_mask"], settings.sensor_loss_weight, 1.0)[:, None]
                accelerator.backward(counted.sum() * (self.world / valid))
        norm = accelerator.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        sums[1] = float(self.stop.asked is not None)
        total, stop = accelerator.reduce(sums, "sum").tolist() if self.world > 1 else sums.tolist()
        if not math.isfinite(total) or not math.isfinite(float(norm)):
            raise UserError(
                f"The loss is not finite at step {self.step + 1}; lower --lr ({settings.lr:g}) or look for spoilt values in the data (notebook 01)."
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.position += len(shared)
        self.averaged.update(self.policy, self.step, self.lora)
        self.stopped = self._asked if stop else ""
        self._row(shared, total / valid, lr, float(norm), timesteps, waited)
        return waited, np.concatenate(timesteps) if timesteps else None

    def _done(self) -> float:
        """The share of the run that is done, whatever the number of processes."""
        s = self.settings
        return (
            self.step / s.max_steps if s.max_steps else (self.epoch + self.position / len(self.data.train)) / s.epochs
        )

    def _row(self, shared: np.ndarray, loss: float, lr: float, norm: float, timesteps: list, waited_s: float) -> None:
        self.row = reporting.step_row(self, shared, loss, lr, norm, timesteps, waited_s)
        if self.log:
            self.log.log(self.row)

    # ---- validation, checkpoints, the end

    @property
    def _asked(self) -> str:
        """Who asked for a stop, where at least one process was asked."""
        return self.stop.asked or "another process's signal"

    def _validate(self) -> None:
        """Validate, close the epoch where its draws are used up, log. A stop request ends it early: then nothing changes, it is still due."""
        s, found = self.settings, {}
        if self.data.val is not None:
            reduce = (lambda x: self.accelerator.reduce(x, "sum")) if self.world > 1 else (lambda x: x)
            options = (max(s.batch_size, 16), self.rank, self.world, reduce, s.seed, self.accelerator.autocast)
            with self.live.using(self.averaged.adapter) if self.live else contextlib.nullcontext():
                samples = LiveSamples(self.data.val, self.live) if self.live else self.data.val
                found = validate(self.averaged.policy, samples, *options, lambda: self.stop.asked is not None)
            if found is None:
                self.stopped = self._asked
                return
        part = self.position / len(self.data.train)
        if part >= 1:
            self.epoch, self.position = self.epoch + 1, 0
        epochs = self.epoch + (round(part, 4) if part < 1 else 0)
        row = {"epoch": epochs, "step": self.step, "elapsed_s": round(self._elapsed(), 3), **self.tally.row(), **found}
        self.validated, self.tally = self.step, self._new_tally()
        if found:
            self.metrics = found
            if found["val/action_loss"] < self.best.get("action_loss", math.inf):
                self.best = {
                    "action_loss": found["val/action_loss"],
                    "step": self.step,
                    "epoch": epochs,
                    "metrics": found,
                }
                self.saver.best()
        if self.main:
            print("\n".join(reporting.epoch_lines(row, s.num_workers)), flush=True)
        if self.log:
            self.log.log(row)

    def _end(self) -> dict[str, Any]:
        results = reporting.results(self)
        if self.main:
            if self.stopped:
                print(
                    f"stopped by {self.stopped} at step {self.step}; {self.latest} is saved, go on with --resume",
                    flush=True,
                )
            else:
                self.saver.final()
            path = self.run_dir / "results.json"
            with needing_room(path):
                write_json(path, results)
        self.accelerator.wait_for_everyone()
        return results

    def _elapsed(self) -> float:
        return self.elapsed_s + time.monotonic() - self.started

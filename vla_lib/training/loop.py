"""The training loop, for both models, on one process or many. `train` is the whole of it, read from top to bottom.

How equal results are had: every random number follows from (seed, epoch) or (seed, step) and the sample's place among
all processes' draws, never from a process's own generator. The loss of a step is a sum over its valid action steps
divided by their number over all processes and micro-batches, which each process knows from its tables. So two
processes of batch b do what one of batch 2b does, and a resumed run does what the uninterrupted one does."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from vla_lib.core.errors import UserError, needing_room
from vla_lib.core.loader import load
from vla_lib.core.owner import owned
from vla_lib.core.progress import Progress
from vla_lib.core.run_folder import new_folder, write_results
from vla_lib.policy.policy import Policy
from vla_lib.training import reporting
from vla_lib.training.checkpoint import (
    CheckpointWriter,
    check_previous,
    load_weights,
    read_previous,
    read_stage1,
    refuse_taken,
)
from vla_lib.training.data import TrainingData, prepare_data
from vla_lib.training.live_vlm import LivePolicy, LiveSamples, LiveVlm
from vla_lib.training.metrics import MetricsLog, truncate
from vla_lib.training.process import StopRequest, open_accelerator
from vla_lib.training.samples import training_statistics
from vla_lib.training.schedule import Schedule, step_seed
from vla_lib.training.settings import TrainingSettings
from vla_lib.training.state import Tally, TrainState
from vla_lib.training.validation import validate

EPOCH_SAVE_S = 2.0  # epochs and validations shorter than this do not each write a checkpoint


def train(settings: TrainingSettings) -> dict[str, Any]:
    """Train, and return what results.json holds. Raises UserError for bad input, a lost checkpoint, or too little
    memory.

    Below, B is the batch size of one process, H the actions of a chunk.
    """
    with contextlib.ExitStack() as opened:  # closed in reverse order, however this ends
        accelerator = opened.enter_context(open_accelerator(settings))
        stop = opened.enter_context(StopRequest())
        main, device = accelerator.is_main_process, accelerator.device
        rank, world = accelerator.process_index, accelerator.num_processes

        def summed(values: Tensor) -> Tensor:  # over all processes
            return accelerator.reduce(values, "sum") if world > 1 else values

        # ---- the run folder: a run is gone on with, or begun where there is none; one is never trained over
        run_dir = settings.run_dir or _new_run_dir(settings, main)
        latest = run_dir / "checkpoints" / settings.checkpoints.latest
        # before anything is looked at: of two that are started together the second one sees the first one's checkpoint
        owner = opened.enter_context(owned(run_dir)) if main else None
        before = read_previous(settings, latest) if settings.resume else None
        if before is None:
            taken = refuse_taken(latest)
            accelerator.wait_for_everyone()  # all have looked before anyone writes
            if taken:
                raise UserError(taken)
        if main:
            opened.enter_context(reporting.recorded(run_dir, settings, stop))
        opened.enter_context(reporting.memory_remedies(settings))

        # ---- data, weights, optimiser
        data = prepare_data(settings, before["split"] if before else None)
        if main:
            print("\n".join(reporting.data_lines(data, settings.dataset_root)), flush=True)
        if before is not None:
            check_previous(before, data.binding, data.fingerprints, data.episode_weights, str(latest))
        state, model = build(settings, data, accelerator)
        if before is not None:
            state.load_state_dict(before, str(latest))
        schedule = Schedule(settings, data.weights, rank, world)
        held_out: Any = data.val
        if data.val is not None and state.live is not None:
            held_out = LiveSamples(data.val, state.live, state.averaged_adapter)
        if main:
            count = sum(weight.numel() for weight in state.trained.parameters())
            precision = accelerator.mixed_precision.replace("no", "float32")
            threads = f"{torch.get_num_threads()} CPU thread(s) each"
            print(f"{count:,} parameters, {world} process(es) on {device.type}, {threads}, {precision}", flush=True)
            if before is not None:
                print(f"resumed {latest} at step {state.step}, epoch {state.epoch}", flush=True)

        # ---- metrics and checkpoints, which the main process alone writes
        log = None
        if main:
            truncate(run_dir / "metrics.jsonl", state.step, state.validated)
            log = MetricsLog(run_dir, settings.project, settings.wandb_mode, settings.record(), state.wandb_id)
            opened.callback(log.close)
        run = {
            "front_door": settings.name,
            "policy_config": state.policy.config.record(),
            "settings": settings.record(),
            "binding": data.binding,
            "split": data.split,
        }
        compared = {"fingerprints": data.fingerprints, "weights": data.episode_weights, "world": world}
        writer = CheckpointWriter(run_dir, settings, run, compared, owner)
        if before is None:
            writer.newest(state.state_dict())  # there is always something to resume from

        label = settings.name + (f" (from step {state.step})" if state.step else "")
        with Progress(schedule.steps_left(state), label, "steps", settings.log_every_s, main) as progress:
            while not stop.agreed and not schedule.finished(state):
                # ---- the optimiser steps to the end of the epoch, or of the run; none where only a validation is due
                steps = schedule.steps(state)
                requests = [micro.indices for micros in steps for micro in micros]
                data.train.draw_delays(settings.seed, state.epoch)
                pin = device.type == "cuda"
                loader = load(data.train, settings.num_workers, pin, lambda: stop.asked, sampler=requests)
                began = time.monotonic()
                for micros in steps:
                    lr = schedule.learning_rate(state)
                    for group in state.optimizer.param_groups:
                        group["lr"] = lr
                    shared = np.concatenate([micro.shared for micro in micros])  # samples of all processes
                    valid = int(data.train.valid_actions[shared].sum())  # action steps that count, of all processes
                    if settings.dropout:
                        torch.manual_seed(step_seed(settings.seed, state.step, rank))
                    generator = torch.Generator().manual_seed(step_seed(settings.seed, state.step))
                    model.train()
                    waited_s = 0.0
                    timesteps: list[np.ndarray] = []  # that the diffusion head drew, for all processes
                    losses: list[Tensor] = []  # (B,) of each micro-batch, to name the sample that spoilt a step
                    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, processes asked to stop
                    for micro in micros:
                        asked_at = time.monotonic()
                        try:
                            batch = next(loader)  # see SampleSet.batch
                        except KeyboardInterrupt:  # asked to stop, and no batch comes: the others cannot be asked
                            writer.newest(state.state_dict())
                            raise
                        waited_s += time.monotonic() - asked_at
                        batch["sample"], batch["count"] = map(torch.from_numpy, (micro.indices, micro.counts))  # (B,)
                        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
                        # drawn for all processes: noise belongs to a place among all draws, not to a process
                        drawn = state.policy.draw(micro.size, generator)
                        if "timestep" in drawn:
                            timesteps.append(drawn["timestep"][: len(micro.shared)].flatten().numpy())
                        own = slice(micro.offset, micro.offset + settings.batch_size)
                        draws = {k: v[own].to(device) for k, v in drawn.items()}
                        # gradients of all processes are averaged once a step, with its last micro-batch
                        last = micro is micros[-1]
                        with contextlib.nullcontext() if last else accelerator.no_sync(model):
                            loss = model(batch, draws)  # (B, H); the wrapped module averages the gradients
                            counted = loss.float() * batch["action_mask"] * batch["count"][:, None]
                            sums[0] += counted.detach().double().sum()
                            losses.append(counted.detach().sum(1))
                            if settings.sensor_enabled:
                                weight = torch.where(batch["sensor_mask"], settings.sensor_loss_weight, 1.0)
                                counted = counted * weight[:, None]
                            # `world` undoes the average over the processes: what is wanted is the sum over `valid`
                            accelerator.backward(counted.sum() * (world / valid))
                    norm = float(accelerator.clip_grad_norm_(model.parameters(), settings.clip_norm))
                    # one sum for both: all processes learn in the same step that they are to stop
                    sums[1] = float(stop.asked is not None)
                    total, stops = summed(sums).tolist()
                    if not math.isfinite(total) or not math.isfinite(norm):
                        numbers = np.concatenate([micro.indices for micro in micros])
                        worst = data.train.largest(numbers, torch.cat(losses).double().cpu().numpy())
                        # known to all processes alike, as the loss of all is one
                        raise UserError(reporting.not_finite(settings, state.step + 1, gather_object([worst])))
                    state.take_step(len(shared))
                    if stops:
                        stop.agree()

                    row = {
                        "step": state.step,
                        "elapsed_s": round(state.elapsed_s, 3),
                        settings.loss_key: total / valid,
                        "train/lr": lr,
                        "train/grad_norm": norm,
                        "train/loader_wait_s": round(waited_s, 4),
                        "train/vl_reuse_counter": float(data.train.age_steps[shared].mean()),
                    }
                    if settings.sensor_enabled:
                        row["train/sensor_samples"] = int(data.train.sensor_full[shared].sum())
                    if timesteps:
                        row["train/diffusion_t"] = float(np.concatenate(timesteps).mean())
                    if device.type == "cuda":
                        row[reporting.GPU] = torch.cuda.max_memory_allocated() / 2**30
                    if log:
                        log.log(row)
                    now = time.monotonic()
                    state.tally.add(data.train.age_steps[shared], timesteps, waited_s, now - began)
                    began = now
                    note = reporting.step_note(row, settings.loss_key, state.epoch, state.tally.wait_share)
                    progress.update(1, note)
                    if stop.agreed:
                        break
                    if writer.due(state.step):
                        writer.newest(state.state_dict())

                # ---- validation, of the averaged weights; a stop request leaves it out: then it is still due
                if not stop.agreed:
                    if writer.due(state.step, EPOCH_SAVE_S):
                        writer.newest(state.state_dict())  # a validation may take long
                    found: dict[str, float] | None = {}
                    if held_out is not None:
                        size = max(settings.batch_size, 16)
                        options = (size, rank, world, summed, settings.seed, accelerator.autocast)
                        found = validate(state.averaged, held_out, *options, lambda: stop.asked is not None)
                    if found is None:
                        stop.agree()
                    else:
                        row = state.close_validation(found, len(data.train))
                        if state.best.get("step") == state.step:
                            writer.best(state.state_dict())
                        if main:
                            print("\n".join(reporting.epoch_lines(row, settings.num_workers)), flush=True)
                        if log:
                            log.log(row)
                if stop.agreed or writer.due(state.step, EPOCH_SAVE_S):
                    writer.newest(state.state_dict(), must=bool(stop.agreed))

        # ---- the end: results.json, and the last checkpoint
        results = reporting.results(state, data, bool(stop.agreed), latest, world)
        if stop.agreed and main:
            where = f"at step {state.step}; {latest} is saved, go on with --resume"
            print(f"stopped by {stop.agreed} {where}", flush=True)
        if not stop.agreed:
            writer.final(state.state_dict())
        if main:
            with needing_room(run_dir / "results.json"):
                write_results(run_dir, results)
        accelerator.wait_for_everyone()
        return results


def build(settings: TrainingSettings, data: TrainingData, accelerator: Accelerator) -> tuple[TrainState, nn.Module]:
    """A run's state at its beginning, and the module to train, wrapped for the process group."""
    torch.manual_seed(settings.seed)
    policy = Policy(data.policy_config(settings))
    if settings.live_vlm and settings.stage1_checkpoint is not None:
        load_weights(policy, read_stage1(settings)["policy"], str(settings.stage1_checkpoint))
    elif accelerator.is_main_process:
        policy.normaliser.load_statistics(training_statistics(data.train))
    policy.to(accelerator.device)
    trained: nn.Module = policy
    live = None
    if settings.live_vlm:
        live = LiveVlm(settings, data, accelerator.device)
        live.prepare(data, accelerator, settings.log_every_s)
        trained = LivePolicy(policy, live, data.train)
    if accelerator.num_processes > 1:
        # one process made the statistics; parameters are sent along, so that all start from the same bits
        for tensor in trained.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
    tally = Tally(data.train.oldest_steps + 1, getattr(settings, "diffusion_timesteps", 0))
    return TrainState(settings, policy, live, tally), accelerator.prepare_model(trained)


def _new_run_dir(settings: TrainingSettings, main: bool) -> Path:
    """A new folder below runs/, the same for all processes."""
    if settings.resume:
        raise UserError("--resume needs --run-dir, the folder of the run to go on with.")
    return Path(broadcast_object_list([str(new_folder(settings.name)) if main else ""])[0])

"""A lab book as trainings, a sweep and an evaluation leave it, written in a moment: files alone, nothing is trained."""

import math
from pathlib import Path

from vla_lib.core.files import append_jsonl, write_json, write_text
from vla_lib.core.run_folder import RunFolder
from vla_lib.workbench import sweeps
from vla_lib.workbench.queue import Queue


def write_training(path: Path, lr: float, error: float, seed: int = 0, **more: object) -> Path:
    """A finished training: its error falls from 1 to `error`."""
    run = RunFolder.create("04_train_async", {"lr": lr, "seed": seed, **more}, path=path)
    for step in range(1, 41):
        value = error + (1 - error) * math.exp(-step / 8)
        append_jsonl(path / "metrics.jsonl", {"step": step, "elapsed_s": 3.0 * step, "train/loss_step": value})
        if step % 10 == 0:
            append_jsonl(path / "metrics.jsonl", {"step": step, "epoch": step / 10, "val/action_loss": value * 1.1})
    write_json(path / "results.json", {"val_action_loss": error, "val_mae_mm": 2 * error, "step": 40})
    (path / "checkpoints").mkdir()
    for name in ("qwen_vla_async.pt", "qwen_vla_async_best.pt"):
        write_text(path / "checkpoints" / name, "weights")
    run.finish("done")
    return path


def write_sweep(notebook: Path) -> Path:
    """A search over the learning rate: three settings, two seeds each; the error is the learning rate's distance from
    0.01, and a little of the seed."""
    plan = sweeps.plan_sweep(str(notebook), [], {}, ["lr=1e-4..1e-1:log"], trials=3, seeds=2)
    queue = Queue.open(plan)
    while claim := queue.claim():
        lr, seed = float(claim.words["lr"]), int(claim.words["seed"])
        write_training(claim.run, lr, 0.1 + abs(math.log10(lr) + 2) / 5 + 0.01 * seed, seed)
        queue.tell(claim, "done")
    queue.worker.release()
    assert queue.record
    queue.record.finish("done")
    return queue.path


def write_evaluation(path: Path, wins: dict[Path, list[bool]]) -> Path:
    """Notebook 06 on trainings: who hit which phantom."""
    run = RunFolder.create("06_evaluate", {"checkpoint": "first"}, path=path)
    loops = {}
    for training, won in wins.items():
        rollouts = [{"seed": 1000 + number, "success": one} for number, one in enumerate(won)]
        summary = {"rollouts": len(won), "successes": sum(won), "success_rate": sum(won) / len(won)}
        settings = {"checkpoint": str(training / "checkpoints" / "qwen_vla_async_best.pt")}
        loops[training.name] = {"settings": settings, "rollouts": rollouts}
        loops[training.name]["summary"] = {**summary, "interval_95": [0.2, 0.9]}
    first, *others = loops
    results = {"name": first, "compared_with": dict.fromkeys(others, {}), "closed_loop": loops}
    write_json(path / "results.json", results)
    run.finish("done")
    return path

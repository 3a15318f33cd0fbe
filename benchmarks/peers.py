"""LeRobot's ACT and Diffusion Policy beside our two policies: same episodes, processor time, rig, runner and safety.

    python -m benchmarks.peers --dataset-root DATA --lerobot-python PYTHON --out FOLDER

DATA is a prepared recording of the simulated rig. Each training of ours gets about --minutes of processor time on one
thread, and needs a VL cache, which is built first, on one thread too. LeRobot's get what the longer of ours took and
the cache's time on top. Ours are trained side by side, then LeRobot's. LeRobot runs in a Python of its own; its
policies see exported pictures at the size given, current ones, and no sensor, for which they have no input. Ours see VL
features and the sensor. No net here has pretrained weights.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Gt
from PIL import Image

from benchmarks.__main__ import machine
from vla_lib.core import frontdoor
from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json, write_json
from vla_lib.core.settings import Settings, settings
from vla_lib.episodes.lerobot_export import ExportSettings, export
from vla_lib.evaluation.closed_loop import ClosedLoop, closed_loop, unseen_seeds
from vla_lib.evaluation.open_loop import evaluate_open_loop, open_loop_metrics
from vla_lib.evaluation.rollout import rig_of, rig_settings, run_on_rig
from vla_lib.evaluation.settings import RolloutSettings
from vla_lib.evaluation.sim_robot import make_rig, prepare_gl, sim_limits
from vla_lib.runtime.clock import Latency
from vla_lib.runtime.robot_io import Observation
from vla_lib.runtime.run_log import Tick
from vla_lib.runtime.runner import RunnerSettings
from vla_lib.runtime.safety import SafetyLimits
from vla_lib.runtime.vlm_worker import Features
from vla_lib.training.checkpoint import load_policy, read_checkpoint
from vla_lib.training.data import prepare_data
from vla_lib.training.settings import AsyncSettings, DiffusionSettings

PEERS = {"LeRobot ACT": "act", "LeRobot diffusion": "diffusion"}
OURS = {  # front door, checkpoint
    "async": ("train_async", "qwen_vla_async_final.pt"),
    "diffusion": ("train_diffusion", "diffusion_stage1_latest.pt"),
}
BATCH = 16
RECIPE = f"--batch-size {BATCH} --grad-accum-steps 1 --lr 1e-3 --dropout 0.1 --view-dropout 0.2 --token-noise 0.5"
RECIPE += " --weight-decay 0.1"  # the recipe of docs/FIGURES.md, for both
PEER_STEPS = 8  # of a chunk that a peer's policy executes: the default of LeRobot's diffusion policy
TRIAL_STEPS = 30  # that tell how many fit into the time


@settings
class PeerSettings(Settings):
    """Train and judge LeRobot's ACT and Diffusion Policy and our two policies on one recording of the rig."""

    dataset_root: Path  # prepared recording of the simulated rig
    lerobot_python: Path  # a Python that has LeRobot 0.4.4
    out: Path  # folder of datasets, checkpoints and results.json; what is there already is not made again
    minutes: Annotated[float, Gt(0)] = 30.0  # processor time of each training
    seeds: Annotated[int, Ge(1)] = 20  # unseen phantoms on which each policy is tried
    picture_width: Annotated[int, Ge(2)] = 160  # of the pictures that LeRobot's policies see
    picture_height: Annotated[int, Ge(2)] = 90
    max_time_s: Annotated[float, Gt(0)] = 30.0  # longest rollout


def main(settings: PeerSettings) -> dict[str, Any]:
    """Run all that is not in OUT yet; returns and writes machine, and per policy training, open and closed loop."""
    torch.set_num_threads(1)
    if once(settings.out / "settings.json", settings.record) != settings.record():
        raise UserError(f"{settings.out} was begun with other settings; give those, or another --out.")
    root = linked(settings.dataset_root, settings.out / "root")
    cache_s = once(settings.out / "cache.json", partial(cached, root))["cpu_s"]
    policies: dict[str, Any] = {}
    checkpoints = {name: settings.out / name / "run" / "checkpoints" / given[1] for name, given in OURS.items()}
    trained = side_by_side(
        {
            name: partial(once, settings.out / name / "training.json", partial(train, settings, root, name))
            for name in OURS
        }
    )
    for name, one in trained.items():
        policies[name] = {"training": one | {"cache_cpu_s": cache_s}}
    split = read_checkpoint(checkpoints["async"])["split"]
    if split != read_checkpoint(checkpoints["diffusion"])["split"]:
        raise UserError("The two trainings split the episodes differently; train them again into a new --out.")
    train_set, held_out = (exported(settings, side, split[side]) for side in ("train", "val"))
    peers = {
        name: Peer(settings, kind, settings.out / name.replace(" ", "_"), train_set) for name, kind in PEERS.items()
    }
    cpu_s = cache_s + max(one["training"]["cpu_s"] for one in policies.values())
    trained = side_by_side(
        {
            name: partial(once, peer.folder / "training.json", partial(peer.run, "train", cpu_s))
            for name, peer in peers.items()
        }
    )
    for name, peer in peers.items():
        policies[name] = {"training": trained[name] | {"cache_cpu_s": 0.0}}
        policies[name]["loader"] = once(peer.folder / "loader.json", partial(peer.run, "loader", 40))
        once(peer.folder / "asked.json", partial(peer.run, "ask", held_out))
        with np.load(peer.folder / "asked.npz") as asked:
            policies[name]["open_loop"] = open_loop_metrics(asked["predicted"], asked["target"], asked["mask"])
    baselines: dict[str, Any] = {}
    for name, checkpoint in checkpoints.items():
        baselines = evaluate_open_loop(checkpoint, root).metrics()
        policies[name] |= {"open_loop": baselines.pop("policy"), "loader": our_loader(root, name)}
    seeds = unseen_seeds(settings.seeds, [settings.dataset_root])
    for name, checkpoint in checkpoints.items():
        drive = partial(drive_ours, settings, root, checkpoint, seeds)
        policies[name]["closed_loop"] = once(settings.out / name / "closed_loop.json", drive)
    like = rig_settings(checkpoints["async"], root)
    for name, peer in peers.items():
        policies[name]["closed_loop"] = once(peer.folder / "closed_loop.json", partial(peer.drive, like, seeds))
    found = {"machine": machine(), "settings": settings.record(), "policies": policies, "baselines": baselines}
    write_json(settings.out / "results.json", found)
    print(json.dumps(found["machine"]), table(policies).to_string(index=False), sep="\n")
    for name, one in baselines.items():
        print(f"open loop of {name}: {one['translation_mae_mm']:.3f} mm, {one['rotation_mae_deg']:.3f} deg")
    return found


def once(path: Path, make: Callable[[], Any]) -> Any:
    """What `make()` gives, kept in a file: a benchmark of hours goes on where it was interrupted."""
    if not path.exists():
        write_json(path, make())
    return read_json(path)


def side_by_side(made: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each makes, all at once; each waits for a process of its own."""
    with ThreadPoolExecutor(len(made)) as pool:
        return dict(zip(made, pool.map(lambda make: make(), made.values()), strict=True))


# ---- ours


def linked(source: Path, root: Path) -> Path:
    """A root with everything of `source` but its cache, so that the cache's time can be taken."""
    root.mkdir(parents=True, exist_ok=True)
    for one in source.iterdir():
        if one.name != "cache" and not (root / one.name).is_symlink():
            (root / one.name).symlink_to(one.resolve())
    return root


def processor_s(module: str, *words: str | Path) -> float:
    """Run a front door of ours on one thread; the seconds of processor time that it took, with its children."""
    command = [sys.executable, "-m", f"vla_lib.{module}", *map(str, words), "--num-workers", "0"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, used = os.wait4(process.pid, 0)  # of this one alone: another may run beside it
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return used.ru_utime + used.ru_stime


def cached(root: Path) -> dict[str, float]:
    return {"cpu_s": processor_s("build_vl_cache", "--dataset-root", root, "--overwrite")}


def train(settings: PeerSettings, root: Path, name: str) -> dict[str, Any]:
    """Train one of ours for the time: first some steps, which tell how many fit into it."""
    module, checkpoint = OURS[name]

    def run(folder: str, steps: int) -> float:
        place = settings.out / name / folder
        shutil.rmtree(place, ignore_errors=True)  # of a run that was interrupted
        words = *RECIPE.split(), "--max-steps", str(steps), "--wandb-mode", "disabled"
        return processor_s(module, "--dataset-root", root, "--run-dir", place, *words)

    few, more = run("trial", TRIAL_STEPS), run("trial-2", 4 * TRIAL_STEPS)
    step_s = max((more - few) / (3 * TRIAL_STEPS), 1e-3)
    begin_s = few - TRIAL_STEPS * step_s  # imports, opening the data, validation
    steps = max(1, int((settings.minutes * 60 - begin_s) / step_s))
    cpu_s = run("run", steps)
    policy, _ = load_policy(settings.out / name / "run" / "checkpoints" / checkpoint)
    parameters = sum(one.numel() for one in policy.parameters())
    return {"steps": steps, "cpu_s": cpu_s, "step_s": step_s, "parameters": parameters, "batch": BATCH}


def our_loader(root: Path, name: str) -> dict[str, float]:
    """Samples a second of our reader: features, sensor window, state, chunk; batches as in training."""
    kind = AsyncSettings if name == "async" else DiffusionSettings
    data = prepare_data(kind(dataset_root=root))
    draws = np.random.default_rng(0).integers(0, len(data.train), (41, BATCH))
    data.train.batch(draws[0])
    begin = time.process_time()
    for numbers in draws[1:]:
        data.train.batch(numbers)
    return {"samples_per_s": draws[1:].size / (time.process_time() - begin)}


def drive_ours(settings: PeerSettings, root: Path, checkpoint: Path, seeds: list[int]) -> dict[str, Any]:
    how = rig_settings(checkpoint, root).record() | {"max_time_s": settings.max_time_s}
    return closed_loop({"one": RolloutSettings(**how)}, seeds, workers=1)["one"].results()


# ---- LeRobot's


def exported(settings: PeerSettings, side: str, keys: list[str]) -> Path:
    """The episodes of one side of our split as a LeRobot dataset."""
    root, out = settings.out / f"{side}-root", settings.out / f"lerobot-{side}"
    for key in keys:
        link = root / key
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to((settings.dataset_root / key).resolve(), target_is_directory=True)
    size = {"image_resize_width": settings.picture_width, "image_resize_height": settings.picture_height}
    export(ExportSettings(root, out, workers=1, **size))
    return out


class PeerExpert:
    """A peer's policy as the runner's expert: it keeps the observation before the current one, as LeRobot's does."""

    sensor_window = 0

    def __init__(self, process: Any, views: tuple[str, ...], size: tuple[int, int]):
        self.process, self.views, self.size = process, views, size
        self.before: tuple[np.ndarray, np.ndarray] | None = None
        self.asked_s: list[float] = []

    def pictures(self, pictures: Mapping[str, Any]) -> np.ndarray:
        shown = [Image.fromarray(np.asarray(pictures[view])).resize(self.size) for view in self.views]
        return np.stack([np.asarray(one) for one in shown])

    def compute(self, pictures: Mapping[str, Any], instruction: str) -> tuple[Any, Any]:
        """In place of VL features: the pictures."""
        return self.pictures(pictures), np.ones(1, bool)

    def watch(self, tick: Tick, seen: Observation) -> None:
        if set(self.views) <= set(seen.pictures):
            self.before = np.asarray(seen.state, np.float32), self.pictures(seen.pictures)

    def __call__(self, features: Features, age_s: float, state: np.ndarray, window: np.ndarray | None) -> np.ndarray:
        now = np.asarray(state, np.float32), np.asarray(features.tokens)
        before = self.before or now
        begin = time.perf_counter()
        sink, source = self.process.stdin, self.process.stdout
        asked = io.BytesIO()
        np.savez(asked, state=np.stack([before[0], now[0]]), pictures=np.stack([before[1], now[1]], axis=1))
        sink.write(asked.tell().to_bytes(8, "little") + asked.getvalue())
        sink.flush()
        answer = source.read(int.from_bytes(source.read(8), "little"))
        chunk = np.load(io.BytesIO(answer), allow_pickle=False)
        self.asked_s.append(time.perf_counter() - begin)
        return chunk


@dataclass(frozen=True)
class Peer:
    """One of LeRobot's policies, in a Python of its own."""

    settings: PeerSettings
    kind: str
    folder: Path
    train_set: Path

    def words(self, what: str, given: Any) -> list[str]:
        script = Path(__file__).with_name("lerobot_peer.py")
        return [
            str(word)
            for word in (self.settings.lerobot_python, script, self.kind, what, self.train_set, self.folder, given)
        ]

    @property
    def environment(self) -> dict[str, str]:
        """Without our modules, and without any hub."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

    def run(self, what: str, given: Any) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        words = self.words(what, given)
        done = subprocess.run(words, stdout=subprocess.PIPE, check=True, env=self.environment, text=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def drive(self, like: RolloutSettings, seeds: list[int]) -> dict[str, Any]:
        """The same phantoms, runner and limits as ours; pictures are current, and no time is taken off for anything."""
        prepare_gl()
        features = read_json(self.train_set / "meta" / "info.json")["features"]
        views = tuple(name.removeprefix("observation.images.") for name in features if "images" in name)
        how, size = (
            RunnerSettings(10.0, 1, PEER_STEPS, views),
            (self.settings.picture_width, self.settings.picture_height),
        )
        rig = make_rig(**rig_of(like, how) | {"max_time_s": self.settings.max_time_s})
        rows, asked, none = [], [], {"vlm": Latency(0.0, 0.0), "expert": Latency(0.0, 0.0)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(self.words("serve", "-"), env=self.environment, **pipes) as process:
            for seed in seeds:
                expert = PeerExpert(process, views, size)
                given = rig, expert, expert.compute, seed, how, SafetyLimits(**sim_limits()), none, expert.watch
                rows.append(run_on_rig(*given, like.instruction))
                asked += expert.asked_s
                print(f"LeRobot {self.kind}: seed {seed}, {rows[-1]['reason'] or 'success'}", flush=True)
            process.stdin.close()
        rig.close()
        return ClosedLoop(like, rows).results() | {"seconds_a_prediction": float(np.median(asked))}


def table(policies: Mapping[str, Any]) -> pd.DataFrame:
    """One row a policy."""
    rows = []
    for name, one in policies.items():
        training, opened, closed = one["training"], one["open_loop"], one["closed_loop"]["summary"]
        low, high = (100 * value for value in closed["interval_95"])
        rows.append(
            {
                "policy": name,
                "success": f"{closed['successes']} of {closed['rollouts']}",
                "95 % interval": f"{low:.0f} to {high:.0f} %",
                "punctured": closed["punctured"],
                "open loop (mm, deg)": f"{opened['translation_mae_mm']:.3f}, {opened['rotation_mae_deg']:.3f}",
                "steps x batch": f"{training['steps']} x {training['batch']}",
                "CPU s a step": f"{training['cpu_s'] / training['steps']:.3f}",
                "CPU s": f"{training['cpu_s']:.0f}",
                "CPU s of the cache": f"{training['cache_cpu_s']:.0f}",
                "parameters": f"{training['parameters'] / 1e6:.1f} M",
                "samples/s read": f"{one['loader']['samples_per_s']:.0f}",
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    frontdoor.start(PeerSettings, main)

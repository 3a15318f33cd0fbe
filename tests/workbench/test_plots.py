"""Every plot, with long Korean names: its text is read at the size shown, nothing covers anything, and colour never
tells alone."""

import importlib
import itertools
import os
import pkgutil
import warnings
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from tests.episodes.raw_episodes import Raw
from vla_lib.episodes import Episode
from vla_lib.evaluation.closed_loop import ClosedLoop
from vla_lib.evaluation.open_loop import OpenLoop
from vla_lib.evaluation.rollout import Moment
from vla_lib.features.binding import TokenLayout
from vla_lib.features.cache import EpisodeFeatures
from vla_lib.runtime.robot_io import Observation
from vla_lib.runtime.run_log import RunLog, Tick
from vla_lib.workbench import plots
from vla_lib.workbench.plots import comparison, evaluation, features, rates, rehearsal, rollouts, style, training

PAGE_PX, LEAST_PX = 1048, 9  # a report's width, to which a wider picture is shrunk
NAME = "흰색_실리콘_하얀_원_바늘_삽입_데이터셋"
VIEWS = ("View1_left", "View2_left", "View3_left", "View4_left", "View5")
RNG = np.random.default_rng(0)


def episode(folder: Path) -> Episode:
    t = np.arange(0, 2, 0.01)
    raw = Raw("F1", seconds=2.0, right=True, row_times=t[(t < 0.7) | (t > 1.0)])
    return Episode.open(raw.write(folder, f"recv_all_20251020_224016_{NAME}"))


def predictions() -> OpenLoop:
    names = ("policy", "VL masked", "sensor masked", "zero", "mean", "persistence")
    count, of = 40, np.array([f"{NAME}/episode_1"] * 40)
    chunks = {name: RNG.normal(0, 1, (count, 8, 7)) for name in names}
    phase = np.array(["free", "contact"] * 20)
    return OpenLoop(
        chunks, RNG.normal(0, 1, (count, 8, 7)), np.ones((count, 8), bool), of, of, np.arange(count), phase, 10.0
    )


def steps(count: int = 60) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for k in range(1, count):
        row = {"step": k, "elapsed_s": 2.0 * k, "train/loss_step": 1 / k, "train/lr": 1e-4, "train/loader_wait_s": 0.1}
        rows.append(row | {training.GPU: 3.0, "train/vl_reuse_counts": [3, 2, 1], "train/diffusion_t_counts": [4, 5]})
        if k % 20 == 0:
            held_out = {f"val/baseline_{name}_action_loss": 0.5 for name in training.BASELINES}
            rows.append({"step": k, "val/action_loss": 1 / k, **held_out})
    return rows


def cached(number: int) -> EpisodeFeatures:
    layout = TokenLayout(VIEWS[:2], 2, 3)
    tokens, mask = torch.from_numpy(RNG.normal(0, 1, (12, 13, 8))).float(), torch.ones(12, 13, dtype=torch.bool)
    mask[0, layout.view_slice(VIEWS[1])] = False
    return EpisodeFeatures(tokens, mask, torch.arange(0, 36, 3), layout, f"{NAME}/{NAME}_{number}", {})


def moments() -> list[Moment]:
    modes = ("act", "wait", "hold", "retreat", "stop")
    pictures = {view: np.zeros((90, 160, 3), np.uint8) for view in VIEWS}
    ticks = [
        Tick(k, k / 10, 0.2, modes[k // 6], "stale sensor" if k > 11 else "", vl_age_s=0.1 + k / 99, expert_ms=5.0)
        for k in range(30)
    ]
    return [Moment(tick, 0.1, RNG.random((5, 1026)) * 90, tick.t_s + np.arange(5) / 50, pictures) for tick in ticks]


def rollout(seed: int, success: bool = True) -> dict[str, object]:
    t = np.arange(0, 5, 0.1)
    position = np.stack([170 + 5 - t, 4 - 0.8 * t, 150 - 4 * t], 1)
    truth = {"target_xy_mm": (170.0, 1.0), "asked_depth_mm": 1.5, "membrane_z_mm": 133.0, "surface_z_mm": 135.0}
    judged = {"seed": seed, "success": success, "punctured": True, "reason": "" if success else f"too deep: {seed}"}
    figures = {"lateral_mm": 0.2 * seed, "depth_error_mm": 0.1, "peak_force_mN": 80.0 + seed, "time_s": 9.0 + seed}
    path = {"t_s": t, "position_mm": position, "force_mN": 20 * t}
    return judged | figures | {"path": path, "truth": truth, "runner": {"modes": {}}, "frames": moments()[::6]}


def closed_loop(number: int) -> ClosedLoop:
    return ClosedLoop(None, [rollout(seed, (seed + number) % 2 == 0) for seed in range(6)])  # type: ignore[arg-type]


def study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    made.optimize(lambda trial: trial.suggest_float("lr", 1e-4, 1e-1, log=True) + trial.suggest_int("width", 1, 9), 12)
    return made


def summary(verdict: str, seconds: float) -> dict[str, object]:
    hz = {"robot_hz": 100.0, "pose_hz": 60.0, "sensor_hz": 650.0, "camera_hz": 5.0}
    return {"verdict": verdict, "seconds": seconds, "valid": 20, "steps": 25, **hz}


def checked() -> pd.DataFrame:
    stored = [RNG.normal(0, 1, 6) for _ in range(8)]
    flags = {"picture": True, "sensor": True, "sample": True, "position_mm": 1e-4, "rotation_deg": 1e-3}
    return pd.DataFrame([{"seconds": k, "stored": s, "recomputed": s, **flags} for k, s in enumerate(stored)])


COVERED = [{"dataset": f"{NAME}_{k}", "covered": 3, "stale": 1, "missing": 1, "ticks": 40, "MB": 1.5} for k in range(3)]
BINDING = {"dtype": "float32", "views": list(VIEWS), "hidden_size": 8, "pooling": "grid:2x3"}
FRAMES = {view: [None, np.zeros((90, 160, 3), np.uint8)] for view in VIEWS[:2]}
WEIGHTS = [{"dataset": f"{NAME}_{k}", "train_steps": 3, "weight": 1.0, "share": 0.5} for k in range(2)]
WINS = {"success_rate": 0.5, "rollouts": 20, "interval_95": [0.3, 0.7]}
FEATURES = [cached(number) for number in range(5)]
LOOPS = {f"{NAME}_{k}": closed_loop(k) for k in range(3)}
PICTURES = {view: np.zeros((90, 160, 3), np.uint8) for view in VIEWS}
SEEN = Observation(1.0, np.zeros(12), 1.0, PICTURES, {}, RNG.random((30, 1026)), np.arange(30) / 650)
SWEEP = [{"setting": f"dataset_root={NAME}_{k // 2}", "value": k} for k in range(8)]
MEANS = pd.DataFrame({"setting": [one["setting"] for one in SWEEP[::2]], "mean": [0.5, 2.5, 4.5, 6.5]})

DRAWN = {
    rates.intervals: lambda folder: rates.intervals(episode(folder)),
    rates.timeline: lambda folder: rates.timeline(episode(folder)),
    rates.offset_evidence: lambda folder: rates.offset_evidence(episode(folder)),
    rates.verdicts: lambda _: rates.verdicts(
        [summary(v, k) for k, v in enumerate(("good", "usable with exclusions", "rejected"), 3)]
    ),
    rates.recheck: lambda _: rates.recheck(checked(), NAME),
    evaluation.error_by_step: lambda _: evaluation.error_by_step(predictions().metrics(), 10.0),
    evaluation.error_by_dimension: lambda _: evaluation.error_by_dimension(predictions().metrics()),
    evaluation.predicted_against_true: lambda _: evaluation.predicted_against_true(predictions()),
    evaluation.chunks_over_path: lambda _: evaluation.chunks_over_path(predictions(), f"{NAME}/episode_1"),
    training.training_curves: lambda _: training.training_curves(steps()),
    training.reuse_counts: lambda _: training.reuse_counts(steps(), 10.0),
    training.timestep_counts: lambda _: training.timestep_counts(steps(), 100),
    training.weights_share: lambda _: training.weights_share(WEIGHTS),
    comparison.learning_curves: lambda _: comparison.learning_curves({f"{NAME}_{k}": steps() for k in range(8)}),
    comparison.success: lambda _: comparison.success({f"{NAME}_{k}": {"summary": WINS} for k in range(4)}),
    comparison.seed_spread: lambda _: comparison.seed_spread(SWEEP, MEANS, "val_action_loss"),
    comparison.of_study: lambda _: comparison.of_study(study(), "history", "val_action_loss"),
    features.coverage: lambda _: features.coverage(COVERED),
    features.pooling_sizes: lambda _: features.pooling_sizes(BINDING, 40, (6, 11)),
    features.pca_maps: lambda _: features.pca_maps(FEATURES[0], FRAMES, [0, 5]),
    features.similarity: lambda _: features.similarity(FEATURES),
    features.probe: lambda _: features.probe(features.fit_probe(FEATURES, [RNG.normal(0, 1, (12, 3))] * 5)),
    rollouts.rollout: lambda _: rollouts.rollout(rollout(1), f"{NAME}: seed 1"),
    rollouts.from_above: lambda _: rollouts.from_above([rollout(1), rollout(2, False)]),
    rollouts.sensor: lambda _: rollouts.sensor(RNG.random((40, 1026)), np.arange(40) / 50),
    rollouts.montage: lambda _: rollouts.montage([PICTURES] * 3, ["begin", "middle", "end"]),
    rollouts.success: lambda _: rollouts.success(LOOPS),
    rollouts.errors: lambda _: rollouts.errors(LOOPS),
    rollouts.paired: lambda _: rollouts.paired(*list(LOOPS.values())[:2], list(LOOPS)[:2]),
    rollouts.frame_strip: lambda _: rollouts.frame_strip(rollout(1), VIEWS, f"{NAME}: seed 1"),
    rehearsal.moment: lambda _: rehearsal.moment(moments(), 150.0),
    rehearsal.rig: lambda _: rehearsal.rig(SEEN),
    rehearsal.timing: lambda _: rehearsal.timing(RunLog([one.tick for one in moments()], vlm_ms=[30.0, 31.0])),
}


def texts(figure: Figure) -> list[Text]:
    """What is read: visible, not empty, inside the figure or not."""
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    hidden = {
        id(part) for axes in figure.axes if not (axes.get_visible() and axes.axison) for part in axes.findobj(Text)
    }
    return [
        text
        for text in found
        if id(text) not in hidden or text in figure.texts or text.axes and text in text.axes.texts
    ]


def small(figure: Figure) -> list[str]:
    """Texts below 9 pixels at the size shown."""
    shrunk = min(1.0, PAGE_PX / (figure.get_figwidth() * figure.dpi))
    pixels = {text: text.get_fontsize() * figure.dpi / 72 * shrunk for text in texts(figure)}
    return [f"{text.get_text()}: {size:.1f} px" for text, size in pixels.items() if size < LEAST_PX]


Boxes = list[tuple[str, Bbox]]


def boxes(figure: Figure) -> Boxes:
    """Texts with the places that they take, but labels of ticks outside of their axis, and texts in space."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    flat = [axes for axes in figure.axes if not hasattr(axes, "zaxis")]
    outside = {id(text) for axes in figure.axes if axes not in flat for text in axes.findobj(Text)}
    for axes, number in itertools.product(flat, (0, 1)):
        low, high = axes.get_window_extent(renderer).get_points()[:, number]
        axis = (axes.xaxis, axes.yaxis)[number]
        for label in axis.get_ticklabels(which="both"):
            middle = label.get_window_extent(renderer).get_points()[:, number].mean()
            if not axis.get_visible() or not low - 1 <= middle <= high + 1:
                outside.add(id(label))
    return [(one.get_text(), one.get_window_extent(renderer)) for one in texts(figure) if id(one) not in outside]


def overlap(a: Bbox, b: Bbox) -> tuple[float, float]:
    """Pixels by which two places share width and height; below 0 where they do not."""
    return min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)


def cut_off(figure: Figure, placed: Boxes) -> list[str]:
    """Texts that leave the figure."""
    edge = figure.bbox.padded(1)
    return [text for text, box in placed if not edge.contains(box.x0, box.y0) or not edge.contains(box.x1, box.y1)]


def covered(figure: Figure, placed: Boxes) -> list[str]:
    """Pairs of texts that lie on each other, and legends that lie on the axes' data."""
    pairs = itertools.combinations(placed, 2)
    found = [f"{one!r} on {other!r}" for (one, a), (other, b) in pairs if min(overlap(a, b)) > 2]
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    for legend, axes in itertools.product(legends, figure.axes):
        wide, high = overlap(legend.get_window_extent(), axes.get_window_extent())
        if wide > 2 and high > 4:
            found.append(f"a legend on the data of {axes.get_title() or axes.get_ylabel()!r}")
    return found


def by_colour_alone(figure: Figure) -> list[str]:
    """Axes in which two things look the same but for their colour: lines by dash and marker, areas by hatch."""
    found = []
    for axes in figure.axes:
        looks = defaultdict(set)
        for line in axes.lines:
            if len(line.get_xdata()):
                marker = line.get_marker() if line.get_marker() not in ("None", "", None) else ""
                dash = line.get_linestyle(), str(getattr(line, "_unscaled_dash_pattern", ""))
                looks["line", dash, marker, line.get_drawstyle(), round(line.get_linewidth(), 1)].add(line.get_color())
        for points in (
            one for one in axes.collections if isinstance(one, PathCollection) and one.get_label()[0] != "_"
        ):
            looks["points", points.get_paths()[0].vertices.tobytes()].add(tuple(points.get_facecolor()[0]))
        handles = axes.get_legend_handles_labels()[0]
        flat = [handle[0] if hasattr(handle, "patches") else handle for handle in handles]
        for patch in (one for one in flat if isinstance(one, Patch)):
            looks["area", patch.get_hatch() or "", patch.get_fill()].add(patch.get_facecolor())
        found += [
            f"{axes.get_title() or axes.get_ylabel()}: {look}" for look, colours in looks.items() if len(colours) > 1
        ]
    return found


def is_plot(module: ModuleType, made: Any) -> bool:
    """A function that `plot` wraps, in the module that defines it."""
    return getattr(made, "__code__", None) is rates.verdicts.__code__ and made.__module__ == module.__name__


def test_no_plot_is_left_out():
    modules = [importlib.import_module(f"{plots.__name__}.{one.name}") for one in pkgutil.iter_modules(plots.__path__)]
    every = {made for module in modules for made in vars(module).values() if is_plot(module, made)}
    assert {made.__qualname__ for made in every - DRAWN.keys()} == set()


@pytest.mark.parametrize("made", DRAWN, ids=lambda made: f"{made.__module__.rsplit('.', 1)[-1]}.{made.__name__}")
def test_a_plot_is_read_at_the_size_at_which_it_is_shown(made, tmp_path):
    figure = DRAWN[made](tmp_path / NAME)
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        if len(style._look()["font.family"]) > 1:
            warnings.filterwarnings("error", message="Glyph")  # a box in place of a Korean letter
        figure.canvas.draw()
    if folder := os.environ.get("VLA_SCREENSHOTS"):
        figure.savefig(Path(folder) / f"plot-{made.__module__.rsplit('.', 1)[-1]}-{made.__name__}.png")
    placed = boxes(figure)
    assert small(figure) + cut_off(figure, placed) + covered(figure, placed) + by_colour_alone(figure) == []


def test_what_is_wrong_with_a_plot_is_found():
    figure = Figure((4, 3), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label="one")
    axes.plot([0, 1], [1, 0], label="other")
    axes.legend(loc="upper center")
    axes.text(0.5, 0.5, "tiny", fontsize=5)
    axes.text(0.5, 0.5, "on it")
    axes.text(3, 0.5, "outside")
    figure.canvas.draw()
    placed = boxes(figure)
    assert small(figure) == ["tiny: 6.9 px"] and cut_off(figure, placed) == ["outside"]
    assert len(by_colour_alone(figure)) == 1
    assert covered(figure, placed) == ["'tiny' on 'on it'", "a legend on the data of ''"]


def test_variants_under_all_disturbances_are_told_apart():
    """Thirteen in one panel: points by colour and marker, lines by colour and dash, named in one legend."""
    figure = rollouts.errors({f"variant {number}": closed_loop(number) for number in range(13)})
    assert len({(point.get_color(), point.get_marker()) for point in figure.axes[0].lines}) == 13
    assert len({(style.nth(number).colour, repr(style.nth(number).dash)) for number in range(13)}) == 13
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["tolerance", *(f"variant {n}" for n in range(13))]

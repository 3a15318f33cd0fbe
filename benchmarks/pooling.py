"""The ablation behind the default pooling: how well each grid of tokens tells where things are in the rig's scenes.

    python -m benchmarks.pooling --scenes 600

Random phantoms and tool poses are drawn, features of every view extracted once as single tokens, pooled to each grid,
and a ridge regression (fitted on four fifths of the scenes) predicts the target, the needle tip and the offset between
them.
"""

import argparse
from collections.abc import Sequence

import numpy as np

GRIDS = ((1, 1), (2, 3), (3, 4), (4, 6), (6, 11))
STRENGTHS = np.logspace(-6, 2, 9)


def scenes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pictures (count, 5, 180, 320, 3) uint8, target (count, 2) mm, tip (count, 3) mm) of other phantoms."""
    from needle_rig.render import open_scene, through_jpeg
    from needle_rig.world import ASKED_DEPTH_MM, VIEWS, sample_world

    rng, scene = np.random.default_rng(seed), open_scene(320, 180)
    pictures = np.zeros((count, len(VIEWS), 180, 320, 3), np.uint8)
    target, tip = np.zeros((count, 2)), np.zeros((count, 3))
    for number in range(count):
        world = sample_world(100_000 + number)
        scene.show(world)
        along = rng.uniform()  # somewhere between the goal and the start of an approach, 3 mm off it
        goal = np.array([*world.target_xy_mm, world.membrane_z_mm - ASKED_DEPTH_MM])
        place = goal + (np.asarray(world.start_mm) - goal) * along + [*rng.normal(0, 3, 2), 0]
        place[2] = max(place[2], world.surface_z_mm - 1)
        turn = np.asarray(world.start_rotvec_deg) * along
        pictures[number] = [through_jpeg(scene.picture(view, place, turn)) for view in VIEWS]
        target[number], tip[number] = world.target_xy_mm, place
    scene.close()
    return pictures, target, tip


def tokens(pictures: np.ndarray, model: str, layer: int) -> np.ndarray:
    """(count, views, rows, cols, D) float32: every image token of layer `layer` (0: half the depth)."""
    import torch

    from needle_rig.world import VIEWS
    from vla_lib.features.extractor import FeatureExtractor
    from vla_lib.features.form import FeatureForm
    from vla_lib.features.vlm import load_processor, load_vlm, open_checkpoint, resolve_layer

    checkpoint = open_checkpoint(model)
    processor = load_processor(checkpoint)
    form = FeatureForm(processor, VIEWS, "tokens", 180, 320)
    extractor = FeatureExtractor(load_vlm(checkpoint, processor, resolve_layer(layer, checkpoint.depth)), form)
    found = []
    for start in range(0, len(pictures), 8):
        batch = pictures[start : start + 8]
        prepared = [torch.from_numpy(extractor.recipe.prepare(view)) for scene in batch for view in scene]
        ticks = [tuple(range(number * len(VIEWS), (number + 1) * len(VIEWS))) for number in range(len(batch))]
        found.append(extractor.forward(prepared, ticks, "Perform the insertion task")[0][:, :-1])
    return torch.cat(found).reshape(len(pictures), len(VIEWS), form.layout.rows, form.layout.cols, -1).numpy()


def error_by_grid(
    found: np.ndarray, target: np.ndarray, tip: np.ndarray, views: Sequence[int]
) -> list[dict[str, float | str]]:
    """One row a grid: median error (mm) of target, tip and offset on the last fifth of the scenes.

    The ridge's strength is the one that serves the offset best.
    """
    import torch
    import torch.nn.functional as F

    train = int(len(found) * 0.8)
    truth = np.concatenate([target, tip, target - tip[:, :2]], axis=1)
    result = []
    for grid in GRIDS:
        image = torch.from_numpy(found[:, list(views)]).permute(0, 1, 4, 2, 3).flatten(0, 1)
        x = F.adaptive_avg_pool2d(image, grid).reshape(len(found), -1).numpy().astype(np.float64)
        x -= x[:train].mean(0)
        kernel = x @ x[:train].T / (x[:train] ** 2).sum(1).mean()
        mean, best = truth[:train].mean(0), None
        for strength in STRENGTHS:
            weights = np.linalg.solve(kernel[:train] + strength * np.eye(train), truth[:train] - mean)
            wrong = kernel[train:] @ weights + mean - truth[train:]
            parts = (wrong[:, 0:2], wrong[:, 2:5], wrong[:, 5:7])
            medians = [float(np.median(np.linalg.norm(part, axis=1))) for part in parts]
            best = medians if best is None or medians[2] < best[2] else best
        result.append({"grid": f"{grid[0]}x{grid[1]}", "target_mm": best[0], "tip_mm": best[1], "offset_mm": best[2]})
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--vl-model", default="tiny")
    parser.add_argument("--vl-layer", type=int, default=0)
    given = parser.parse_args()
    drawn, target_mm, tip_mm = scenes(given.scenes)
    kept = tokens(drawn, given.vl_model, given.vl_layer)
    for chosen in (range(5), (0, 1, 4)):
        for row in error_by_grid(kept, target_mm, tip_mm, chosen):
            cells = (f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print(f"{len(chosen)} views, {', '.join(cells)}", flush=True)

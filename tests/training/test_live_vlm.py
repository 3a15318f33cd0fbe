"""Stage 2: LoRA on the language model with the live VLM, from a stage-1 checkpoint."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from front_doors import SMALL
from PIL import Image, ImageDraw
from rank_worker import train_watched
from ranks import two_ranks
from synthetic import VIEWS, write_dataset

from vla_lib.core.errors import UserError
from vla_lib.episodes import find_prepared, load_prepared
from vla_lib.evaluation.open_loop import evaluate_open_loop, sample_set
from vla_lib.evaluation.rehearsal import make_extractor
from vla_lib.features import vision_cache
from vla_lib.features.builder import build
from vla_lib.features.cache import FeatureCache, cache_folder, episode_key, feature_file, remove
from vla_lib.features.extractor import FeatureExtractor
from vla_lib.features.settings import CacheSettings
from vla_lib.features.vision_cache import VisionCache
from vla_lib.train_async import main as train_async
from vla_lib.train_diffusion import main as train_diffusion
from vla_lib.training import loop
from vla_lib.training.checkpoint import load_policy, read_checkpoint
from vla_lib.training.data import prepare_data
from vla_lib.training.live_vlm import LiveSamples
from vla_lib.training.settings import AsyncSettings, DiffusionSettings
from vla_lib.training.validation import validate

MODELS = {
    "async": (AsyncSettings, train_async, {}),
    "diffusion": (DiffusionSettings, train_diffusion, {"diffusion_timesteps": 20}),
}
MODELS["diffusion"][2]["ddim_steps"] = 4
FEW = {
    "max_steps": 6,
    "batch_size": 4,
    "grad_accum_steps": 2,
    "lr": 1e-3,
    "sensor_enabled": False,
    "checkpoint_every_steps": 1,
}


@pytest.fixture(scope="module", params=["tiny", "tiny-qwen3-vl"])
def seen(request, tmp_path_factory):
    """A dataset whose episodes have pictures, with a cache of this VLM and a stage-1 checkpoint of the async model."""
    root = tmp_path_factory.mktemp("seen")
    for folder in write_dataset(root, {"part1": 3, "New_dataset/Task": 2}, steps=12):
        data = load_prepared(folder)
        for view in VIEWS:
            (folder / view).mkdir()
            for k in range(len(data)):
                picture = Image.new("RGB", (96, 56), (90, 100, 110))
                x, y = 48 + 4 * data.state[k, 6], 28 + 3 * data.state[k, 7]
                ImageDraw.Draw(picture).ellipse([x - 6, y - 6, x + 6, y + 6], fill=(200, 30, 30))
                picture.save(folder / view / f"{k:04d}.jpg")
    shutil.rmtree(cache_folder(root))
    build(
        CacheSettings(
            dataset_root=root, vl_model=request.param, vl_layer=2, vl_pooling="grid:2x3", num_workers=0, device="cpu"
        )
    )
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("runs") / "stage1"
    train_async(AsyncSettings(**SMALL, **FEW, dataset_root=root, run_dir=run))
    return root, run / "checkpoints" / "qwen_vla_async.pt"


def stage2(seen, tmp_path, model="async", run="stage2", **changes):
    settings_class, _, extra = MODELS[model]
    root, checkpoint = seen
    values = {
        **SMALL,
        **FEW,
        **extra,
        "dataset_root": root,
        "run_dir": tmp_path / run,
        "training_stage": "stage2",
        "lora_rank": 4,
    }
    return settings_class(**{**values, "stage1_checkpoint": checkpoint, **changes})


def built(settings):
    """Data, state and module of a run that has not begun."""
    data = prepare_data(settings)
    return data, *loop.build(settings, data, Accelerator(cpu=True))


def test_trap_20_at_its_start_it_is_stage_one_and_gradients_reach_lora_alone(seen, tmp_path):
    """With LoRA at zero the features are the cached ones; of the VLM only LoRA, in every computed layer, gets a
    gradient."""
    data, state, model = built(stage2(seen, tmp_path))
    samples, live = data.train, state.live
    numbers = np.arange(0, len(samples), 3)
    cached, found = samples.batch(numbers), live.features(samples, numbers)
    torch.testing.assert_close(found[0], cached["vl_tokens"], atol=1e-4, rtol=0)
    assert torch.equal(found[1], cached["vl_mask"])
    stage1, info = load_policy(seen[1])
    live_val = LiveSamples(data.val, live, list(live.weights.values()))
    assert validate(stage1, data.val, 16) == pytest.approx(validate(state.policy.eval(), live_val, 16), rel=1e-4)
    assert data.split == info["split"] and state.policy.normaliser.action_std.equal(stage1.normaliser.action_std)

    frozen = {k: v.clone() for k, v in live.extractor.vlm.model.state_dict().items() if "lora" not in k}
    with torch.no_grad():
        for name, weight in live.weights.items():
            if "lora_B" in name:
                weight.normal_(0, 0.01)
    model.train()
    model(samples.batch(numbers) | {"sample": torch.from_numpy(numbers)}, {}).sum().backward()
    moved = [k for k, p in live.extractor.vlm.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(moved) == len(live.weights) == 2 * 7 * 2 and all("language_model" in k and "lora" in k for k in moved)
    state.optimizer.step()
    assert all(torch.equal(v, frozen[k]) for k, v in live.extractor.vlm.model.state_dict().items() if k in frozen)
    assert not live.extractor.vlm.model.training


@pytest.mark.parametrize("model", MODELS)
def test_it_trains_is_resumed_and_its_checkpoint_predicts_alike_everywhere(seen, tmp_path, model, monkeypatch):
    """Stopped and resumed it is the whole run, bit for bit; validation, open loop and the live VLM see the same
    features."""
    settings_class, train, extra = MODELS[model]
    if model == "diffusion":
        train(settings_class(**SMALL, **FEW, **extra, dataset_root=seen[0], run_dir=tmp_path / "one"))
        seen = seen[0], tmp_path / "one" / "checkpoints" / "diffusion_stage1_latest.pt"
    results = train(stage2(seen, tmp_path, model))
    with monkeypatch.context() as patched:
        patched.setattr(
            FeatureExtractor, "encode", None
        )  # the vision tower has run over every picture once, and never does again
        rate = loop.Schedule.learning_rate

        def stop_at_three(self, state):
            if state.step == 2:
                signal.raise_signal(signal.SIGTERM)
            return rate(self, state)

        patched.setattr(loop.Schedule, "learning_rate", stop_at_three)
        assert train(stage2(seen, tmp_path, model, "resumed"))["step"] == 3
        patched.setattr(loop.Schedule, "learning_rate", rate)
        train(stage2(seen, tmp_path, model, "resumed", resume=True, stage1_checkpoint=None))
    names = {
        "async": ["qwen_vla_async_stage2.pt", "qwen_vla_async_stage2_best.pt", "qwen_vla_async_stage2_final.pt"],
        "diffusion": ["diffusion_stage2_best.pt", "diffusion_stage2_latest.pt"],
    }[model]
    assert sorted(p.name for p in (tmp_path / "stage2" / "checkpoints").iterdir()) == names
    latest = stage2(seen, tmp_path, model).checkpoints.latest
    path = tmp_path / "stage2" / "checkpoints" / latest
    whole, again = read_checkpoint(path), read_checkpoint(tmp_path / "resumed" / "checkpoints" / latest)
    for a, b in zip(tensors(whole), tensors(again), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(v.abs().max() > 0 for k, v in whole["adapter"]["weights"].items() if "lora_B" in k)

    policy, info = load_policy(path)
    assert results["parameters"] == policy.parameter_count() + sum(
        v.numel() for v in info["adapter"]["weights"].values()
    )
    held_out = prepare_data(stage2(seen, tmp_path, model)).val
    samples = sample_set(held_out.episodes, seen[0], info)  # features computed anew from the pictures
    assert validate(policy, samples, 16) == pytest.approx(whole["metrics"], rel=1e-4)
    found = evaluate_open_loop(path, seen[0])
    assert np.array_equal(found.chunks["policy"], policy.predict(samples.batch(np.arange(len(samples)))).numpy())
    episode = held_out.episodes[0]
    shown = int(samples.step[3] - samples.age_steps[3])  # the step whose pictures sample 3 is given, by its delay
    pictures = {view: episode.picture_path(view, shown) for view in VIEWS}
    tokens, mask = make_extractor(path, "cpu")(pictures, episode.instruction)
    torch.testing.assert_close(tokens, samples.batch([3])["vl_tokens"][0], atol=1e-5, rtol=0)
    assert mask.all() and not torch.allclose(
        tokens, held_out.batch([3])["vl_tokens"][0], atol=1e-5
    )  # the cache has the plain VLM's
    with pytest.raises(UserError, match="LoRA weights in its VLM.*not its own"):
        load_policy(path, binding=info["binding"])


def tensors(content: dict) -> list[dict]:
    training = content["training"]
    return [content["policy"], training["model"], content["adapter"]["weights"], training["adapter"]["weights"]]


@pytest.mark.parametrize("seen", ["tiny"], indirect=True)
def test_two_ranks_hold_equal_weights_those_of_one_with_twice_the_batch(seen, tmp_path):
    """Of the policy and of LoRA; they share the work on missing vision tokens."""
    root = tmp_path / "data"
    shutil.copytree(seen[0], root)
    for path in cache_folder(root).glob("*/vision/*.pt"):
        path.unlink()
    flags = {
        **FEW,
        "max_steps": 3,
        "dataset_root": root,
        "training_stage": "stage2",
        "lora_rank": 4,
        "stage1_checkpoint": seen[1],
    }
    settings = AsyncSettings(**{**SMALL, **flags, "batch_size": 2, "run_dir": tmp_path / "two"})
    statuses, output = two_ranks(lambda: train_watched(settings))
    assert statuses == [0, 0], output
    ranks = [torch.load(tmp_path / "two" / f"rank{r}.pt") for r in range(2)]
    for name in ("weights", "lora"):
        assert all(torch.equal(value, ranks[1][name][k]) for k, value in ranks[0][name].items())
    assert ranks[0]["metrics"] == ranks[1]["metrics"] and len(list(cache_folder(root).glob("*/vision/*.pt"))) == 5
    train_async(AsyncSettings(**{**SMALL, **flags, "batch_size": 4, "run_dir": tmp_path / "one"}))
    one = read_checkpoint(tmp_path / "one" / "checkpoints" / "qwen_vla_async_stage2.pt")["training"]
    for own, other in (
        (one["model"], ranks[0]["weights"]),
        (dict(enumerate(one["adapter"]["weights"].values())), ranks[0]["lora"]),
    ):
        assert own.keys() == other.keys() and all(torch.allclose(own[k], other[k], atol=1e-4) for k in own)


def test_vision_tokens_are_read_in_parts_masked_where_unreadable_and_made_again_where_damaged(
    seen, tmp_path, monkeypatch
):
    root = tmp_path / "data"
    shutil.copytree(seen[0], root)
    cache = FeatureCache.open(root)
    extractor = FeatureExtractor.from_binding(cache.binding, "cpu")
    episode = load_prepared(find_prepared(root)[0])
    first = VisionCache(cache, extractor)
    first.build([episode])
    whole = first.episode(episode)
    for tick, step in ((0, 0), (2, 6)):
        Path(episode.picture_path(VIEWS[0], step)).write_bytes(b"no picture")
        assert whole.ticks[tick][0] >= 0
    path = feature_file(cache.folder / "vision", episode_key(root, episode.path))
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.unlink()  # the old file stays mapped
    path.write_bytes(half)
    again = VisionCache(cache, extractor)
    assert [e.path for e in again.missing([episode])] == [episode.path]
    monkeypatch.setattr(vision_cache, "PICTURES", 1)  # a part of one, that cannot be read
    again.build([episode])
    parts = again.episode(episode)
    assert [[place >= 0 for place in row] for row in parts.ticks] == [
        [False, True],
        [True, True],
        [False, True],
        [True, True],
    ]
    for tick, row in enumerate(parts.ticks):
        for view, place in enumerate(row):
            if place >= 0:
                torch.testing.assert_close(parts.pictures[place].tokens, whole.pictures[whole.ticks[tick][view]].tokens)
    value = torch.load(path, weights_only=True)
    value["pictures"][1][1][0, 0] += 1  # one number, in a file that is whole
    path.unlink()
    torch.save(value, path)
    with pytest.raises(UserError, match=f"^{path} is damaged.*--resume"):
        VisionCache(cache, extractor).episode(episode)
    torch.save({name: value[name] for name in value if name != "xxh3"}, path)  # as earlier versions wrote it
    assert VisionCache(cache, extractor).episode(episode)


def test_the_loss_falls(seen, tmp_path):
    """On eight samples, policy and LoRA together; LoRA has a part in it."""
    data, state, model = built(stage2(seen, tmp_path, lr=3e-3))
    numbers = np.arange(8)
    batch = data.train.batch(numbers) | {"sample": torch.from_numpy(numbers)}
    losses = []
    for _ in range(25):
        losses.append(model(batch, {}).mean())
        losses[-1].backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
    last = float(losses[-1].detach())
    assert last < 0.5 * float(losses[0].detach())
    zeros = [torch.zeros_like(weight) for weight in state.live.weights.values()]
    with torch.no_grad(), state.live.using(zeros):
        assert float(model(batch, {}).mean()) > 1.01 * last


def test_a_missing_or_another_stage_one_checkpoint_is_refused(seen, tmp_path):
    with pytest.raises(UserError, match="goes on from a stage-1 checkpoint.*--stage1-checkpoint"):
        stage2(seen, tmp_path, stage1_checkpoint=None)
    with pytest.raises(UserError, match="There is no checkpoint .*nothing.pt"):
        train_async(stage2(seen, tmp_path, stage1_checkpoint=tmp_path / "nothing.pt"))
    with pytest.raises(UserError, match="was written by train_async, this is train_diffusion"):
        train_diffusion(stage2(seen, tmp_path, "diffusion"))
    with pytest.raises(UserError, match="another policy.*--width: there 32, here 64"):
        train_async(stage2(seen, tmp_path, width=64))
    with pytest.raises(UserError, match="--no-vl-enabled"):
        stage2(seen, tmp_path, vl_enabled=False)
    with pytest.raises(UserError, match="pass --training-stage stage2"):
        stage2(seen, tmp_path, training_stage="stage1")


def test_removing_a_cache_removes_its_vision_tokens(seen, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(seen[0], root)
    (binding,) = (p.name for p in cache_folder(root).iterdir())
    (cache_folder(root) / binding / "vision").mkdir(exist_ok=True)
    remove(root, binding)
    assert not (cache_folder(root) / binding).exists()

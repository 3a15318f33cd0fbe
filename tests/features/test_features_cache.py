"""Building, resuming, sharing, verifying and reading the cache; every binding check names both sides."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from drawn_episodes import VIEWS, make_episode
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vla_lib import build_vl_cache
from vla_lib.build_vl_cache import Settings
from vla_lib.core import frontdoor
from vla_lib.core.errors import UserError
from vla_lib.episodes import find_prepared, load_prepared
from vla_lib.features import binding as bindings
from vla_lib.features import cache, extractor, preflight
from vla_lib.features.cache import FeatureCache
from vla_lib.features.extractor import FeatureExtractor

PROJECT = Path(__file__).resolve().parents[2]


def build(root, **changes):
    return build_vl_cache.main(
        Settings(dataset_root=root, **{"vl_model": "tiny", "num_workers": 0, "device": "cpu", **changes})
    )


def files(root):
    return sorted(cache.cache_folder(root).glob("*/*.pt"))


def command(root, *flags, ranks=0):
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks else []
    return [
        sys.executable,
        *start,
        "-m",
        "vla_lib.build_vl_cache",
        "--vl-model",
        "tiny",
        "--dataset-root",
        str(root),
        "--device",
        "cpu",
        *flags,
    ]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}


# ------------------------------------------------------------------ content


def test_build_and_read(dataset, tmp_path):
    results = build(dataset, batch_size=3, run_dir=tmp_path / "run")
    assert (results["episodes"], results["ticks"], results["findings"]) == (3, 7 + 4 + 5, [])
    features = FeatureCache.open(dataset)
    assert features.layout.views == VIEWS and features.binding["id"] == results["binding_id"]
    for folder in find_prepared(dataset):
        episode = load_prepared(folder)
        found = features.episode(episode)
        assert found.tokens.shape == (len(found.tick_step), 3 * 6 * 11 + 1, 128) and found.tokens.dtype == torch.float32
        assert found.tick_step.tolist() == list(range(0, len(episode), 3))
        lacking = [view for view in VIEWS if view not in episode.views]
        for view in lacking:
            assert not found.mask[:, features.layout.view_slice(view)].any()
    late = features.episode(load_prepared(dataset / "White_silicone_white_circle" / "recv_all_2"))
    assert late.mask[:, features.layout.view_slice("View5")].all(1).tolist() == [False, False, True, True]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["features/ticks"] == rows[-1]["features/ticks_total"] == 16
    assert json.loads((tmp_path / "run" / "results.json").read_text())["binding_id"] == results["binding_id"]


def test_trap_31_live_features_are_the_cached_ones(built):
    features = FeatureCache.open(built)
    live = FeatureExtractor.from_binding(features.binding, device="cpu")
    episode = load_prepared(built / "White_silicone_white_circle" / "recv_all_2")
    found = features.episode(episode)
    for tick, step in enumerate(found.tick_step.tolist()):
        tokens, mask = live.extract(
            {view: episode.picture_path(view, step) for view in live.views}, episode.instruction
        )
        torch.testing.assert_close(tokens, found.tokens[tick], atol=1e-5, rtol=0)
        assert torch.equal(mask, found.mask[tick])


def test_trap_14_each_step_gets_its_own_ticks_features(built):
    """The newest tick at or before a step is its own: none is left out."""
    features = FeatureCache.open(built)
    one, two = (features.episode(load_prepared(path)) for path in find_prepared(built)[1:])
    ticks = one.tick_step.numpy()
    assert [int((ticks <= step).sum()) - 1 for step in range(20)] == [step // 3 for step in range(20)]
    assert not torch.equal(one.tokens[3], two.tokens[3])


def test_stride_one_caches_every_step(dataset):
    build(dataset, vl_stride=1)
    features = FeatureCache.open(dataset)
    episode = load_prepared(find_prepared(dataset)[1])
    found = features.episode(episode)
    assert found.tick_step.tolist() == list(range(20))
    # 5 Hz pictures under 10 Hz ticks: two ticks with the same pictures have the same features, bit for bit
    same = [
        all(episode.picture_path(view, k) == episode.picture_path(view, k + 1) for view in VIEWS) for k in range(19)
    ]
    assert any(same) and not all(same)
    assert [torch.equal(found.tokens[k], found.tokens[k + 1]) for k in range(19)] == same


def test_trap_28_one_file_an_episode_opened_mapped(dataset):
    build(dataset, vl_stride=1)
    assert len(files(dataset)) == 3
    features = FeatureCache.open(dataset)
    found = features.episode(load_prepared(find_prepared(dataset)[0]))
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(files(dataset)[0]))
    ]
    assert len(mapped) == 1 and found.tokens.shape[0] == 13


def test_a_tick_is_read_alone_from_the_file_that_was_opened(built):
    found = FeatureCache.open(built).episode(load_prepared(find_prepared(built)[0]))
    wanted = found.tokens.clone()
    assert all(torch.equal(found.tick(row), wanted[row]) for row in range(len(wanted)))
    object.__setattr__(found, "tokens", torch.zeros_like(wanted))  # so what comes now is not what is mapped
    assert torch.equal(found.tick(2), wanted[2])
    shutil.copy(found.path, found.path.with_suffix(".new"))
    os.replace(found.path.with_suffix(".new"), found.path)  # built again meanwhile: what was opened stays
    assert not found.tick(2).any()


def test_cache_travels_to_worker_processes(built):
    features = FeatureCache.open(built)
    episode = load_prepared(find_prepared(built)[0])
    before = features.episode(episode).tokens.clone()
    assert torch.equal(pickle.loads(pickle.dumps(features)).episode(episode).tokens, before)


# ------------------------------------------------------------------ several ranks, resuming, failures


def test_two_ranks_and_one_write_the_same_content(tmp_path):
    roots = [tmp_path / "one", tmp_path / "two"]
    for root in roots:
        for number, steps in enumerate((25, 7, 12, 4)):
            make_episode(root, f"part1/episode_{number}", steps=steps, camera_hz=10.0)
    build(roots[0])
    done = subprocess.run(
        command(roots[1], "--num-workers", "1", ranks=2), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 rank(s)" in done.stdout and "4 episodes, 18 ticks written" in done.stdout
    names = [[path.relative_to(root).as_posix() for path in files(root)] for root in roots]
    assert names[0] == names[1] and len(names[0]) == 4
    for one, two in zip(*(files(root) for root in roots), strict=True):
        a, b = torch.load(one, weights_only=True), torch.load(two, weights_only=True)
        assert {k: v for k, v in a.items() if k not in ("tokens", "mask", "tick_step", "sha256", "xxh3")} == {
            k: v for k, v in b.items() if k not in ("tokens", "mask", "tick_step", "sha256", "xxh3")
        }
        torch.testing.assert_close(a["tokens"], b["tokens"], atol=1e-6, rtol=0)
        assert torch.equal(a["mask"], b["mask"]) and torch.equal(a["tick_step"], b["tick_step"])


def test_bad_input_is_one_sentence_and_status_two(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        frontdoor.start(Settings, build_vl_cache.main, ["--dataset-root", str(tmp_path / "nowhere")])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: There is no dataset root") and error.count("\n") == 1


def test_resumes_after_sigkill_with_only_what_is_missing(tmp_path):
    for number in range(10):
        make_episode(tmp_path / "data", f"part1/episode_{number:02d}", steps=30, camera_hz=10.0)
    root = tmp_path / "data"
    flags = ("--num-workers", "0", "--vl-stride", "1", "--batch-size", "2")
    child = subprocess.Popen(
        command(root, *flags), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(files(root)) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    left = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files(root)}
    assert 1 <= len(left) < 10
    for path in left:  # whatever has the name of an episode is whole
        torch.load(path, weights_only=True)
    results = build(root, vl_stride=1, batch_size=2)
    assert results["episodes"] == 10 - len(left) and results["already_covered"] == len(left)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in left} == left
    assert cache.verify(root, results["binding_id"])["bad"] == []
    assert build(root, vl_stride=1, batch_size=2)["episodes"] == 0
    assert build(root, vl_stride=1, batch_size=2, overwrite=True)["episodes"] == 10


def test_out_of_memory_halves_the_batch_and_goes_on(built, monkeypatch):
    expected = {path.name: torch.load(path, weights_only=True) for path in files(built)}
    forward, sizes = FeatureExtractor.forward, []

    def small_memory(self, pictures, ticks, instruction):
        sizes.append(len(ticks))
        if len(ticks) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return forward(self, pictures, ticks, instruction)

    monkeypatch.setattr(FeatureExtractor, "forward", small_memory)
    results = build(built, overwrite=True)
    assert results["episodes"] == 3 and results["batch_size"] <= 2
    assert sizes[0] == 7 and max(sizes[2:]) <= 3  # halved once, then never tried in full again
    for path in files(built):
        torch.testing.assert_close(
            torch.load(path, weights_only=True)["tokens"], expected[path.name]["tokens"], atol=1e-6, rtol=0
        )


def test_one_tick_that_does_not_fit_is_a_sentence(dataset, monkeypatch):
    def no_memory(self, pictures, ticks, instruction):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    monkeypatch.setattr(FeatureExtractor, "forward", no_memory)
    with pytest.raises(UserError, match="One tick alone does not fit"):
        build(dataset)


def test_a_corrupt_picture_is_reported_and_its_tick_marked(dataset):
    episode = load_prepared(dataset / "White_silicone_white_circle" / "recv_all_1")
    cut, gone = episode.picture_path("View1_left", 6), episode.picture_path("View2_left", 0)
    cut.write_bytes(cut.read_bytes()[:200])
    gone.unlink()
    results = build(dataset, num_workers=1)
    assert [finding.rsplit("/", 1)[1].split(": ")[1] for finding in results["findings"]] == [
        "corrupt or cut off",
        "missing",
    ]
    features = FeatureCache.open(dataset)
    found = features.episode(episode)
    view1, view2 = (
        found.mask[:, features.layout.view_slice(view)].all(1).tolist() for view in ("View1_left", "View2_left")
    )
    same = [episode.picture_path("View1_left", k) == cut for k in found.tick_step.tolist()]
    assert any(same) and view1 == [not one for one in same]
    assert view2[0] is False and all(view2[1:])
    assert found.header["findings"] == results["findings"]


def test_a_failing_disk_ends_the_build_with_a_sentence(dataset, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FeatureCache, "write", full)
    with pytest.raises(UserError, match="No space left"):
        build(dataset)
    assert files(dataset) == []


# ------------------------------------------------------------------ bindings


@pytest.mark.parametrize(
    "change",
    [
        {"vl_layer": 1},
        {"vl_pooling": "mean"},
        {"image_resize_height": 28},
        {"vlm_reuse_count": 4},
        {"views": ("View2_left", "View1_left", "View5")},
        {"vl_model": "tiny-qwen3-vl"},
        {"dtype": "bfloat16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_trap_27_any_change_makes_another_binding(dataset, change):
    base = preflight.plan(Settings(dataset_root=dataset, vl_model="tiny", device="cpu"))[0].binding
    other = preflight.plan(Settings(dataset_root=dataset, device="cpu", **{"vl_model": "tiny", **change}))[0].binding
    assert base["id"] != other["id"]
    with pytest.raises(UserError, match="against") as caught:
        bindings.check(base, other, "The cache")
    name, *_ = bindings.differences(base, other)[-1].split(":")
    assert name in str(caught.value)


def test_trap_27_other_weights_make_another_binding(dataset, tmp_path):
    from vla_lib.features.tiny import write_tiny_checkpoint

    ids = set()
    for seed in (0, 1):
        folder = write_tiny_checkpoint(tmp_path / f"{seed}" / "checkpoint", seed=seed)
        ids.add(preflight.plan(Settings(dataset_root=dataset, device="cpu", vl_model=str(folder)))[0].binding["id"])
    assert len(ids) == 2


def test_trap_17_a_reader_with_other_wishes_stops_with_both_sides(built):
    with pytest.raises(UserError, match=r"image_resize_height: 360 against 720") as caught:
        wished = {"image_resize_height": 720, "views": list(VIEWS)}
        bindings.check(FeatureCache.open(built).binding, wished, "The cache")
    assert "views" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"fingerprint": "new"}, {"instruction": "Do otherwise"}], ids=["data.pkl", "instruction"]
)
def test_stale_features_stop_the_reader_and_are_rebuilt(built, change):
    key = "White_silicone_white_circle/recv_all_1"
    make_episode(built, key, steps=20, **change)
    episode = load_prepared(built / key)
    with pytest.raises(UserError, match="stale") as caught:
        FeatureCache.open(built).episode(episode)
    assert next(iter(change.values())) in str(caught.value)
    results = build(built)
    assert results["episodes"] == 1 and results["already_covered"] == 2
    FeatureCache.open(built).episode(episode)


def test_choosing_among_bindings(dataset):
    with pytest.raises(UserError, match="no cached features"):
        FeatureCache.open(dataset)
    ids = [build(dataset, vl_pooling=pooling)["binding_id"] for pooling in ("mean", "grid:1x2")]
    with pytest.raises(UserError) as caught:
        FeatureCache.open(dataset)
    assert all(one in str(caught.value) for one in ids)
    assert FeatureCache.open(dataset, ids[1]).layout.tokens == 3 * 2 + 1
    with pytest.raises(UserError, match='no cache "other"'):
        FeatureCache.open(dataset, "other")


def test_an_altered_binding_is_refused(built):
    chosen = FeatureCache.open(built).binding["id"]
    path = cache.cache_folder(built) / chosen / "binding.json"
    path.write_text(path.read_text().replace('"layer": 2', '"layer": 3'))
    with pytest.raises(UserError, match="altered"):
        FeatureCache.open(built)


def test_live_use_refuses_another_model_or_transformers(built):
    binding = dict(FeatureCache.open(built).binding)
    for name, value in (("weights_sha256", "0" * 64), ("transformers", "5.0.0"), ("prompt", "Look: {instruction}")):
        other = {**binding, name: value}
        other["id"] = bindings.binding_id(other)
        with pytest.raises(UserError, match=f"{name}: .* against"):
            FeatureExtractor.from_binding(other, device="cpu")


@given(
    st.dictionaries(
        st.sampled_from([name for name in bindings.FIELDS if name != "schema"]), st.integers(0, 3), min_size=1
    )
)
@hypothesis_settings(max_examples=50, deadline=None)
def test_ids_differ_exactly_when_a_field_does(changes):
    base = bindings.make_binding(**{name: 0 for name in bindings.FIELDS if name != "schema"})
    other = bindings.make_binding(**{**{name: 0 for name in bindings.FIELDS if name != "schema"}, **changes})
    assert (base["id"] == other["id"]) == (not any(changes.values())) == (not bindings.differences(base, other))


def test_ids_of_today_stay():
    """Caches that labs have keep their ids: the same fields, the same hash."""
    made = bindings.make_binding(**{name: name for name in bindings.FIELDS if name != "schema"})
    assert made["id"] == "model-Llayer-pooling-stick_stride-2f5c2093bf"


# ------------------------------------------------------------------ housekeeping


def test_list_verify_remove(built, tmp_path):
    chosen = FeatureCache.open(built).binding["id"]
    runs = tmp_path / "runs"
    (runs / "a-run").mkdir(parents=True)
    (runs / "a-run" / "run.json").write_text(json.dumps({"binding": chosen}))
    make_episode(built, "part1/episode_new", steps=4)
    make_episode(built, "White_silicone_white_circle/recv_all_1", steps=20, fingerprint="new")
    (row,) = cache.list_bindings(built, runs)
    assert (row["covered"], row["stale"], row["missing"], row["used_by"]) == (2, 1, 1, ["a-run"])
    assert row["bytes"] == sum(path.stat().st_size for path in files(built)) and row["age_s"] >= 0
    assert cache.verify(built, chosen) == {"files": 3, "bytes": row["bytes"], "bad": []}
    path = files(built)[0]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1  # one bit within the tokens
    path.write_bytes(raw)
    (bad,) = cache.verify(built, chosen)["bad"]
    assert path.name in bad and "checksum" in bad
    freed = cache.remove(built, chosen)
    assert freed > row["bytes"] and cache.list_bindings(built) == []


def test_a_damaged_file_is_told_and_built_again(built):
    chosen = FeatureCache.open(built).binding["id"]
    path = files(built)[1]
    path.write_bytes(path.read_bytes()[:1000])
    assert len(cache.verify(built, chosen)["bad"]) == 1
    with pytest.raises(UserError, match="damaged"):
        FeatureCache.open(built).episode(load_prepared(find_prepared(built)[1]))
    assert build(built)["episodes"] == 1 and cache.verify(built, chosen)["bad"] == []


def test_only_our_own_folders_are_removed(built):
    chosen = FeatureCache.open(built).binding["id"]
    (cache.cache_folder(built) / chosen / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        cache.remove(built, chosen)
    for name in ("..", "../..", "other", ""):
        with pytest.raises(UserError, match="no cache"):
            cache.remove(built, name)
    foreign = cache.cache_folder(built) / "foreign"
    foreign.mkdir()
    (foreign / "binding.json").write_text("{}")
    assert [bool(row["problem"]) for row in cache.list_bindings(built)] == [True, False]
    with pytest.raises(UserError, match="no binding"):
        cache.remove(built, "foreign")
    assert (foreign / "binding.json").exists()


# ------------------------------------------------------------------ preflight


def test_preflight_counts_without_loading_a_model(dataset, monkeypatch):
    monkeypatch.setattr(extractor, "load_vlm", None)
    results = build(dataset, preflight_only=True)
    assert results["preflight"]["todo_ticks"] == 16 and results["episodes"] == 0
    rows = {row["dataset"]: row for row in results["preflight"]["table"]}
    assert rows["New_dataset"]["lack a view"] == 1 and rows["White_silicone_white_circle"]["missing"] == 2


def test_preflight_bytes_are_the_files_sizes(dataset):
    results = build(dataset)
    planned, written = sum(one["bytes"] for one in results["preflight"]["episodes"]), results["bytes"]
    assert 0.9 < planned / written < 1.2


def test_no_space_stops_before_the_model_is_loaded(dataset, monkeypatch):
    monkeypatch.setattr(extractor, "load_vlm", None)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(UserError, match="GB free, too little"):
        build(dataset)


def planned(key, pictures):
    return preflight.PlannedEpisode(Path(key), key, "part1", pictures, 0, "missing", pictures)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 8))
@hypothesis_settings(max_examples=60, deadline=None)
def test_work_is_shared_by_size(sizes, ranks):
    shares = preflight.share_out([planned(f"e{i:03d}", size) for i, size in enumerate(sizes)], ranks)
    assert sorted(one.key for share in shares for one in share) == sorted(f"e{i:03d}" for i in range(len(sizes)))
    loads = [sum(one.pictures for one in share) for share in shares]
    best = max(max(sizes), -(-sum(sizes) // ranks))
    assert max(loads) <= 4 / 3 * best + max(sizes) * (len(sizes) > ranks)

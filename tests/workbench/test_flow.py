"""The whole path once, on a small recording: two commands' worth of work, through papermill and torchrun with two
processes."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from vla_lib import cli, evaluate
from vla_lib.core import frontdoor
from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json, read_jsonl
from vla_lib.core.run_folder import read_record
from vla_lib.policy.policy import Policy
from vla_lib.workbench.demo import SIZES
from vla_lib.workbench.headless import run_notebook
from vla_lib.workbench.run_all import FlowPlan, assign

NOTEBOOKS = FlowPlan(Path()).notebooks


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, Path]:
    """`vla demo --size small`, run once: its output and its runs folder."""
    runs = tmp_path_factory.mktemp("demo") / "runs"
    command = [sys.executable, "-m", "vla_lib.cli", "demo", "--size", "small", "--nproc-per-node", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "VLA_RUNS": str(runs), "WANDB_MODE": "offline"}
    )
    return done, runs


def run_of(runs: Path, name: str) -> Path:
    (found,) = runs.glob(f"*-{name}")
    return found


def test_the_demo_ends_well(demo):
    done, runs = demo
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in (*NOTEBOOKS, "demo"):
        assert read_record(run_of(runs, name))["state"] == "done"


def test_every_stage_leaves_an_offline_page_with_drawn_plots(demo):
    _, runs = demo
    for name in NOTEBOOKS:
        run = run_of(runs, name)
        page = (run / "notebook.html").read_text()
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"'](https?:[^\"']+)", page)
        assert "data:image/png;base64" in page
        for cell in nbformat.read(run / "notebook.ipynb", as_version=4).cells:
            for output in cell.get("outputs", []):
                assert output.output_type != "error"
                text = output.get("data", {}).get("text/plain", "")
                assert not text.startswith("<Figure") or "image/png" in output["data"], (
                    f"{name}: {cell.id} shows a repr instead of a plot"
                )


def test_the_training_ran_as_two_supervised_processes(demo):
    _, runs = demo
    run = run_of(runs, "04_train_async")
    command = read_json(run / "job.json")["command"]
    assert "--nproc_per_node=2" in command
    results = read_json(run / "results.json")
    assert results["processes"] == 2
    assert {path.name for path in (run / "checkpoints").glob("*.pt")} == {
        "qwen_vla_async.pt",
        "qwen_vla_async_best.pt",
        "qwen_vla_async_final.pt",
    }
    steps = [row["step"] for row in read_jsonl(run / "metrics.jsonl") if "train/loss_step" in row]
    assert steps == sorted(set(steps))


def test_the_policy_beats_all_three_baselines_on_held_out_episodes(demo):
    done, runs = demo
    results = read_json(run_of(runs, "06_evaluate") / "results.json")
    errors = {name: found["translation_rmse_mm"] for name, found in results["metrics"].items()}
    assert all(errors["policy"] < errors[name] for name in ("zero", "mean", "persistence")), errors
    assert len(results["episode_keys"]) == results["held_out_episodes"] >= 4
    verdict = r"(beats all baselines|does NOT beat [\w, ]+)"
    said = re.search(rf"held-out episodes the policy {verdict} in translation and {verdict} in rotation", done.stdout)
    assert said and said.group(1) == "beats all baselines"


def test_the_policy_is_tried_on_unseen_phantoms_and_its_rollouts_are_drawn(demo):
    done, runs = demo
    run = run_of(runs, "06_evaluate")
    results = read_json(run / "results.json")
    (loop,) = results["closed_loop"].values()
    recorded = {entry["seed"] for entry in read_json(runs / "small-data" / "simulation.json")["episodes"]}
    assert len(loop["rollouts"]) == results["rollouts"] == 3 and not recorded & {
        row["seed"] for row in loop["rollouts"]
    }
    assert (loop["settings"]["picture_width"], loop["settings"]["picture_height"]) == (160, 90)  # as recorded
    assert re.search(rf"closed-loop success\s+{results['successes']} of 3 unseen phantoms \(", done.stdout)
    assert (run / "notebook.html").read_text().count(
        'type="range"'
    ) == 3  # paths, film strips, sensor: browsable offline


def test_the_front_door_evaluates_as_the_documents_say(demo, tmp_path, capsys, monkeypatch):
    best = run_of(demo[1], "04_train_async") / "checkpoints" / "qwen_vla_async_best.pt"
    latest = best.with_name("qwen_vla_async.pt")
    asked, predict = set(), Policy.predict

    def spy(policy, *given, ddim_steps=None, **how):
        asked.add(ddim_steps)
        return predict(policy, *given, ddim_steps=ddim_steps, **how)

    monkeypatch.setattr(Policy, "predict", spy)
    given = ["--checkpoints", f"best={best}", f"latest={latest}", "--run-dir", str(tmp_path), "--ddim-steps", "4"]
    given += [
        "--closed-loop-seeds",
        "1",
        "--masked",
        "--latency-sweep",
        "--vlm-jitter-ms",
        "10",
        "--max-time-s",
        "1",
        "--workers",
        "1",
    ]
    evaluate.main(frontdoor.parse(evaluate.EvaluateSettings, given))
    results = read_json(tmp_path / "results.json")
    assert set(results["compared_with"]) == {"latest"} and asked == {4}
    delays = [f"best, VLM delay {delay} ms" for delay in (0, 381, 600)]
    names = ["best", "latest", "best, VL masked", "best, sensor masked", *delays]
    assert list(results["closed_loop"]) == names and list(results["pairs"]) == names[1:]
    tried = [loop["rollouts"][0] for loop in results["closed_loop"].values()]
    assert len({rollout["seed"] for rollout in tried}) == 1 and {rollout["reason"] for rollout in tried} == {
        "no puncture"
    }
    assert {loop["settings"]["vlm_jitter_ms"] for loop in results["closed_loop"].values()} == {10}
    assert [results["closed_loop"][name]["settings"]["vlm_latency_ms"] for name in delays] == [0, 381, 600]
    said = capsys.readouterr().out
    assert "best, val episodes" in said and re.search(r"best, VLM delay 600 ms +0 of 1", said)


def test_notebook_06_tells_where_the_rig_is_no_judge(demo, runs_folder):
    _, runs = demo
    manifest = runs / "small-data" / "simulation.json"
    best = run_of(runs, "04_train_async") / "checkpoints" / "qwen_vla_async_best.pt"
    last = best.with_name("qwen_vla_async.pt")
    hidden = manifest.rename(manifest.with_suffix(".hidden"))  # as if a lab had recorded it
    try:
        result = run_notebook(
            "06_evaluate", {"checkpoint": f"best={best}", "compare_with": [f"last={last}"]}, log=False
        )
    finally:
        hidden.rename(manifest)
    assert result.state == "done", result.error
    results = read_json(result.path / "results.json")
    assert results["name"] == "best" and set(results["compared_with"]) == {"last"} and "closed_loop" not in results
    assert {"VL masked", "sensor masked"} < set(results["metrics"]) and {"contact", "free"} <= set(results["by_phase"])
    assert (result.path / "notebook.html").read_text().count("was not recorded on the simulated rig") >= 4


def test_notebook_07_rehearses_in_real_time_without_a_person(demo, runs_folder):
    _, runs = demo
    best = run_of(runs, "04_train_async") / "checkpoints" / "qwen_vla_async_best.pt"
    result = run_notebook("07_rehearse", {"checkpoint": str(best), "robot": "dry run", "max_time_s": 2.0}, log=False)
    assert result.state == "done", result.error
    lines = read_jsonl(result.path / "rehearsal.jsonl")
    sent = read_jsonl(result.path / "dry_run.jsonl")
    assert sum("tick" in line for line in lines) == len([line for line in sent if "action" in line]) + sum(
        line["tick"]["mode"] in ("wait", "stop") or line["tick"]["reason"] == "missed deadline"
        for line in lines
        if "tick" in line
    )
    assert (
        "stop" in sent[-1]
        and read_json(result.path / "results.json")["runner"]["ended"] == lines[-1]["summary"]["ended"]
    )
    page = (result.path / "notebook.html").read_text()
    assert 'type="range"' in page and "145 mN, then a retreat of 5 mm" in page  # the limits that hold are shown


def test_notebook_05_trains_on_the_same_data(demo, runs_folder):
    _, runs = demo
    given = {
        "dataset_root": str(runs / "small-data"),
        "max_steps": 4,
        "batch_size": 2,
        "grad_accum_steps": 1,
        "val_fraction": 0.1,
        "num_workers": 0,
        "ddim_steps": 2,
        **SIZES["small"].cache,
    }
    result = run_notebook("05_train_diffusion", given, log=False)
    assert result.state == "done", result.error
    assert {path.name for path in (result.path / "checkpoints").iterdir()} == {
        "diffusion_stage1_latest.pt",
        "diffusion_stage1_best.pt",
    }


def test_the_table_tells_rates_steps_errors_times_and_the_report(demo):
    done, runs = demo
    for words in (
        "rate of sensor samples",
        "650.",
        "episodes prepared",
        "VL feature cache",
        "optimiser steps",
        "time in all",
    ):
        assert words in done.stdout, words
    for method in ("policy", "zero", "mean", "persistence"):
        assert re.search(rf"held-out RMS error, {method}\s+0\.\d+ mm", done.stdout)
    report = re.search(r"^report: (.*)$", done.stdout, re.M).group(1)
    assert Path(report).stat().st_size < 5e6
    assert "data:image/png;base64" in Path(report).read_text()


def vla(*words: str) -> int:
    """`vla` in this process; its exit status."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    return ended.value.code


def run_all(data: Path, processes: int = 2, **train: float) -> int:
    """`vla run-all` on the demo's data with the demo's parameters, but those of the training in `train`, in this
    process."""
    size = SIZES["small"]
    given = {"03_cache_vl_features": size.cache, "04_train_async": size.train | train, "06_evaluate": size.evaluate}
    pairs = [["-p", f"{name}.{key}", str(value)] for name, values in given.items() for key, value in values.items()]
    words = [word for pair in pairs for word in pair]
    return vla("run-all", "--dataset-root", str(data), "--nproc-per-node", str(processes), *words)


def states(runs: Path) -> dict[str, str]:
    return {row["step"]: row["state"] for row in read_json(run_of(runs, "run-all") / "results.json")["steps"]}


@pytest.fixture
def lab_book(demo, runs_folder) -> set[Path]:
    """A copy of the demo's run folders; its data stay where they are."""
    shutil.copytree(demo[1], runs_folder, ignore=shutil.ignore_patterns("small-data"))
    return set(runs_folder.iterdir())


def test_run_all_skips_every_step_that_is_up_to_date(demo, lab_book, runs_folder, capsys):
    assert run_all(demo[1] / "small-data") == 0
    assert states(runs_folder) == dict.fromkeys(NOTEBOOKS, "skipped")
    assert set(runs_folder.iterdir()) - lab_book == {run_of(runs_folder, "run-all")}  # no kernel was started
    said = capsys.readouterr().out
    assert all(re.search(rf"^=== {name} skipped: .+", said, re.M) for name in NOTEBOOKS)
    page = (run_of(runs_folder, "run-all") / "report.html").read_text()
    for name in NOTEBOOKS:  # the results that stand are shown
        assert f"<h2>{name}</h2>" in page
    assert page.count("not run again: ") == len(NOTEBOOKS) and page.count("data:image/png;base64") >= 8


def test_run_all_does_again_what_new_data_ask_for_and_stops_at_the_first_failure(demo, lab_book, runs_folder, capsys):
    data = demo[1] / "small-data"
    known = next((data / "White_silicone_white_circle").iterdir())
    new = known.with_name("recv_all_20260101_120000")
    shutil.copytree(known, new, ignore=shutil.ignore_patterns("data.pkl", "sensor.npy"))
    log = next(new.glob("*.csv"))
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))  # else it would be the same recording twice
    try:
        assert run_all(data, processes=1, lr=1e30) == 1
    finally:
        shutil.rmtree(new)
    done = dict.fromkeys(NOTEBOOKS[:3], "ran") | {"04_train_async": "failed"}
    assert states(runs_folder) == done
    assert len(set(runs_folder.iterdir()) - lab_book) == 1 + len(done)  # nothing was evaluated
    said = capsys.readouterr().out
    assert "=== 03_cache_vl_features runs: 1 of 21 episodes are missing" in said
    lines = said[said.index("\nerror: ") :].splitlines()[1:]
    failed = max(runs_folder.glob("*-04_train_async"))
    order = [
        "error: UserError: The loss is not finite at step",  # the cause
        "Traceback (most recent call last):",  # of the rank
        "Last lines of ",  # of the log, without torchrun's own report
        f"04_train_async failed at In [8]: {failed / 'notebook.html'}",
        "04_train_async        failed  ",  # the table of steps
        f"report: {run_of(runs_folder, 'run-all') / 'report.html'}",
    ]
    found = [next(number for number, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert found[0] == 0 and found == sorted(found)
    assert not any("elastic_launch" in line or "Root Cause" in line for line in lines)
    assert "An Exception was encountered at" in (failed / "notebook.html").read_text()
    record = read_record(run_of(runs_folder, "run-all"))
    assert record["state"] == "failed" and record["error"].startswith("UserError: The loss is not finite")


def test_run_all_refuses_another_roots_parent(demo, runs_folder, capsys):
    assert run_all(demo[1]) == 2
    assert "small-data is a dataset root of its own" in capsys.readouterr().err and not runs_folder.exists()


def test_parameters_of_a_flow_reach_the_steps_that_they_mean(runs_folder):
    given = assign({"image_resize_height": "180", "06_evaluate.batch_size": "8"}, NOTEBOOKS)
    assert given == {
        "03_cache_vl_features": {"image_resize_height": 180},
        "04_train_async": {"image_resize_height": 180},
        "06_evaluate": {"batch_size": 8},
    }
    for words, remedy in (
        ({"batch_size": "8"}, "means different things in 3 steps"),
        ({"lrr": "1"}, "No step has a parameter lrr"),
        ({"06_evaluate.lr": "1"}, "06_evaluate has no parameter lr; there are"),
        ({"05_train_diffusion.lr": "1"}, "is no step of this flow"),
        ({"lr": "fast"}, "parameter lr wants float"),
        ({"lr": "1e-3", "04_train_async.lr": "1e-4"}, "given twice"),
        ({"cache_id": "x"}, "handed from step to step"),
    ):
        with pytest.raises(UserError, match=remedy):
            assign(words, NOTEBOOKS)
    with pytest.raises(UserError, match="--lr is -1.0; it should be greater than 0"):
        FlowPlan(Path("data"), {"04_train_async": {"lr": -1.0}}).check()


@pytest.mark.parametrize(
    "words, remedy",
    (
        (["run-all", "--dataset-root", "nowhere"], "There is no dataset root"),
        (["run-all", "--dataset-root", "."], "holds no recorded episode"),
        (["demo", "--vl-model", "./no-model"], "neither a folder nor a hub name"),
        (["demo", "--nproc-per-node", "0"], "give 1 or more processes"),
    ),
)
def test_bad_input_is_one_sentence_and_status_2(words, remedy, tmp_path, runs_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert vla(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and remedy in said and len(said.strip().splitlines()) == 1
    assert not list(runs_folder.glob("*/run.json"))


def test_no_egl_is_told_before_anything_starts(tmp_path, runs_folder):
    command = [sys.executable, "-m", "vla_lib.cli", "demo", "--size", "small"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "99"}
    )
    assert done.returncode == 2
    assert "cannot draw its pictures" in done.stderr
    assert not list(runs_folder.glob("*-demo"))


def test_a_taken_port_is_told(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert vla("lab", "--port", str(port)) == 2
    assert f"Port {port} is in use" in capsys.readouterr().err

"""The whole path once, on a small recording: two commands' worth of work, through papermill and torchrun with two processes."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from vla_lib.core.files import read_json, read_jsonl
from vla_lib.core.run_folder import read_record
from vla_lib.workbench.demo import NOTEBOOKS
from vla_lib.workbench.headless import run_notebook


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, Path]:
    """`vla demo --size small`, run once: its output and its runs folder."""
    import os

    runs = tmp_path_factory.mktemp("demo") / "runs"
    command = [sys.executable, "-m", "vla_lib.cli", "demo", "--size", "small", "--nproc-per-node", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VLA_RUNS": str(runs), "WANDB_MODE": "offline"})
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
                assert not text.startswith("<Figure") or "image/png" in output["data"], f"{name}: {cell.id} shows a repr instead of a plot"


def test_the_training_ran_as_two_supervised_processes(demo):
    _, runs = demo
    run = run_of(runs, "04_train_async")
    command = read_json(run / "job.json")["command"]
    assert "--nproc_per_node=2" in command
    results = read_json(run / "results.json")
    assert results["processes"] == 2
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
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
    assert re.search(r"held-out episodes the policy (beats|does NOT beat)", done.stdout)


def test_the_policy_is_tried_on_unseen_phantoms_and_its_attempts_are_drawn(demo):
    done, runs = demo
    run = run_of(runs, "06_evaluate")
    results = read_json(run / "results.json")
    (loop,) = results["closed_loop"].values()
    recorded = {entry["seed"] for entry in read_json(runs / "small-data" / "simulation.json")["episodes"]}
    assert len(loop["attempts"]) == results["attempts"] == 3 and not recorded & {row["seed"] for row in loop["attempts"]}
    assert (loop["settings"]["picture_width"], loop["settings"]["picture_height"]) == (160, 90)  # as recorded
    assert re.search(rf"closed-loop success\s+{results['successes']} of 3 unseen phantoms \(", done.stdout)
    assert (run / "notebook.html").read_text().count('type="range"') == 3  # paths, film strips, sensor: browsable offline


def test_notebook_06_tells_where_the_rig_is_no_judge(demo, runs_folder):
    _, runs = demo
    manifest = runs / "small-data" / "simulation.json"
    best = run_of(runs, "04_train_async") / "checkpoints" / "qwen_vla_async_best.pt"
    last = best.with_name("qwen_vla_async.pt")
    hidden = manifest.rename(manifest.with_suffix(".hidden"))  # as if a lab had recorded it
    try:
        result = run_notebook("06_evaluate", {"checkpoint": f"best={best}", "compare_with": [f"last={last}"]}, log=False)
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
        line["tick"]["mode"] in ("wait", "stop") or line["tick"]["reason"] == "missed deadline" for line in lines if "tick" in line
    )
    assert "stop" in sent[-1] and read_json(result.path / "results.json")["runner"]["ended"] == lines[-1]["summary"]["ended"]
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
    }
    result = run_notebook("05_train_diffusion", given, log=False)
    assert result.state == "done", result.error
    assert {path.name for path in (result.path / "checkpoints").iterdir()} == {"diffusion_stage1_latest.pt", "diffusion_stage1_best.pt"}


def test_the_table_tells_rates_steps_errors_times_and_the_report(demo):
    done, runs = demo
    for words in ("rate of sensor samples", "650.", "episodes prepared", "VL feature cache", "optimiser steps", "time in all"):
        assert words in done.stdout, words
    for method in ("policy", "zero", "mean", "persistence"):
        assert re.search(rf"held-out RMS error, {method}\s+0\.\d+ mm", done.stdout)
    report = re.search(r"^report: (.*)$", done.stdout, re.M).group(1)
    assert Path(report).stat().st_size < 5e6
    assert "data:image/png;base64" in Path(report).read_text()


@pytest.mark.parametrize(
    "words, told",
    (
        (["--dataset-root", "nowhere"], "There is no dataset root"),
        (["--dataset-root", "."], "holds no recorded episode"),
        (["--vl-model", "./no-model"], "neither a folder nor a hub name"),
        (["--nproc-per-node", "0"], "give 1 or more processes"),
    ),
)
def test_bad_input_is_one_sentence_and_status_2(words, told, tmp_path, runs_folder):
    command = [sys.executable, "-m", "vla_lib.cli", "demo", "--size", "small", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(runs_folder.glob("*-demo"))


def test_no_egl_is_told_before_anything_starts(tmp_path, runs_folder):
    import os

    command = [sys.executable, "-m", "vla_lib.cli", "demo", "--size", "small"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "99"})
    assert done.returncode == 2
    assert "cannot draw its pictures" in done.stderr
    assert not list(runs_folder.glob("*-demo"))


def test_a_taken_port_is_told():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run([sys.executable, "-m", "vla_lib.cli", "lab", "--port", str(port)], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"Port {port} is in use" in done.stderr

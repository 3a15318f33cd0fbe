"""Evaluates checkpoints: held-out errors beside three baselines, success on unseen phantoms of the simulated rig.

    python -m vla_lib.evaluate --checkpoint runs/RUN/checkpoints/qwen_vla_async_best.pt
    python -m vla_lib.evaluate --checkpoints async@1=A.pt async@2=B.pt no_vl=C.pt --closed-loop-seeds 100 --disturbed

Trainings of one recipe are named RECIPE@1, RECIPE@2, ...: mean, spread and worst over them are told too. It prints
tables, and writes results.json into `--run-dir`."""

from typing import Any

from vla_lib.core import frontdoor
from vla_lib.core.owner import owned
from vla_lib.core.run_folder import write_results
from vla_lib.evaluation.settings import EvaluateSettings


def main(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate, print the tables, write results.json into the run folder as results come; returns the results."""
    # not above: they import torch, and `--help` needs none
    from vla_lib.evaluation.closed_loop import closed_loop_table, over_trainings, pair_table, recipe_table
    from vla_lib.evaluation.open_loop import error_table, phase_table
    from vla_lib.evaluation.study import Study, evaluate

    def save(study: Study) -> None:
        if settings.run_dir is not None:
            write_results(settings.run_dir, study.results())

    with owned(settings.run_dir):
        study = evaluate(settings, save)
    for name, found in study.open_loop.items():
        tables = {f"{settings.episodes} episodes": error_table(found.metrics()), "by phase": phase_table(found)}
        for title, table in tables.items():
            print(f"\n{name}, {title}\n{table.to_string(index=False, float_format='{:.3f}'.format)}")
    if study.closed_loop:
        print(f"\n{closed_loop_table(study.closed_loop).to_string(index=False, na_rep='')}")
    if study.closed_loop and over_trainings(study.closed_loop):
        print(f"\n{recipe_table(study.closed_loop).to_string(index=False)}")
    if len(study.closed_loop) > 1:
        print(f"\n{pair_table(study.closed_loop).to_string(index=False)}")
    return study.results()


if __name__ == "__main__":
    frontdoor.start(EvaluateSettings, main)

"""Evaluates checkpoints: held-out errors beside three baselines, success on unseen phantoms of the simulated rig.

    python -m vla_lib.evaluate --checkpoint runs/RUN/checkpoints/qwen_vla_async_best.pt
    python -m vla_lib.evaluate --checkpoints async=A.pt no_vl=B.pt no_sensor=C.pt diffusion=D.pt --closed-loop-seeds 100 --masked --latency-sweep

Checkpoints in; tables, and results.json in `--run-dir`, out."""

from typing import Any

from vla_lib.core import frontdoor
from vla_lib.core.files import write_json
from vla_lib.evaluation.study import Settings, Study, evaluate


def main(settings: Settings) -> dict[str, Any]:
    """Evaluate, print the tables, write results.json into the run folder as results come; returns the results."""
    from vla_lib.evaluation.summary import closed_loop_table, error_table, pair_table, phase_table

    def save(study: Study) -> None:
        if settings.run_dir is not None:
            write_json(settings.run_dir / "results.json", study.results())

    study = evaluate(settings, save)
    for name, found in study.open_loop.items():
        print(
            f"\n{name}, {settings.episodes} episodes\n{error_table(found.metrics()).to_string(index=False, float_format='{:.3f}'.format)}"
        )
        print(f"\n{name}, by phase\n{phase_table(found).to_string(index=False, float_format='{:.3f}'.format)}")
    if study.closed_loop:
        print(f"\n{closed_loop_table(study.closed_loop).to_string(index=False, na_rep='')}")
    if len(study.closed_loop) > 1:
        print(f"\n{pair_table(study.closed_loop).to_string(index=False)}")
    return study.results()


if __name__ == "__main__":
    frontdoor.start(Settings, main)

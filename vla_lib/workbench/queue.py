"""The queue of a sweep or night: an Optuna study in its run folder, shared by all workers that see the folder.

The journal file `study.journal` holds one trial an entry, waiting until a worker claims it, so nothing is done twice
and no budget is exceeded. An entry whose worker is gone, or gave it back, waits again and keeps its run folder. Claims
are made one at a time, under a lock file that works on network mounts too.
"""

import contextlib
import math
import os
import secrets
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from vla_lib.core.errors import UserError
from vla_lib.core.owner import Owner, living, owner_file
from vla_lib.core.run_folder import RunFolder, new_folder, read_record, runs_root
from vla_lib.workbench import runs
from vla_lib.workbench.parameters import notebook_path
from vla_lib.workbench.slurm import SUBMITTED
from vla_lib.workbench.sweeps import Entry, Plan, word

JOURNAL = "study.journal"
STUDY = "study"
ENDED_WELL = ("done", "pruned")
SURE_AFTER = 3  # runs that end before one may be pruned; a guess
LEFT = ("cancelled", "lost", "submitted")  # a queue whose record nobody keeps


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Inside, nobody else holds `<path>.lock`, on any machine; a killed holder's lock is taken over after 30 s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(str(path))
    lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # it was taken over
            lock.release()


def open_study(folder: Path, **options: Any) -> optuna.Study:
    """The study in a queue's folder. Raises UserError where there is none and no `options` to make one."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = folder / JOURNAL
    if not options and not journal.exists():
        raise UserError(f"{folder} holds no {JOURNAL}; give the folder of a sweep or a night (`vla runs` lists them).")
    storage = JournalStorage(JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal))))
    if not options:
        return optuna.load_study(study_name=STUDY, storage=storage)
    return optuna.create_study(study_name=STUDY, storage=storage, load_if_exists=True, **options)


def newest(study: optuna.Study) -> dict[str, FrozenTrial]:
    """The newest trial of each entry that has one."""
    return {trial.user_attrs["entry"]: trial for trial in study.get_trials(deepcopy=False)}


def entry_rows(study: optuna.Study) -> dict[str, dict[str, Any]]:
    """One row an entry that has a trial: entry, setting, state (waiting, running, or how it ended), run, value,
    error."""
    found = {}
    for entry, trial in newest(study).items():
        known = trial.user_attrs
        state = known.get("state") or ("running" if trial.state == TrialState.RUNNING else "waiting")
        value = trial.values[0] if trial.values and math.isfinite(trial.values[0]) else None
        row = {"entry": entry, "setting": known["setting"], "state": state, "value": value}
        found[entry] = row | {name: known.get(name) for name in ("run", "error")}
    return found


@dataclass(frozen=True)
class Claim:
    """An entry that this worker has to itself: its trial, its parameters as words, its run folder, and whether that
    holds an earlier try to go on with."""

    trial: optuna.Trial
    entry: Entry
    words: dict[str, str]
    run: Path
    resume: bool

    @property
    def title(self) -> str:
        """The entry's name, with what was drawn for it."""
        drawn = [f"{name}={value}" for name, value in self.words.items() if name not in self.entry.parameters]
        return " ".join([self.entry.name, *drawn])


class Queue:
    """A queue's folder, what it asks for, and this worker's part in it.

    The record run.json is kept by one worker; where that one leaves, another takes it up (`keep_record`).
    """

    def __init__(self, path: Path, plan: Plan, record: RunFolder | None):
        self.path, self.plan, self.record = path, plan, record
        self._entries = {entry.name: entry for entry in plan.entries}
        role = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self.worker = Owner.take(path / "workers", role)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(constant_liar=True)  # runs that others have begun count as poor ones
        pruner = optuna.pruners.MedianPruner(SURE_AFTER) if plan.prune else optuna.pruners.NopPruner()
        direction = "maximize" if plan.maximize else "minimize"
        self.study = open_study(path, direction=direction, sampler=sampler, pruner=pruner)

    @classmethod
    def open(cls, plan: Plan) -> "Queue":
        """Join the running queue that asks for the same; else go on with the newest that did not end well, its failed
        entries waiting again; else begin a new one."""
        wanted = plan.record
        with exclusive(runs_root() / f".{plan.kind}"):
            record, submitted = None, os.environ.get(SUBMITTED)
            path, state = cls._same(plan.kind, wanted["digest"])
            if submitted:  # a requeued worker begins no second sweep, and does nothing again
                path = Path(submitted)
                state = "submitted" if read_record(path)["state"] in LEFT else "running"
            if path is None:
                record = RunFolder.create(plan.kind, wanted)
            elif state != "running":
                record = RunFolder.resume(path, wanted)
            queue = cls(path or record.path, plan, record)  # type: ignore[union-attr]
            with exclusive(queue.path / "claim"):
                queue._fill(again=record is not None and not submitted)
        return queue

    @staticmethod
    def _same(kind: str, digest: str) -> tuple[Path | None, str]:
        """The newest queue that asks for the same and did not end well, and its state."""
        known = [(path, read_record(path)) for path in reversed(runs.find_runs(kind))]
        same = [one for one in known if one[1]["parameters"].get("digest") == digest]
        return next(((path, record["state"]) for path, record in same if record["state"] != "done"), (None, ""))

    def claim(self) -> Claim | None:
        """The next waiting entry, now this worker's; None where none waits."""
        with exclusive(self.path / "claim"):
            self._fill()
            if not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                return None
            trial = self.study.ask(self.plan.space)
            entry, before = self._entries[trial.user_attrs["entry"]], trial.user_attrs.get("run")
            run = runs_root() / before if before else new_folder(notebook_path(entry.notebook).stem)
            trial.set_user_attr("run", run.name)
            trial.set_user_attr("worker", self.worker.file.name)
            drawn = {name: word(trial.params[name]) for name in self.plan.searched}
            return Claim(trial, entry, entry.parameters | drawn, run, resume=before is not None)

    def _fill(self, again: bool = False) -> None:
        """Let wait: entries that nobody has begun (repetitions of a searched setting once it is drawn), those whose
        worker is gone or gave them back, and with `again` those that did not end well."""
        for trial in newest(self.study).values():
            if trial.state == TrialState.RUNNING and self._gone(trial):
                with contextlib.suppress(UpdateFinishedTrialError, ValueError):
                    self.study.tell(trial.number, state=TrialState.FAIL)
        latest = newest(self.study)
        whole = [trial for trial in latest.values() if set(self.plan.searched) <= trial.params.keys()]
        drawn = {trial.user_attrs["setting"]: trial.params for trial in whole if self.plan.searched}
        begun = {trial.user_attrs["setting"] for trial in latest.values()}
        for entry in self.plan.entries:
            found, run = latest.get(entry.name), None
            if found is None:
                if self.plan.searched and entry.setting in begun and entry.setting not in drawn:
                    continue
                begun.add(entry.setting)
            else:
                state = found.user_attrs.get("state")
                if found.state != TrialState.FAIL or (state and not (again and state not in ENDED_WELL)):
                    continue
                run = found.user_attrs.get("run") if state in (None, "cancelled", "lost") else None
            axes = {name: entry.parameters[name] for name in self.plan.space if name not in self.plan.searched}
            known = drawn.get(entry.setting) or (found.params if found else {})
            attributes = {"entry": entry.name, "setting": entry.setting, **({"run": run} if run else {})}
            self.study.enqueue_trial({**known, **axes}, user_attrs=attributes)

    def _gone(self, trial: FrozenTrial) -> bool:
        """Whether nobody works on a claimed trial any more; a run whose worker was killed may still save a checkpoint.
        One without a worker's name was left in the middle of its claim, as claims are made one at a time."""
        name = trial.user_attrs.get("worker")
        probe = self.worker.file.with_suffix(".partial")
        if name and living(self.path / "workers" / name, probe):
            return False
        run = runs_root() / str(trial.user_attrs.get("run"))
        began = (run / "run.json").exists()
        return not living(owner_file(run)) and not (began and read_record(run)["state"] == "running")

    def tell(self, claim: Claim, state: str, error: str = "") -> str:
        """Close a claimed entry: done, pruned, failed, cancelled or lost. Returns the state, which is failed where a
        search misses its objective."""
        value = runs.plain_results(claim.run).get(self.plan.objective) if state == "done" else None
        known = isinstance(value, int | float) and math.isfinite(value)
        if state == "done" and self.plan.searched and not known:
            state, error = "failed", f"its results have no {self.plan.objective}, which the search asks for"
        try:
            claim.trial.set_user_attr("state", state)
            claim.trial.set_user_attr("error", error)
            if state == "done":  # without the objective it is beyond every plot
                worst = -math.inf if self.plan.maximize else math.inf
                self.study.tell(claim.trial, float(value) if known else worst)  # type: ignore[arg-type]
            else:
                self.study.tell(claim.trial, state=TrialState.PRUNED if state == "pruned" else TrialState.FAIL)
        except UpdateFinishedTrialError:  # this worker gave no sign of life for long
            print(f"{claim.entry.name} was taken over by another worker meanwhile", flush=True)
        return state

    def give_back(self, claim: Claim) -> None:
        """Let a claimed entry wait again; it goes on in the same run folder."""
        with contextlib.suppress(UpdateFinishedTrialError), exclusive(self.path / "claim"):
            self.study.tell(claim.trial, state=TrialState.FAIL)
            self._fill()

    def rows(self) -> list[dict[str, Any]]:
        """One row an entry, as `entry_rows`; a repetition whose setting is not drawn yet waits."""
        found = entry_rows(self.study)
        waiting = {"state": "waiting", "run": None, "value": None, "error": None}
        return [
            found.get(entry.name) or {"entry": entry.name, "setting": entry.setting, **waiting}
            for entry in self.plan.entries
        ]

    def keep_record(self) -> None:
        """Take up the queue's record where the worker that kept it has left."""
        if self.record is None and read_record(self.path)["state"] in LEFT:
            with contextlib.suppress(UserError):  # another was quicker
                self.record = RunFolder.resume(self.path, self.plan.record)

    def comparison(self) -> pd.DataFrame:
        """One row an entry that was begun: name, state, duration, the parameters that differ between entries, the key
        results; entries without a record have a state alone."""
        begun = pd.DataFrame([row for row in self.rows() if row["run"]], columns=["entry", "state", "run"])
        folders = [path for name in begun["run"] if ((path := runs_root() / name) / "run.json").exists()]
        table = runs.short(runs.table(of=folders), ("run", "duration_s")).astype(object)
        return begun.merge(table, on="run", how="left").drop(columns="run")

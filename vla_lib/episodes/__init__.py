"""Raw recordings in; opened, measured, judged and prepared episodes out. Imports no torch.

find_episodes(root) -> EpisodeFiles     Episode.open(files)       measure(episode), judge(episode, steps)
run_jobs(make_jobs(root)) -> Outcome    find_prepared(root)       load_prepared(folder) -> PreparedEpisode
"""

from vla_lib.episodes.datasets import DatasetTable
from vla_lib.episodes.episode import Episode
from vla_lib.episodes.layouts import EpisodeFiles, find_episodes
from vla_lib.episodes.pipeline import Outcome, make_jobs, run_jobs
from vla_lib.episodes.prepare import PrepareSettings
from vla_lib.episodes.prepared import PreparedEpisode, find_prepared, load_prepared
from vla_lib.episodes.rates import measure
from vla_lib.episodes.steps import build_steps
from vla_lib.episodes.verdict import judge

__all__ = [
    "DatasetTable",
    "Episode",
    "EpisodeFiles",
    "Outcome",
    "PrepareSettings",
    "PreparedEpisode",
    "build_steps",
    "find_episodes",
    "find_prepared",
    "judge",
    "load_prepared",
    "make_jobs",
    "measure",
    "run_jobs",
]

"""Raw recordings, opened, measured, judged and prepared. Imports no torch.

find_episodes(root) -> EpisodeFiles     Episode.open(files)       measure(episode), judge(episode, steps)
load_used(root) -> {key: PreparedEpisode}: what `vla_lib.preprocess` made, but what the marks leave out

Room for what comes: a new layout begins in `layouts` (its names; `survey` finds it) and `episode` (which reader opens
it); evidence for a clock goes into `clocks`; a check of plausibility into `quality.judge`.
"""

from vla_lib.episodes.datasets import DatasetTable
from vla_lib.episodes.episode import Episode
from vla_lib.episodes.layouts import EpisodeFiles
from vla_lib.episodes.prepare import PreprocessSettings
from vla_lib.episodes.prepared import PreparedEpisode, load_prepared, load_used, recheck
from vla_lib.episodes.quality import judge, measure
from vla_lib.episodes.steps import build_steps
from vla_lib.episodes.survey import find_episodes, find_prepared

__all__ = [
    "DatasetTable",
    "Episode",
    "EpisodeFiles",
    "PreparedEpisode",
    "PreprocessSettings",
    "build_steps",
    "find_episodes",
    "find_prepared",
    "judge",
    "load_prepared",
    "load_used",
    "measure",
    "recheck",
]

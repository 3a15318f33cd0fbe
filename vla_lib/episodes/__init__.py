"""Raw recordings, opened, measured, judged and prepared. Imports no torch.

find_episodes(root) -> EpisodeFiles     Episode.open(files)       measure(episode), judge(episode, steps)
find_prepared(root), load_prepared(folder) -> PreparedEpisode; `vla_lib.preprocess` makes what they find

Room for what comes: a new layout begins in `layouts` (its names) and `episode` (which reader opens it); evidence for a
clock goes into `clocks`; a check of plausibility into `quality.judge`.
"""

from vla_lib.episodes.datasets import DatasetTable
from vla_lib.episodes.episode import Episode
from vla_lib.episodes.layouts import EpisodeFiles, find_episodes
from vla_lib.episodes.prepare import PreprocessSettings
from vla_lib.episodes.prepared import PreparedEpisode, find_prepared, load_prepared, recheck
from vla_lib.episodes.quality import judge, measure
from vla_lib.episodes.steps import build_steps

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
    "measure",
    "recheck",
]

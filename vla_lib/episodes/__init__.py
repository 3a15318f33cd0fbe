"""Raw recordings, opened, measured, judged and prepared. Imports no torch.

find_episodes(root) -> EpisodeFiles     Episode.open(files)       measure(episode), judge(episode, steps)
load_used(root) -> {key: PreparedEpisode}: what `vla_lib.preprocess` made, but what the marks leave out

Room for what comes: a new layout begins in `layouts` (its names; `survey` finds it) and `episode` (which reader opens
it); evidence for a clock goes into `clocks`; a check of plausibility into `quality.judge`.
"""

from vla_lib.episodes.datasets import DatasetTable as DatasetTable
from vla_lib.episodes.episode import Episode as Episode
from vla_lib.episodes.layouts import EpisodeFiles as EpisodeFiles
from vla_lib.episodes.prepare import PreprocessSettings as PreprocessSettings
from vla_lib.episodes.prepared import PreparedEpisode as PreparedEpisode
from vla_lib.episodes.prepared import load_prepared as load_prepared
from vla_lib.episodes.prepared import load_used as load_used
from vla_lib.episodes.prepared import recheck as recheck
from vla_lib.episodes.quality import judge as judge
from vla_lib.episodes.quality import measure as measure
from vla_lib.episodes.steps import build_steps as build_steps
from vla_lib.episodes.survey import find_episodes as find_episodes
from vla_lib.episodes.survey import find_prepared as find_prepared

"""A prepared episode in; which of its steps have the needle in contact out."""

import numpy as np

from vla_lib.episodes import PreparedEpisode

CONTACT_MN = 5.0  # above the episode's own rest level; several times the sensor's noise
REST_S = 1.0
SAMPLES = 13  # 20 ms at 650 Hz, as the runner's force limit
CONTACT, FREE, UNKNOWN = "contact", "free", "unknown"


def phases(episode: PreparedEpisode) -> np.ndarray:
    """(N,) of "contact" (measured force, mean of 20 ms up to the step, more than 5 mN above the median of the episode's first second), "free",
    and "unknown" where the episode has no sensor sample by then."""
    found = np.full(len(episode), UNKNOWN, dtype="<U7")
    if not episode.has_sensor:
        return found
    force, end = np.asarray(episode.sensor_force, np.float64), episode.sensor_index
    if not len(force) or not np.isfinite(force).all():
        return found
    begin = np.maximum(end - SAMPLES, 0)
    total = np.concatenate([[0.0], np.cumsum(force)])
    seen = end > 0
    mean = (total[end] - total[begin])[seen] / (end - begin)[seen]
    first = int(end[0])
    rest = np.median(force[max(0, first - round(REST_S * episode.sensor_hz)) : first] if first else mean[:5])
    found[seen] = np.where(mean - rest > CONTACT_MN, CONTACT, FREE)
    return found

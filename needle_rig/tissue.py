"""What the needle's tip meets at 650 Hz: puncture, force (mN) and OCT A-scans (1025 bins of 7.5 um).

An analytic model. Gel gives friction in proportion to the inserted length; the membrane gives a stiff, slightly
hardening spring until it is indented by `puncture_indent_mm`, then the force drops to friction; the deeper layer is
stiff again. The A-scan looks along the needle from the tip: the membrane is a narrow bright peak at the true
tip-to-membrane distance, the deeper layer a broad, dimmer one with a trailing edge that stays visible after the
puncture; speckle is fixed to the tissue, light is attenuated with depth, noise is added.
"""

import numpy as np

from needle_rig.arm import TICK_HZ, Motion
from needle_rig.world import World, stream

BINS = 1025
BIN_MM = 0.0075
RANGE_MM = BINS * BIN_MM  # 7.69 mm
CHANNELS = 1 + BINS  # force first
_FINE = 4  # the tissue's reflectivity is tabulated at a quarter of a bin
_FLOOR = 20.0
_NOISE = 2.5
_MEMBRANE_HEIGHT, _MEMBRANE_SIGMA_MM = 62.0, 0.045
_LAYER_HEIGHT, _LAYER_SIGMA_MM, _LAYER_TAIL_MM = 42.0, 0.09, 0.5
_GEL_HEIGHT, _SPECKLE, _DECAY_MM = 7.0, 0.3, 7.0
_LAYER_STIFFNESS_MN_MM = 350.0
_FORCE_NOISE_MN = 0.8


class Tissue:
    """State of the phantom of one world: whether the membrane is punctured, and the greatest true force so far."""

    def __init__(self, world: World):
        self.world = world
        self.punctured = False
        self.puncture_t_s: float | None = None
        self.peak_force_mN = 0.0
        self._last_z_mm: float | None = None
        self._measured = 0  # samples so far
        self._rng = stream(world.seed, "sensor")
        self._profile, self._top_mm = _reflectivity(world)

    def sense(self, motion: Motion) -> tuple[np.ndarray, np.ndarray]:
        """Advance by a stretch of motion; (n,) true force mN and (n,) bool punctured."""
        world, z = self.world, motion.position_mm[:, 2]
        depth = world.membrane_z_mm - z
        punctured = np.full(len(z), self.punctured)
        if not self.punctured:
            through = np.flatnonzero(depth >= world.puncture_indent_mm)
            if len(through):
                punctured[through[0] :] = True
                self.punctured, self.puncture_t_s = True, float(motion.t_s[through[0]])
        before = np.concatenate([[z[0] if self._last_z_mm is None else self._last_z_mm], z[:-1]])
        down_mm_s = (before - z) * TICK_HZ
        self._last_z_mm = float(z[-1])
        inserted = np.maximum(world.surface_z_mm - z, 0.0)
        friction = world.friction_mN * np.minimum(inserted, 1.0) + world.friction_mN_per_mm * inserted
        friction *= 0.6 + 0.4 * np.tanh(down_mm_s)  # some of it is left at rest, less when the needle is drawn back
        indent = np.where(punctured, 0.0, np.maximum(depth, 0.0))
        membrane = world.stiffness_mN_per_mm * indent * (1 + indent)
        layer = _LAYER_STIFFNESS_MN_MM * np.maximum(depth - world.layer_mm, 0.0)
        force = friction + membrane + layer
        self.peak_force_mN = max(self.peak_force_mN, float(force.max()))
        return force, punctured

    def measure(self, position_z_mm: np.ndarray, force_mN: np.ndarray, punctured: np.ndarray) -> np.ndarray:
        """(n, 1026) float32 samples, force first, for (n,) tip heights, true forces and states of the membrane."""
        n = len(position_z_mm)
        out = np.empty((n, CHANNELS), np.float32)
        noise = _FORCE_NOISE_MN * self._rng.standard_normal(n, dtype=np.float32)
        drift_s = (self._measured + np.arange(n)) / TICK_HZ
        out[:, 0] = force_mN + self.world.force_bias_mN + self.world.force_drift_mN_s * drift_s + noise
        self._measured += n
        scan = out[:, 1:]
        start = np.rint((self._top_mm - position_z_mm) / (BIN_MM / _FINE)).astype(np.int64)
        start = np.clip(start, 0, len(self._profile) - _FINE * BINS)
        windows = np.lib.stride_tricks.sliding_window_view(self._profile, _FINE * (BINS - 1) + 1)[:, ::_FINE]
        scan[:] = windows[start]
        # the tip carries the membrane along until it is punctured
        pressed = np.flatnonzero(~punctured & (position_z_mm < self.world.membrane_z_mm))
        if len(pressed):
            scan[pressed] += _peak(np.arange(BINS) * BIN_MM, 0.0, _MEMBRANE_HEIGHT, _MEMBRANE_SIGMA_MM)
        seen = np.float32(self.world.oct_contrast) * np.exp(-np.arange(BINS, dtype=np.float32) * (BIN_MM / _DECAY_MM))
        scan *= seen.astype(np.float32)
        scan += np.float32(_FLOOR)
        scan += np.float32(_NOISE) * self._rng.standard_normal(scan.shape, dtype=np.float32)
        return out


def _peak(x_mm: np.ndarray, at_mm: float, height: float, sigma_mm: float, tail_mm: float = 0.0) -> np.ndarray:
    past = np.maximum(x_mm - at_mm, 0.0)
    peak = np.exp(-0.5 * ((x_mm - at_mm) / sigma_mm) ** 2)
    tail = 0.5 * np.exp(-past / tail_mm) * (past > 0) if tail_mm else 0.0
    return (height * np.maximum(peak, tail)).astype(np.float32)


def _reflectivity(world: World) -> tuple[np.ndarray, float]:
    """Reflectivity along the needle in quarters of a bin, from above every start to below its reach; its top z, mm."""
    top_mm = world.surface_z_mm + 45.0
    depth = np.arange(int((45.0 + 30.0) / (BIN_MM / _FINE))) * (BIN_MM / _FINE)  # mm below the top
    membrane = top_mm - world.membrane_z_mm
    gel = _GEL_HEIGHT * ((depth > 45.0) & (depth < membrane + world.layer_mm))
    profile = gel + _peak(depth, membrane, _MEMBRANE_HEIGHT, _MEMBRANE_SIGMA_MM)
    profile += _peak(depth, membrane + world.layer_mm, _LAYER_HEIGHT, _LAYER_SIGMA_MM, _LAYER_TAIL_MM)
    grain = stream(world.seed, "speckle").standard_normal(len(depth) // 12 + 2)  # grains of three bins
    grain = np.interp(np.arange(len(depth)) / 12, np.arange(len(grain)), grain)
    return (profile * np.clip(1 + _SPECKLE * grain, 0.2, 2.0)).astype(np.float32), top_mm

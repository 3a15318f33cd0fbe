"""Clock offsets come from motion, pooled over a session; where streams begin shifts nothing."""

import numpy as np
import pytest
from preparing import prepare_all
from raw_episodes import T0, Raw, but

from vla_lib.episodes import Episode, find_prepared, load_prepared
from vla_lib.episodes.clocks import (
    CONFIRMED,
    FOUND,
    GIVEN,
    UNKNOWN,
    ClockOffset,
    Clocks,
    Estimate,
    Evidence,
    session_clocks,
    sessions,
)
from vla_lib.episodes.motion import camera_match, sensor_match
from vla_lib.preprocess import Settings, main


def lively(t):
    """(..., 6) mm and degrees: a motion whose speed changes all the time, as a hand's does."""
    t = np.asarray(t, float)
    place = [170 + 4 * np.sin(1.9 * t), 5 + 3 * np.sin(1.3 * t + 1) + 0.8 * np.sin(4.1 * t)]
    depth = 140 - 2 * t + 2 * np.sin(2.3 * t) + 0.7 * np.sin(5.2 * t + 2)
    return np.stack([*place, depth, 177 + 2 * np.sin(0.8 * t), 4 * np.sin(0.6 * t), 10 + t], axis=-1)


def in_bursts(t):
    """(..., 6) mm and degrees: an arm that is jogged: it moves, rests, moves again."""
    t = np.asarray(t, float)[..., None]
    jogs = 1 / (1 + np.exp(-(t - np.array([0.9, 2.0, 2.6, 4.3, 5.1, 7.0, 8.2, 8.9, 10.4])) / 0.07))
    place = jogs @ np.array([[2, 1, -1], [-2, 0, -1], [2, -1, -1], [0, 2, -2], [-2, 1, -1], [1, -2, -1], [2, 1, 0],
                             [-1, 2, -2], [1, -1, -1]])  # fmt: skip
    return np.concatenate([np.array([170, 5, 140]) + place, np.zeros((*place.shape[:-1], 3)) + [177, 2, 10]], axis=-1)


TISSUE = Raw(seconds=6.0, pose=lively, tissue=True, views=(1,), camera_hz=2.0)
SCENERY = Raw(seconds=12.0, pose=in_bursts, sensor=False, scenery=True, views=(1, 2))


def stale_and_uneven(raw):
    rng = np.random.default_rng(3)
    return but(raw, row_times=np.sort(np.arange(0, 6, 0.01) + rng.normal(0, 0.005, 600)), refresh_hz=60.0)


def holed(raw):
    t = np.arange(0, 6, 0.01)
    return but(raw, row_times=t[(t < 2.4) | (t > 2.9)])


@pytest.mark.parametrize("layout", ("F1", "F2", "F3"))
@pytest.mark.parametrize("ahead_ms", (0, -80, 1500))
def test_the_sensors_offset_is_found_whatever_the_recorder_does_first(tmp_path, layout, ahead_ms):
    raw = but(TISSUE, layout=layout, sensor_ahead=ahead_ms / 1e3)
    path = raw.write(tmp_path / "root" / "White_silicone_white_circle")
    (report,) = prepare_all(tmp_path / "root")
    episode = load_prepared(path)
    number = episode.sensor[:, 0]  # tells each sample's true time
    assert np.abs(episode.sensor_timestamp - T0 - number / 650).max() < 0.01
    assert episode.clocks.sensor.how == (FOUND if ahead_ms else CONFIRMED)
    assert ("the clock was off" in " ".join(report.reasons)) == bool(ahead_ms)


@pytest.mark.parametrize(
    "change", (stale_and_uneven, holed, lambda raw: but(raw, tail=3.0)), ids=("stale", "gap", "tail")
)
def test_faults_of_other_streams_shift_nothing(tmp_path, change):
    match = sensor_match(Episode.open(change(TISSUE).write(tmp_path / "d")))
    assert match.estimate.clear and abs(match.estimate.offset_s) < 0.005
    again = sensor_match(Episode.open(change(but(TISSUE, sensor_ahead=-0.08)).write(tmp_path / "e")))
    assert again.estimate.offset_s == pytest.approx(-0.08, abs=0.01)


@pytest.mark.parametrize("ahead_ms", (0, 120, -1500))
def test_the_cameras_offset_is_found_from_the_pictures(tmp_path, ahead_ms):
    path = but(SCENERY, cameras_ahead=ahead_ms / 1e3).write(tmp_path / "root" / "part1")
    prepare_all(tmp_path / "root")
    episode, raw = load_prepared(path), but(SCENERY)
    assert episode.clocks.cameras.how == (FOUND if ahead_ms else CONFIRMED)
    assert np.abs(episode.image_timestamp["View1_left"] - T0 - raw.picture_times(1)).max() < 0.04


def test_pictures_that_change_without_the_arm_tell_nothing(tmp_path):
    path = but(SCENERY, scenery=False, cameras_ahead=0.12).write(tmp_path / "root" / "part1")
    prepare_all(tmp_path / "root")
    assert load_prepared(path).clocks.cameras.how == UNKNOWN
    assert not camera_match(Episode.open(path)).estimate.clear


@pytest.mark.parametrize("layout", ("F1", "F2"))
@pytest.mark.parametrize(("ahead_s", "verdict"), ((0.0, "good"), (0.2, "good"), (1.5, "usable with exclusions")))
def test_where_a_stream_begins_shifts_nothing_and_is_said(tmp_path, layout, ahead_s, verdict):
    path = Raw(layout, sensor_ahead=ahead_s, tail=1.0).write(tmp_path / "root" / "part1")
    (report,) = prepare_all(tmp_path / "root")
    clock = load_prepared(path).clocks.sensor
    assert (clock.offset_s, clock.how, report.verdict) == (0.0, UNKNOWN, verdict)
    assert ("sensor: the recording begins" in " ".join(report.reasons)) == bool(ahead_s)


def test_cameras_that_begin_far_from_the_robot_are_not_good(tmp_path):
    Raw(cameras_ahead=-1.5, tail=2.0).write(tmp_path / "root" / "part1")
    (report,) = prepare_all(tmp_path / "root")
    assert report.verdict != "good" and "cameras: the recording begins -1" in " ".join(report.reasons)


def test_a_given_offset_overrides_what_the_motion_says(tmp_path):
    path = TISSUE.write(tmp_path / "root" / "part1")
    prepare_all(tmp_path / "root", sensor_clock_offset_ms=300)
    episode = load_prepared(path)
    assert episode.clocks.sensor.sentence() == "+300 ms, given"
    assert episode.sensor_timestamp[0] == pytest.approx(T0 - 0.3, abs=1e-5)
    opened = Episode.open(path, Clocks(ClockOffset(0.3, GIVEN)))
    np.testing.assert_allclose(opened.sensor.t_s, episode.sensor_timestamp)


# --- times as other recorders write them ---------------------------------------------------------------------------
def test_a_step_without_a_picture_in_a_view_is_not_valid(tmp_path):
    path = Raw(first_picture={1: 0.2, 3: 0.05}).write(tmp_path / "root" / "part1")
    (report,) = prepare_all(tmp_path / "root")
    episode = load_prepared(path)
    assert np.flatnonzero(~episode.valid).tolist() == [0, 1] and report.verdict == "good"
    assert "2 of 29 steps are invalid: a view has no picture yet (View1_left begins last)" in " ".join(report.reasons)
    prepare_all(tmp_path / "root", views=("View2_left", "View5"))
    assert load_prepared(path).valid.all()  # the views that are wanted have theirs
    late = Raw(seconds=4.0, cameras_ahead=1.5).write(tmp_path / "late" / "part1")
    (report,) = prepare_all(tmp_path / "late")
    assert np.flatnonzero(~load_prepared(late).valid).tolist() == list(range(15)) and report.verdict != "good"


@pytest.mark.parametrize("layout", ("F1", "F2", "F3"))
def test_unpadded_milliseconds_are_seen_from_their_spacing(tmp_path, layout):
    raw = Raw(layout, camera_hz=10.0)
    path = raw.write(tmp_path / "d")
    for file in path.rglob("*.jpg"):
        before, _, number = file.stem.rpartition("_")
        ms = round(float(number) * 1e3)
        file.rename(file.with_name(f"{before}{'_' if before else ''}{ms // 1000}.{ms % 1000}.jpg"))
    episode = Episode.open(path)
    for view in (1, 4):
        np.testing.assert_allclose(episode.pictures[f"View{view}_left"].t_s - T0, raw.picture_times(view), atol=1e-3)
    assert "fractions of a second without leading zeros" in " ".join(finding.text for finding in episode.findings)


def test_names_whose_trailing_zeros_are_missing_stay_as_they_are(tmp_path):
    raw = Raw("F3", camera_hz=10.0)
    path = raw.write(tmp_path / "d")
    for file in path.rglob("*.jpg"):
        file.rename(file.with_name(file.stem.rstrip("0") + "0.jpg" if file.stem.endswith(".000") else
                                   file.stem.rstrip("0") + ".jpg"))  # fmt: skip
    np.testing.assert_allclose(Episode.open(path).pictures["View1_left"].t_s - T0, raw.picture_times(1), atol=1e-3)


@pytest.mark.parametrize(
    ("per_second", "unit"), ((10**3, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds"))
)
def test_other_units_are_read_as_such(tmp_path, per_second, unit):
    path = Raw(edit_rows=lambda rows: np.column_stack([rows[:, :3] * per_second, rows[:, 3:]])).write(tmp_path / "d")
    for file in path.rglob("*.jpg"):
        before, _, number = file.stem.rpartition("_")
        file.rename(file.with_name(f"{before}_{round(float(number) * 1e3) * (per_second // 1000)}.jpg"))
    (sensor,) = path.glob("*.npz")
    with np.load(sensor) as held:
        np.savez(sensor, **{key: held[key] * per_second if "time" in key else held[key] for key in held})
    episode, plain = Episode.open(path), Raw()
    said = [finding.stream for finding in episode.findings if finding.text == f"its times are {unit}, and read as such"]
    assert {"robot", "sensor", "View1_left", "View5"} <= set(said)
    assert episode.start_s == pytest.approx(T0, abs=1e-5) and episode.duration_s == pytest.approx(2.99, abs=1e-5)
    assert episode.sensor.t_s[650] == pytest.approx(T0 + 1, abs=1e-5)
    np.testing.assert_allclose(episode.pictures["View5"].t_s - T0, plain.picture_times(5), atol=1e-3)


def test_packets_keep_all_their_samples_and_windows_span_a_tenth_of_a_second(tmp_path):
    path = Raw().write(tmp_path / "root" / "part1")
    (sensor,) = path.glob("*.npz")
    with np.load(sensor) as held:
        columns = {key: held[key] for key in held}
    columns["timestamps"] = columns["timestamps"][(np.arange(1950) // 13 + 1) * 13 - 1]
    np.savez(sensor, **columns)
    prepare_all(tmp_path / "root")
    episode = load_prepared(path)
    assert len(episode.sensor) == 1950 and episode.sensor_hz == pytest.approx(650, rel=0.01)
    np.testing.assert_allclose(episode.sensor_timestamp - T0, np.arange(1950) / 650, atol=1e-4)
    assert episode.sensor_full(65)[2:].all()
    assert "packets of 13" in str(episode.metadata["findings"])


# --- sessions ----------------------------------------------------------------------------------------------------
SHARP, VAGUE = (0.002, 0.99, 50.0), (0.2, 0.4, 1.0)


def evidence(start_s, offset_s, quality=SHARP):
    return Evidence(start_s, Estimate(offset_s, *quality), None)


def test_a_session_is_a_datasets_episodes_within_four_hours_of_one_another():
    hours = np.array([0, 9, 3, 3, 6, 20]) * 3600.0
    assert sessions(["a", "a", "a", "b", "a", "a"], hours) == [[0, 2, 4, 1], [5], [3]]


def test_a_session_shares_its_clear_evidence():
    told = [evidence(0, -0.081), evidence(60, -0.079), evidence(120, 1.2, VAGUE), Evidence(180, None, None)]
    clocks = session_clocks("a", told)
    assert [one.sensor.offset_s for one in clocks] == pytest.approx([-0.08] * 4)
    assert clocks[3].sensor.episodes == 2 and clocks[3].sensor.uncertainty_s < 0.002
    assert {one.cameras.how for one in clocks} == {UNKNOWN}


def test_small_offsets_and_unclear_ones_shift_nothing():
    small = session_clocks("a", [evidence(0, 0.004)])[0].sensor
    assert (small.offset_s, small.how, small.estimate_s) == (0.0, CONFIRMED, 0.004)
    unclear = session_clocks("a", [evidence(0, -0.3, VAGUE)])[0].sensor
    assert (unclear.offset_s, unclear.how) == (0.0, UNKNOWN)


def test_an_episode_whose_clock_was_set_in_between_keeps_its_own():
    clocks = session_clocks("a", [evidence(60 * k, offset_s) for k, offset_s in enumerate((0.0, 0.001, 1.5, -0.001))])
    assert [one.sensor.offset_s for one in clocks] == pytest.approx([0, 0, 1.5, 0])


def test_a_session_is_pooled_and_stays_unchanged(tmp_path):
    root = tmp_path / "root"
    dull = but(TISSUE, sensor_ahead=-0.08, tissue=False, start=T0 + 60)  # shows no layers: it takes the session's
    for number, raw in enumerate((but(TISSUE, sensor_ahead=-0.08), dull)):
        raw.write(root / "part1", f"recv_all_20251020_22401{number}")
    done = main(Settings(root, workers=1, quiet=True))
    assert [load_prepared(path).clocks.sensor.offset_s for path in find_prepared(root)] == pytest.approx([-0.08] * 2)
    sensor = next(row for row in done["clocks"] if row["stream"] == "sensor")
    assert (sensor["taken_off_ms"], sensor["how"], sensor["told_by"], sensor["episodes"]) == (-80.0, FOUND, 1, 2)
    assert main(Settings(root, workers=1, quiet=True))["unchanged"] == 2
    but(TISSUE, sensor_ahead=-0.08, start=T0 + 120).write(root / "part1", "recv_all_20251020_224012")
    again = main(Settings(root, workers=1, quiet=True))
    assert (again["written"], again["unchanged"]) == (1, 2)  # one more of the same: nobody else's times change

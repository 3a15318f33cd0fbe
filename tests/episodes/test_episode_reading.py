"""Reading what the lab records: four layouts, damaged rows, measured rates, clock offsets, verdicts."""

import numpy as np
import pytest
from raw_episodes import JPEG, T0, Raw, samples, smooth_pose, true_action

from vla_lib.core.errors import UserError
from vla_lib.episodes import (
    DatasetTable,
    Episode,
    build_steps,
    find_episodes,
    find_prepared,
    judge,
    load_prepared,
    measure,
    recheck,
)
from vla_lib.episodes.episode import pictures_at, sensor_image


def opened(tmp_path, raw, **options):
    return Episode.open(raw.write(tmp_path / "d"), **options)


def said(episode):
    return " | ".join(f.text for f in judge(episode, build_steps(episode)))


# --- layouts -----------------------------------------------------------------------------------------------
def test_all_layouts_are_found_by_content(mixed_root):
    found = [(f.layout, f.dataset, f.task) for f in find_episodes(mixed_root)]
    assert sorted(found) == [
        ("F0", "OCT_insertion", ""),
        ("F0", "part1", ""),
        ("F1", "White_silicone_white_circle", ""),
        ("F2", "New_dataset", "Red_point"),
        ("F3", "New_dataset3", "Eye_trocar"),
    ]


def test_every_layout_gives_the_same_episode(mixed_root):
    folders = find_prepared(mixed_root)
    assert len(folders) == 5
    for folder in folders:
        episode = load_prepared(folder)
        expected = true_action(smooth_pose, episode.timestamp - T0)
        np.testing.assert_allclose(episode.action[:, :6], expected, atol=2e-3)
        np.testing.assert_allclose(episode.state[:, 6:], smooth_pose(episode.timestamp - T0), atol=3e-3)
        assert {"View1_left", "View2_left", "View3_left", "View4_left", "View5"} <= set(episode.views)
        assert ("View1_right" in episode.views) == (episode.layout == "F1")
        assert episode.has_sensor == (episode.layout != "F0")
        if episode.has_sensor:
            first = -649 if episode.layout == "F2" else 0  # its first window ends at the first robot row
            np.testing.assert_array_equal(episode.sensor, samples(len(episode.sensor), first))
            np.testing.assert_array_equal(episode.sensor_force, episode.sensor[:, 0])


def test_prepared_episodes_agree_with_their_raw_files_by_another_route(mixed_root):
    for folder in find_prepared(mixed_root):
        table = recheck(load_prepared(folder), Episode.open(folder), count=8)
        assert len(table) == 8 and table[["picture", "sensor", "sample"]].all().all()
        assert table["position_mm"].max() < 1e-4 and table["rotation_deg"].max() < 1e-4


def test_a_robot_log_is_known_by_its_columns_not_its_name(tmp_path):
    path = Raw().write(tmp_path / "d")
    next(path.glob("*.csv")).rename(path / "log (1).CSV")
    (path / "aaa.csv").write_text("time,comment\n1,x\n")
    assert find_episodes(tmp_path)[0].robot_log.name == "log (1).CSV"


def test_f0_accepts_both_names_of_its_clock(tmp_path):
    path = Raw("F0").write(tmp_path / "d")
    log = next(path.glob("*.csv"))
    log.write_text(log.read_text().replace("epoch_s", "timestamp", 1))
    assert Episode.open(path).robot.clock == "timestamp"


def test_metadata_json_is_never_trusted(tmp_path):
    path = Raw("F2", seconds=2.0).write(tmp_path / "New_dataset" / "Red_point")
    (path / "metadata.json").write_text('{"camera_views": [], "sensor_hz": 3, "robot_hz": "fast"')
    episode = Episode.open(path)
    assert len(episode.pictures) == 5 and episode.sensor.hz == pytest.approx(650, rel=0.01)


def test_compressed_and_several_sensor_files(tmp_path):
    path = Raw(seconds=2.0, compressed=True).write(tmp_path / "d")
    later = np.arange(1300, 1950) / 650 + T0
    np.savez(
        path / "sensor_data_b.npz", timestamps=later, forces=np.arange(1300, 1950.0), alines=samples(650, 1300)[:, 1:]
    )
    sensor = Episode.open(path).sensor
    np.testing.assert_array_equal(np.concatenate([block.copy() for block, _ in sensor.blocks()]), samples(1950))
    np.testing.assert_array_equal(sensor.rows(np.array([3, 1299, 1300])), samples(1950)[[3, 1299, 1300]])


# --- damaged rows and pictures -----------------------------------------------------------------------------
def test_a_cut_off_last_line_is_dropped_even_where_its_cells_look_whole(tmp_path):
    path = Raw().write(tmp_path / "d")
    log = next(path.glob("*.csv"))
    log.write_bytes(log.read_bytes()[:-4])  # the last cell lost digits, the row still has all its cells
    episode = Episode.open(path)
    assert len(episode.robot.t_s) == 299 and "last line is cut off" in said(episode)


def test_empty_cells_text_and_infinities_are_left_out(tmp_path):
    path = Raw(
        edit_rows=lambda rows: np.where(
            np.isin(np.arange(300), [100, 101])[:, None] & (np.arange(16) > 12), np.nan, rows
        )
    ).write(tmp_path / "d")
    log = next(path.glob("*.csv"))
    lines = log.read_text().splitlines()
    lines[150] = lines[150].replace(lines[150].split(",")[12], "oops")
    lines[151] = lines[151].replace(lines[151].split(",")[12], "inf")
    lines.insert(160, lines[160] + ",1,2,3")
    log.write_text("\n".join(lines) + "\n")
    episode = Episode.open(path)
    steps = build_steps(episode)
    assert len(episode.robot.t_s) == 296 and "empty or unreadable" in said(episode)
    expected = true_action(smooth_pose, steps.t_s - T0)
    assert np.abs(steps.action[:, :6] - expected)[steps.valid].max() < 0.02


def test_a_clock_that_steps_back_loses_only_the_rows_that_did(tmp_path):
    def back(rows):
        rows[150:153, 1] -= 0.05
        return rows

    episode = opened(tmp_path, Raw(edit_rows=back))
    steps = build_steps(episode)
    assert measure(episode)["robot"].backward_steps == 1 and "steps back 1 time(s)" in said(episode)
    assert len(episode.robot.t_s) == 297 and steps.valid.all()
    assert np.abs(steps.action[:, :6] - true_action(smooth_pose, steps.t_s - T0)).max() < 0.02


def test_a_stray_stamp_loses_only_itself(tmp_path):
    def stray(rows):
        rows[0, 1], rows[200, 1] = 0.0, 4e9
        return rows

    episode = opened(tmp_path, Raw(edit_rows=stray))
    assert len(episode.robot.t_s) == 298 and len(build_steps(episode)) == 29


def test_cut_off_and_nameless_pictures_are_left_out_and_said(tmp_path):
    path = Raw("F3").write(tmp_path / "d")
    files = sorted((path / "View2").glob("*.jpg"))
    files[3].write_bytes(JPEG[:100])
    files[4].write_bytes(b"")
    (path / "View2" / "snapshot.jpg").write_bytes(JPEG)
    (path / "View2" / "notes.txt").write_text("x")
    episode = Episode.open(path)
    assert len(episode.pictures["View2_left"]) == len(files) - 2
    assert "2 pictures are cut off or empty" in said(episode) and "1 pictures in View2 carry no time" in said(episode)


# --- rates -------------------------------------------------------------------------------------------------
def test_slow_refresh_under_fast_rows_is_seen(tmp_path):
    episode = opened(tmp_path, Raw(refresh_hz=60.0, seconds=5.0))
    row = measure(episode)["robot"]
    assert row.hz == pytest.approx(100, rel=0.01) and row.distinct_hz == pytest.approx(60, rel=0.02)
    assert "poses change at 60 Hz" in said(episode)


def test_a_resting_arm_stays_at_rest_under_slow_refresh(tmp_path):
    def stop(t):
        return smooth_pose(np.minimum(t, 1.0) + np.maximum(t - 2.0, 0))

    steps = build_steps(opened(tmp_path, Raw(refresh_hz=60.0, pose=stop)))
    assert np.abs(steps.action[11:19, :6]).max() < 1e-6


def test_jitter_gaps_and_repeats_are_measured(tmp_path):
    t = np.repeat(np.arange(0, 3, 0.01), np.where(np.arange(300) % 50 == 7, 2, 1))
    t = t[(t < 1.0) | (t > 1.5)]
    row = measure(opened(tmp_path, Raw(row_times=t)))["robot"]
    assert (
        row.repeats == 5
        and len(row.gaps) == 1
        and row.jitter_max_ms == pytest.approx(510, abs=15)
        and row.jitter_p50_ms < 0.1
    )
    assert row.gaps[0][1] - row.gaps[0][0] == pytest.approx(0.52, abs=0.02)


def test_starts_and_ends_are_told_against_the_robot(tmp_path):
    rates = measure(opened(tmp_path, Raw(tail=1.0, first_picture={3: 0.2})))
    assert rates["View3_left"].start_s == pytest.approx(0.2, abs=1e-3)
    assert rates["sensor"].end_s == pytest.approx(1.01, abs=0.01)
    assert rates["View5"].hz == pytest.approx(5, rel=0.01)


# --- windows -----------------------------------------------------------------------------------------------
def test_a_loss_inside_windows_counts_as_a_gap(tmp_path):
    t = np.arange(3250) / 650
    episode = opened(tmp_path, Raw("F2", seconds=5.0, sensor_times=t[(t < 2.5) | (t > 2.8)]))
    assert len(episode.sensor.gaps) == 1
    begin, end = episode.sensor.gaps[0]
    assert begin - T0 <= 2.5 and end - T0 >= 2.8 and end - begin < 0.55
    steps = build_steps(episode)
    assert not steps.valid[25:28].any() and steps.valid[:23].all() and steps.valid[31:48].all()


def test_overlaps_that_disagree_are_reported(tmp_path):
    path = Raw("F2", sensor=False).write(tmp_path / "d")
    values = samples(1300)
    windows = np.stack([values[e - 650 : e] for e in (650, 780, 910, 1040)])
    windows[2] = np.random.default_rng(0).random(windows[2].shape)
    np.savez(path / "s.npz", timestamps=T0 + np.array([650, 780, 910, 1040]) / 650, data=windows)
    episode = Episode.open(path)
    assert "do not share the samples" in said(episode) and len(episode.sensor) == 1040


# --- verdicts ----------------------------------------------------------------------------------------------
def test_verdicts_in_words(tmp_path):
    good = opened(tmp_path / "a", Raw())
    assert judge(good, build_steps(good)).verdict == "good"
    partly = opened(tmp_path / "b", Raw(views=(1, 3, 4, 5)))
    findings = judge(partly, build_steps(partly))
    assert findings.verdict == "usable with exclusions" and findings.left_out == [
        "View2_left: the view has no pictures"
    ]
    still = opened(tmp_path / "c", Raw(pose=lambda t: smooth_pose(0 * t)))
    assert judge(still, build_steps(still)).verdict == "rejected" and "stands still" in said(still)
    blind = opened(tmp_path / "d", Raw(views=()))
    assert judge(blind, build_steps(blind)).verdict == "rejected" and "no view has pictures" in said(blind)
    t = np.arange(0, 3, 0.01)
    holes = opened(tmp_path / "e", Raw(row_times=t[(t < 0.6) | (t > 2.7)]))
    assert judge(holes, build_steps(holes)).verdict == "rejected"


# --- looking -----------------------------------------------------------------------------------------------
def test_instants_and_thinned_a_scans(tmp_path):
    episode = opened(tmp_path, Raw("F2", seconds=2.0))
    shown = pictures_at(episode, T0 + 1.0)
    assert [p.view for p in shown] == ["View1_left", "View2_left", "View3_left", "View4_left", "View5"]
    assert all(0 <= p.age_ms < 201 and p.path.is_file() for p in shown)
    assert all(p.path is None for p in pictures_at(episode, T0 - 1.0))
    image = sensor_image(episode, 50)
    assert image.values.shape == (1025, 50) and image.values[0, 0] == 0.25 - 649 and np.all(np.diff(image.t_s) > 0)


# --- the table of datasets --------------------------------------------------------------------------------
def test_built_in_table_and_its_override(tmp_path):
    table = DatasetTable.load(tmp_path)
    assert [table.weight(name) for name in ("New_dataset", "White_silicone_white_circle", "part1", "unknown")] == [
        3,
        2,
        1,
        1,
    ]
    assert table.instruction("New_dataset", "Red_point") == "Perform Red point insertion task"
    assert (
        table.instruction("Needle_insertion_eye_trocar")
        == "Insert the needle through the trocar into the eye phantom model"
    )
    (tmp_path / "datasets.yaml").write_text(
        "part1: {weight: 5}\nNew_dataset/Red*: {instruction: Go for {task}}\n".replace("{task}}", "'{task}'}").replace(
            "Go for '{task}'", "'Go for {task}'"
        )
    )
    mine = DatasetTable.load(tmp_path)
    assert mine.weight("part1") == 5 and mine.instruction("part1") == "Perform the insertion task"
    assert (
        mine.instruction("New_dataset", "Red_point") == "Go for Red point"
        and mine.weight("New_dataset", "Red_point") == 3
    )


@pytest.mark.parametrize(
    "text", ("- a\n- b\n", "part1: 3\n", "part1: {weight: -1}\n", "part1: {weights: 1}\n", "a: [\n")
)
def test_a_table_that_cannot_be_understood_is_refused(tmp_path, text):
    (tmp_path / "datasets.yaml").write_text(text)
    with pytest.raises(UserError, match="datasets.yaml"):
        DatasetTable.load(tmp_path)


def test_a_folder_whose_only_log_is_blank_is_an_episode_to_record_again(tmp_path):
    folder = tmp_path / "White_silicone_white_circle" / "third try"
    folder.mkdir(parents=True)
    (folder / "robot.csv").touch()
    (found,) = find_episodes(tmp_path)
    assert found.path == folder and found.robot_log is None

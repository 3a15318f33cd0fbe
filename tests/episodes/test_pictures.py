"""Pictures judged by what they show, each kind of damage planted: the steps that would have seen it are not valid."""

import io
import os

import numpy as np
import pytest
from PIL import Image
from preparing import prepare_all
from raw_episodes import JPEG, T0, Raw, smooth_pose

from vla_lib.episodes import Episode, build_steps, judge, load_prepared

DAMAGED = slice(6, 10)  # pictures of View2 that were taken from 1.17 s to 1.77 s
SEEN = list(range(9, 20))  # from the last sound picture, at 0.97 s, to the next one, at 1.97 s


def saved(picture, kind="JPEG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def turned(picture):
    exif = Image.Exif()
    exif[274] = 3
    return saved(picture, exif=exif)


def holed(data):
    middle = data.rindex(b"\xff\xda") + 60
    return data[:middle] + bytes(2000) + data[middle + 200 :]


@pytest.fixture
def files(tmp_path):
    path = Raw(seconds=4.0, first_picture={2: -0.03}).write(tmp_path / "root" / "part1")
    return sorted((path / "View2" / "left").glob("*.jpg"))


def opened(files, **options):
    episode = Episode.open(files[0].parents[2], **options)
    steps = build_steps(episode)
    text = " | ".join(f.text for f in judge(episode, steps) if f.stream in ("View2_left", "pictures"))
    return episode, steps, text


KINDS = {
    "html": (lambda data, picture: b"<html>" * 200, "are no pictures"),
    "zero bytes": (lambda data, picture: bytes(len(data)), "are no pictures"),
    "empty": (lambda data, picture: b"", "are cut off or empty"),
    "cut": (lambda data, picture: data[: len(data) * 9 // 10], "are cut off or empty"),
    "1x1": (lambda data, picture: saved(picture.resize((1, 1))), "are of another size than the others (32x18)"),
    "portrait": (lambda data, picture: saved(picture.resize((18, 32))), "are of another size than the others (32x18)"),
    "upside down": (lambda data, picture: turned(picture), "are marked (EXIF) as turned another way"),
    "black": (lambda data, picture: saved(Image.new("RGB", picture.size)), "are of one colour"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_saw_a_broken_picture_are_not_valid(files, kind):
    damage, words = KINDS[kind]
    for file in files[DAMAGED]:
        file.write_bytes(damage(file.read_bytes(), Image.open(file)))
    episode, steps, text = opened(files)
    assert np.flatnonzero(~steps.valid).tolist() == SEEN
    assert f"4 pictures {words}" in text and f"(first: View2/left/{files[6].name}, at 1.17 s)" in text
    assert files[6].name not in str(episode.pictures["View2_left"].paths)


def test_half_the_size_is_only_resized_and_grey_is_a_picture(files):
    for file in files[DAMAGED]:
        file.write_bytes(saved(Image.open(file).resize((16, 9)).convert("L")))
    _, steps, text = opened(files)
    assert steps.valid.all() and not text


def test_a_frozen_camera_is_found_by_bytes_and_motion(files):
    for file in files[6:11]:
        file.write_bytes(files[5].read_bytes())
    _, steps, text = opened(files)
    assert np.flatnonzero(~steps.valid).tolist() == list(range(9, 22))
    assert "5 pictures repeat the one before while the arm moves" in text and "at 1.17 s" in text


def test_equal_pictures_of_a_resting_arm_are_no_frozen_camera(tmp_path):
    path = Raw(seconds=4.0, pose=lambda t: smooth_pose(np.clip(t, 2.0, None))).write(tmp_path / "d")
    files = sorted((path / "View2" / "left").glob("*.jpg"))
    for file in files[:9]:
        file.write_bytes(files[0].read_bytes())
    episode = Episode.open(path)
    assert build_steps(episode).valid.all() and len(episode.pictures["View2_left"]) == len(files)


@pytest.mark.parametrize("kind", ("frozen", "black"))
def test_a_view_that_is_mostly_not_sound_is_left_out_and_the_others_stay(files, kind):
    for file in files[4:]:
        file.write_bytes(files[3].read_bytes() if kind == "frozen" else saved(Image.new("RGB", (32, 18), "white")))
    episode, steps, text = opened(files)
    assert "View2_left" not in episode.pictures and len(episode.pictures) == 4 and steps.valid.all()
    assert "17 of its 21 pictures are not sound" in text and "at 0.77 s" in text


def test_a_hole_inside_is_found_where_every_picture_is_decoded(files):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 160, 3), np.uint8))
    for number, file in enumerate(files):
        data = saved(noise.rotate(number), quality=90)
        file.write_bytes(holed(data) if file in files[DAMAGED] else data)
    assert opened(files)[1].valid.all()
    _, steps, text = opened(files, full_picture_check=True)
    assert np.flatnonzero(~steps.valid).tolist() == SEEN and "4 pictures are cut off" in text


def test_dangling_and_looping_links_cost_only_themselves(files):
    for file, target in zip(files[6:8], ("nowhere.jpg", files[7].name), strict=True):
        file.unlink()
        os.symlink(target, file)
    assert prepare_all(files[0].parents[4])[0].status == "written"
    episode = load_prepared(files[0].parents[2])
    assert len(episode) == 39 and len(episode.image_timestamp["View2_left"]) == 19
    assert "2 pictures are cut off or empty" in str(episode.metadata["findings"])


def test_a_name_with_a_line_end_costs_only_itself(files):
    files[6].rename(files[6].with_name(f"a\nb_{T0 + 1.2:.3f}.jpg"))
    (files[0].parent / f"back\\slash_{T0:.3f}.jpg").write_bytes(JPEG)
    path = files[0].parents[2]
    path = path.rename(path.with_name("recv_all_20251020_224016 \n"))
    assert prepare_all(path.parents[1])[0].status == "written"
    episode = load_prepared(path)
    assert len(episode.image_timestamp["View2_left"]) == 20 and episode.picture_path("View2_left", 12).is_file()
    assert "2 pictures have a line end, a backslash" in str(episode.metadata["findings"])

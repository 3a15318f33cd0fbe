"""Episodes to look at and decide about: the table and the viewer of `browser/episodes.js`, live and as a saved page.

The script draws; here is what it is given. Pictures go to it as the files they are, when it asks for them. Times are
seconds since the first robot row.
"""

import base64
import contextlib
import io
import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import anywidget
import matplotlib as mpl
import numpy as np
import traitlets
from IPython.display import HTML, display
from PIL import Image

from vla_lib.core.errors import UserError, in_words
from vla_lib.episodes import Episode, build_steps, find_episodes
from vla_lib.episodes.datasets import Mark, Marks
from vla_lib.episodes.episode import pictures_at, sensor_image
from vla_lib.episodes.prepared import known_clocks
from vla_lib.workbench.markup import Markup, page
from vla_lib.workbench.notebook import interactive, pick
from vla_lib.workbench.triage import (
    First,
    contact_s,
    episode_rows,
    first_that_opens,
    fitting,
    glance,
    marked,
    picture_url,
)

FOLDER = Path(__file__).parent / "browser"
POINTS = 1500  # of a trace at most, thinned evenly; of the force the extremes
SAVED_POINTS, SAVED_PX = 600, 320  # in a saved page, which is mailed
NO_MARK = Mark()
ACTIONS = (("motion", "mm", 0, ("dx", "dy", "dz")), ("rotation", "deg", 3, ("rx", "ry", "rz")))
KINDS = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".bmp": "image/bmp"}


def script() -> str:
    """The whole script, the library for the panels included."""
    return (FOLDER / "uplot.min.js").read_text() + (FOLDER / "episodes.js").read_text()


def style() -> str:
    """The whole style sheet."""
    return (FOLDER / "uplot.min.css").read_text() + (FOLDER / "episodes.css").read_text()


def payload(episode: Episode, hz: float, mark: Mark = NO_MARK, points: int = POINTS) -> dict[str, Any]:
    """What the viewer draws of one opened episode, but its pictures: traces, M-mode, times, spans that are not used.

    Raises UserError where the robot log covers no step.
    """
    steps, start_s = build_steps(episode, hz), episode.start_s
    robot, sensor = episode.robot, episode.sensor
    pose = robot.pose - np.append(robot.pose[0, :3], [0, 0, 0])
    traces = [
        _trace("position from the start", "mm", robot.t_s - start_s, pose[:, :3], ("x", "y", "z"), points),
        _trace("angles", "deg", robot.t_s - start_s, pose[:, 3:], ("α", "β", "γ"), points),
        _trace("joints", "deg", robot.t_s - start_s, robot.joints, [f"j{k}" for k in range(1, 7)], points),
    ]
    if sensor is not None:
        traces.insert(1, _extremes("force", sensor.t_s - start_s, sensor.force, points))
    for title, unit, first, names in ACTIONS:
        values = steps.action[:, first : first + 3]
        title = f"{title} of {1e3 / hz:.0f} ms"
        traces.append(_trace(title, unit, steps.t_s - start_s, values, names, len(steps)) | {"steps": True})
        if episode.commands is not None:
            ordered, at_s = episode.commands.action[:, first : first + 3], episode.commands.t_s - start_s
            traces.append(_trace(f"what the policy ordered: {title}", unit, at_s, ordered, names, points))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (~steps.valid).astype(int), [0]]))).reshape(-1, 2)
    grid_s = np.append(steps.t_s - start_s, steps.t_s[-1] - start_s + 1 / hz)
    clock = episode.clocks.sensor.sentence()
    return {
        "title": f"{episode.path.parent.name}/{episode.name} ({episode.layout}, {episode.duration_s:.1f} s); {clock}",
        "duration_s": episode.duration_s,
        "times": np.round(steps.t_s - start_s, 4).tolist(),
        "views": [
            {"name": view, "t": np.round(one.t_s - start_s, 4).tolist()}
            for view, one in episode.pictures.items()
            if not view.endswith("_right")
        ],
        "traces": traces,
        "mmode": _mmode(episode),
        "unused": [[float(grid_s[begin]), float(grid_s[end])] for begin, end in edges],
        "trimmed": trimmed(mark, episode.duration_s),
        "contact_s": None if sensor is None else contact_s(sensor.force, sensor.t_s - start_s),
    }


def trimmed(mark: Mark, duration_s: float) -> list[list[float]]:
    """The spans that a mark cuts off."""
    begin, end = mark.trim
    return [span for span in ([0.0, begin], [min(end, duration_s), duration_s]) if span[1] > span[0]]


def _trace(title: str, unit: str, t_s: Any, values: Any, names: Any, points: int) -> dict[str, Any]:
    every = max(1, -(-len(t_s) // points))
    columns = np.where(np.isfinite(values[::every]), np.round(values[::every], 4), np.nan).T
    found = [[None if np.isnan(value) else float(value) for value in column] for column in columns]
    t = np.round(t_s[::every], 4).tolist()
    return {"title": title, "unit": unit, "every": every, "t": t, "names": list(names), "values": found}


def _extremes(title: str, t_s: Any, force: Any, points: int) -> dict[str, Any]:
    """Least and largest of each stretch, so that no peak is thinned away."""
    every = max(1, -(-len(force) // points))
    whole = len(force) // every * every
    folded = np.asarray(force[:whole], float).reshape(-1, every)
    if every == 1:
        return _trace(title, "sensor's unit", t_s, folded, ("force",), points)
    both = np.stack([folded.min(axis=1), folded.max(axis=1)], axis=1)
    return _trace(title, "sensor's unit", t_s[:whole:every], both, ("least", "most"), points) | {"every": every}


def _mmode(episode: Episode) -> dict[str, Any] | None:
    """The A-scans over time as an 8-bit picture (depth x time); the script gives it its colours."""
    image = sensor_image(episode)
    if image is None or len(image.t_s) < 2 or not np.isfinite(image.values).any():
        return None
    low, high = (float(value) for value in np.nanpercentile(image.values[::4, ::4], (1, 99.5)))
    span = (high - low) or 1.0
    grey = np.clip((np.nan_to_num(image.values[::2], nan=low) - low) / span * 255, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    colours = mpl.colormaps["magma"](np.arange(256), bytes=True)[:, :3].tolist()
    picture = base64.b64encode(buffer.getvalue()).decode()
    assert episode.sensor is not None
    t_s = image.t_s - episode.start_s
    return {
        "png": f"data:image/png;base64,{picture}", "t": np.round(t_s, 4).tolist(), "rows": len(grey),
        "bins": len(image.values), "low": low, "high": low + span, "every_s": float(np.median(np.diff(t_s))),
        "sample": np.searchsorted(episode.sensor.t_s, image.t_s).tolist(), "colours": colours,
    }  # fmt: skip


def _saved_pictures(episode: Episode, instants: int) -> dict[str, dict[int, str]]:
    """View -> number -> address of its picture, small, at a few instants over the motion."""
    found: dict[str, dict[int, str]] = {}
    for t_s in episode.start_s + episode.duration_s * np.linspace(0, 1, max(2, instants)):
        for seen in pictures_at(episode, float(t_s)):
            if seen.path is None or seen.view.endswith("_right") or seen.number in found.get(seen.view, {}):
                continue
            found.setdefault(seen.view, {})[seen.number] = picture_url(seen.path, SAVED_PX)
    return found


class EpisodeBrowser(anywidget.AnyWidget):
    """All episodes of a root in a table, and one or two of them to look at; marks go to the root's file at once.

    dataset, episode: which to begin with, by text in its path below the root; one that cannot be opened is passed over.
    Raises UserError where the root, its marks or its verdicts cannot be read, or no episode fits.
    """

    _esm = script()
    _css = style()
    rows: traitlets.List[Any] = traitlets.List().tag(sync=True)

    def __init__(self, root: Path, action_hz: float = 10.0, dataset: str = "", episode: str = "") -> None:
        super().__init__()
        self.root, self.action_hz = root, action_hz
        files = find_episodes(root)
        self.rows = episode_rows(root, files)
        self._by_key = dict(zip((row["key"] for row in self.rows), files, strict=True))
        self._fits = fitting(self._by_key, dataset, episode)
        self._opened: dict[int, Episode] = {}
        self._shown = ""
        self.on_msg(self._asked)

    @cached_property
    def first(self) -> First:
        """What to begin with; opened when it is asked for, so that the table need not wait."""
        return first_that_opens(self._fits)

    @property
    def key(self) -> str:
        """The episode that is shown, by its path below the root; "" where none can be opened."""
        return self._shown or self.first.key

    @property
    def verdicts(self) -> dict[str, int]:
        """How many episodes have which verdict."""
        return dict(Counter(row["verdict"] for row in self.rows))

    def _asked(self, _widget: Any, asked: dict[str, Any], _buffers: Any) -> None:
        place, key = asked.get("place", 0), asked.get("open", asked.get("mark", ""))
        try:
            if "ready" in asked and self.key:
                self._open(self.key, 0)
            elif "open" in asked:
                self._open(key, place)
                if not place:
                    pick(dataset="", episode=key)
            elif "glance" in asked:
                self.send({"glance": {key: glance(self._by_key[key]) for key in asked["glance"]}})
            elif "pictures" in asked:
                self._send_pictures(asked["pictures"])
            elif "mark" in asked:
                self.mark(key, **asked["changes"])
        except Exception as error:  # of one episode, or a file that cannot be written: said in the page
            self.send({"error": in_words(error), "key": key, "place": place if "open" in asked else None})

    def _open(self, key: str, place: int) -> None:
        self._opened.pop(place, None)
        files = self._by_key[key]
        episode = Episode.open(files, known_clocks(files.path))
        self._opened[place] = episode
        drawn = payload(episode, self.action_hz, Marks.load(self.root).of(key))
        self._shown = key if not place else self._shown
        self.send({"episode": drawn, "key": key, "place": place})

    def _send_pictures(self, wanted: list[tuple[int, str, int]]) -> None:
        told, buffers = [], []
        for place, view, number in wanted:
            data, kind = b"", ""
            with contextlib.suppress(OSError, UserError, KeyError, IndexError):
                episode = self._opened[place]
                path = episode.picture(episode.pictures[view].paths[number])
                data, kind = path.read_bytes(), KINDS.get(path.suffix.lower(), "image/jpeg")
            told.append([place, view, number, kind])
            buffers.append(data)
        self.send({"pictures": told}, buffers)

    def mark(self, key: str, **changes: Any) -> None:
        """Change an episode's line in marks.yaml, and show it. Raises UserError where that cannot be written."""
        marks = Marks.load(self.root).write(key, **changes)
        row = next(row for row in self.rows if row["key"] == key)
        # in place: a page that is opened later has it, this one is sent the row alone
        row |= marked(marks, key, self._by_key[key])
        self.send({"row": row})
        if key == self.key and 0 in self._opened:
            self.send({"trimmed": trimmed(marks.of(key), self._opened[0].duration_s) or [[0, 0]]})

    def page(self, instants: int) -> HTML:
        """The saved page: the table, and the first episode with its pictures at `instants` moments."""
        episode = self.first.episode
        data: dict[str, Any] = {"rows": self.rows, "key": self.key, "episode": None}
        if episode is not None:
            mark = Marks.load(self.root).of(self.key)
            drawn = payload(episode, self.action_hz, mark, SAVED_POINTS)
            data["episode"] = drawn | {"pictures": _saved_pictures(episode, instants)}
        told = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # nothing in it ends the script
        body = Markup(
            "<style>{}</style><div class='vla-saved'></div><script type='application/json'>{}</script>"
            "<script type='module'>{}</script>"
        )
        code = script().replace("export default", "const viewer =") + (FOLDER / "saved.js").read_text()
        return page(body.format(Markup(style()), Markup(told), Markup(code)))

    def show(self, instants: int = 6) -> None:
        """Show the widget, or where nobody sits before the kernel the saved page."""
        display(self if interactive() else self.page(instants))
        print("\n".join(self.first.broken), end="\n" if self.first.broken else "")

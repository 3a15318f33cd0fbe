"""The episodes' table and viewer in an open notebook 01, as a person sees and works it."""

from typing import Any


class EpisodePage:
    """Clicks, keys, and what is shown then."""

    def __init__(self, desk: Any):
        self.desk = desk
        self.place = desk.show("episodes").locator(".vla-browser")
        self.rows = self.place.locator("tr[data-key]")
        desk.until(lambda: int(self.place.get_attribute("data-drawn") or 0) > 0)

    def count(self) -> str:
        """What stands beside the filter."""
        return self.place.locator(".vla-count").inner_text()

    def said(self) -> str:
        """The sentence below the table."""
        return self.place.locator(".vla-say").inner_text()

    def time(self) -> float:
        """The shared instant (s)."""
        return float(self.place.locator("output").inner_text().removesuffix(" s"))

    def filter(self, words: str) -> None:
        self.place.get_by_placeholder("filter").fill(words)

    def row(self, key: str) -> Any:
        return self.place.locator(f"tr[data-key='{key}']")

    def keys(self) -> list[str]:
        """Of all rows; the table makes those far down when it is scrolled there."""
        self.place.locator(".vla-rows").evaluate("box => { box.scrollTop = box.scrollHeight }")
        self.desk.until(lambda: self.rows.count() == int(self.count().split()[0]))
        return self.rows.evaluate_all("all => all.map(row => row.dataset.key)")

    def good(self) -> list[str]:
        """Keys of the episodes of the first dataset that opens, as the table has them."""
        return [key for key in self.keys() if key.startswith("White")]

    def current(self) -> str:
        """The key of the chosen row."""
        return self.place.locator("tr.vla-current").get_attribute("data-key") or ""

    def opened(self, before: str) -> str:
        """The key of the chosen row, once it is another than `before` and no more on its way."""
        self.desk.until(lambda: self.current() != before, 60)
        self.desk.until(lambda: not self.said().startswith("opening"), 60)
        return self.current()

    def open_good(self, number: int) -> str:
        """Click an episode that opens; its key."""
        key = self.good()[number]
        self.row(key).click()
        self.desk.until(lambda: self.current() == key and not self.said().startswith("opening"), 60)
        return key

    def act(self, what: str) -> None:
        """Press the button of that name, or the key."""
        if self.place.locator("button", has_text=what).count() and len(what) > 1:
            self.place.get_by_role("button", name=what, exact=True).click()
        else:
            self.place.press(what)

    def step(self, key: str) -> None:
        """Press a key, and wait until that is drawn."""
        before = self.place.get_attribute("data-drawn")
        self.place.press(key)
        self.desk.until(lambda: self.place.get_attribute("data-drawn") != before)

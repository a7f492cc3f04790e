"""HTML pages and figures, read back."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def boxes(self, legend: int) -> dict[str, list[tuple[float, ...]]]:
        """Boxes by class, but for halos and the first ones, which are the legend's."""
        found: dict[str, list[tuple[float, ...]]] = {}
        for rect in [each for each in self.of("rect") if each["class"] != "halo"][legend:]:
            place = tuple(float(rect[side] or "nan") for side in ("x", "y", "width", "height"))
            found.setdefault(str(rect["class"]), []).append(place)
        return found


class Recorder:
    """Stands in for the canvas: keeps the figure, to be looked at."""

    def __init__(self, figure):
        Recorder.figure = figure

    def print_png(self, path):
        pass

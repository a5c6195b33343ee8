"""What a section of the page is made of: figures, tables and notices, numbered in the order in which they stand."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from markupsafe import Markup

LEGEND_OPEN = 20  # longer legends are folded
TALL_ROWS = 40  # longer tables scroll in their box


@dataclass
class Panel:
    """One drawing with its heading. `legend`: (label, colour); `scale`: (low, high, CSS gradient) of a colour axis;
    `sizes`: (label, pixels) of an axis of areas."""

    svg: Markup
    heading: str = ""
    legend: tuple[tuple[str, str], ...] = ()
    scale: tuple[str, str, str] | None = None
    sizes: tuple[tuple[str, float], ...] = ()

    @property
    def width(self) -> str:
        """Natural width of the drawing in pixels."""
        return self.svg.partition(' width="')[2].partition('"')[0]

    @property
    def is_folded(self) -> bool:
        """Whether the legend is too long to stand open."""
        return len(self.legend) > LEGEND_OPEN


@dataclass
class Figure:
    """Panels under one number; the caption says what one sees and how it was computed."""

    title: str
    caption: str
    panels: list[Panel]
    legend: tuple[tuple[str, str], ...] = ()
    is_wide: bool = False
    number: int = 0
    kind: str = field(default="figure", init=False)


@dataclass
class Table:
    """Rows of cells, text or markup. `align`: l or r a column; `total`: a last row; `hints`: what a header means."""

    title: str
    caption: str
    header: list[str]
    align: str
    rows: list[list[str]]
    total: list[str] | None = None
    hints: dict[str, str] = field(default_factory=dict)
    legend: tuple[tuple[str, str], ...] = ()
    is_measured: bool = False  # differs between two equal runs
    number: int = 0
    kind: str = field(default="table", init=False)

    @property
    def is_tall(self) -> bool:
        """Whether the rows are too many to stand open."""
        return len(self.rows) > TALL_ROWS


@dataclass
class Facts:
    """Names with their values, numbered among the tables."""

    title: str
    caption: str
    pairs: list[tuple[str, str]]
    number: int = 0
    kind: str = field(default="facts", init=False)


@dataclass
class Text:
    """A paragraph; a notice stands out, code is shown as it is."""

    text: str
    kind: str = "paragraph"  # or notice, code


Block = Figure | Table | Facts | Text


@dataclass
class Section:
    """A part of the page; `anchor` is its id, `level` 2 or 3 its heading."""

    anchor: str
    title: str
    blocks: list[Block]
    level: int = 2
    number: str = ""


def number(sections: Iterable[Section]) -> None:
    """Number sections (1, 2, 2.1 ...), figures and tables in their order."""
    top = sub = figures = tables = 0
    for section in sections:
        top, sub = (top + 1, 0) if section.level == 2 else (top, sub + 1)
        section.number = f"{top}" if section.level == 2 else f"{top}.{sub}"
        for block in section.blocks:
            if isinstance(block, Figure):
                figures += 1
                block.number = figures
            elif isinstance(block, Table | Facts):
                tables += 1
                block.number = tables


def stack(parts: Iterable[tuple[float, str]]) -> Markup:
    """Return a small stacked bar for a table out of (size, colour)."""
    segment = Markup('<span style="flex:{:g};background:{}"></span>')
    segments = [segment.format(size, color) for size, color in parts if size]
    return Markup('<span class="stack">{}</span>').format(Markup("").join(segments))


def heat(text: str, share: float) -> Markup:
    """Return a table cell's text on a ground as dark as `share` is large."""
    return Markup('<span class="heat" style="--share:{:.2f}">{}</span>').format(share, text)

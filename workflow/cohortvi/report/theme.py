"""How figures look: colours that follow the page's theme, and matplotlib figures as small inline SVG.

Equal figures give equal bytes. SVG names colours of the page (`var(--ink)`), so that it is legible on light and dark
paper; its text is text in the page's font; it holds no id that another figure of the page could hold, no metadata and
no address. Lengths are CSS pixels.
"""

import base64
import hashlib
import io
import re
import xml.etree.ElementTree as ET
from functools import cache

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ft2font import FT2Font
from PIL import Image

# Stand-ins for the colours of the page's style sheet; no figure draws with these values themselves.
INK, MUTED, RULE, ACCENT, REMOVED, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", ACCENT: "accent", REMOVED: "removed", PAPER: "paper"}

# Eight of Okabe and Ito (2008), black and yellow replaced to be legible on white and on black, then the colours
# farthest from all before them in OKLab as seen with normal vision, protanopia and deuteranopia (Machado et al. 2009).
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8c6bb1", "#a3a300", "#24dea3", "#766558",
    "#5483f8", "#c21b0d", "#5f57df", "#a83089", "#8db38e", "#9bc6d4", "#b3ca6a", "#eb586e", "#868bd2", "#a45b7f",
)  # fmt: skip
GREY, BLUE = "#8e98a3", "#3587d8"  # points, legible on both papers
PIXELS = 72  # a point of matplotlib is a pixel of the page
RASTER_DPI = 2 * PIXELS
RASTER_COLORS = 128
DECIMALS = re.compile(r"(-?\d+\.\d\d)\d+")
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cohortvi",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.labelpad": 5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "lines.linewidth": 1.8,
}


def color_of(i: int) -> str:
    """Return the colour of category `i`; they repeat after 20."""
    return PALETTE[i % len(PALETTE)]


def axes(width: float, height: float, margins: tuple[float, float, float, float]) -> Axes:
    """Return empty axes in a figure of width x height pixels; margins left, right, bottom, top."""
    left, right, bottom, top = margins
    with mpl.rc_context(RC):
        figure = Figure(figsize=(width / PIXELS, height / PIXELS), dpi=PIXELS)
        FigureCanvasSVG(figure)
        box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
        return figure.add_axes(box)


@cache
def _font() -> FT2Font:
    return get_font(findfont("DejaVu Sans"))


def drawable(text: object) -> str:
    """Return text as matplotlib can lay it out: characters that its font lacks become boxes."""
    return "".join(c if c.isprintable() and _font().get_char_index(ord(c)) else "\N{WHITE SQUARE}" for c in str(text))


def to_svg(ax: Axes, label: str) -> Markup:
    """Return the figure of `ax` as inline SVG; `label` says what it shows to those who cannot see it."""
    buffer = io.BytesIO()
    with mpl.rc_context(RC):
        ax.figure.savefig(buffer, format="svg", dpi=RASTER_DPI, metadata={"Date": None}, transparent=True)
    root = ET.fromstring(buffer.getvalue())
    _clean(root)
    _rename_ids(root, hashlib.sha256(buffer.getvalue()).hexdigest()[:8])
    width, height = root.get("viewBox").split()[2:]
    root.attrib = {"viewBox": root.get("viewBox"), "width": width, "height": height, "role": "img", "aria-label": label}
    return Markup(ET.tostring(root, encoding="unicode"))


def _clean(root: ET.Element) -> None:
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in [name for name in element.attrib if "}" in name]:
            element.set(name.rpartition("}")[2], element.attrib.pop(name))
        for name in {"d", "x", "y", "width", "height", "points", "transform"} & set(element.attrib):
            element.set(name, DECIMALS.sub(r"\1", element.get(name)).replace("\n", ""))
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        if "style" in element.attrib:
            element.set("style", _style(element.get("style")))
        if element.tag == "image":
            element.set("href", _smaller(element.get("href")))
        element.tail = None
        if element.tag != "text":
            element.text = None
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in {"metadata", "style"}]:
            parent.remove(child)


def _style(style: str) -> str:
    style = re.sub(r"font-family:[^;]*;? ?", "", style)
    return re.sub(r"#0\d0\d0\d", lambda found: f"var(--{VARIABLES[found[0]]})", style)


def _smaller(address: str) -> str:
    """Return a PNG of a data address with a palette of few colours, about a third of its size."""
    image = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    buffer = io.BytesIO()
    few = image.quantize(RASTER_COLORS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _rename_ids(root: ET.Element, prefix: str) -> None:
    # Groups bear names that repeat in every figure; what is referred to keeps an id, under a name of its own.
    markup = ET.tostring(root, encoding="unicode")
    used = dict.fromkeys(re.findall(r'(?:href="#|url\(#)([^")]+)', markup))
    names = {name: f"f{prefix}-{i}" for i, name in enumerate(used)}
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in names:
            element.set("id", names[name])
        elif name and name.startswith("halo"):
            element.set("class", "halo")
        if element.get("href", "").startswith("#"):
            element.set("href", "#" + names[element.get("href")[1:]])
        if "clip-path" in element.attrib:
            element.set("clip-path", f"url(#{names[element.get('clip-path')[5:-1]]})")

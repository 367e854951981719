"""matplotlib figures as SVG elements for a page: with a title, unique ids, and no styles."""

import io
import re
import textwrap
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (5.0, 3.3)  # inches; at 400 px of width a letter of it is as large as one of the text
LETTERS_PER_INCH = 10  # of a label of an axis
RC_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud, and takes less space
    "text.parse_math": False,  # a dollar in the name of a group is a dollar
    "font.size": 10,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_REFERENCE = re.compile(r"#([^)]+)")
_DECIMALS = re.compile(r"(\.\d\d)\d+")


def inline_svg(
    draw: "Callable[[Figure], Any]", *, key: str, title: str, description: str, size: tuple[float, float] = SIZE
) -> str:
    """Draw a figure and return it as an `svg` element for HTML, the same text each time.

    A page with a strict Content-Security-Policy takes it: it has no style, script or image from elsewhere.

    Args:
        draw: is given an empty figure.
        key: letters, digits and hyphens, unique in the page; all ids begin with it.
        title: the name of the picture.
        description: what it shows, for those who do not see it.
        size: in inches.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with rc_context({**RC_SETTINGS, "svg.hashsalt": key}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that matplotlib's font lacks: the browser draws them
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        _fit_labels(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inlined(ElementTree.fromstring(buffer.getvalue()), key, title, description)


def _fit_labels(figure: "Figure") -> None:
    """Labels of the axes in as many lines as they need, and logarithmic axes without the formulas of mathtext."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    for axes in figure.axes:
        for axis, inches in ((axes.xaxis, figure.get_figwidth()), (axes.yaxis, figure.get_figheight())):
            per_line = max(12, int(inches / len(figure.axes) * LETTERS_PER_INCH))
            if axis.get_scale() == "log":
                axis.set_major_formatter(ScalarFormatter())
                axis.set_minor_formatter(NullFormatter())
            axis.label.set_text(textwrap.fill(axis.label.get_text(), per_line))


def _inlined(root: ElementTree.Element, key: str, title: str, description: str) -> str:
    for parent in list(root.iter()):
        for child in [c for c in parent if _local(c.tag) in ("metadata", "style")]:
            parent.remove(child)
    used = {name for one in root.iter() for value in one.attrib.values() for name in _REFERENCE.findall(value)}
    for one in root.iter():
        one.tag = _local(one.tag)
        one.tail = None
        one.attrib = {_local(name): value for name, value in _attributes(one, key, used).items()}
    names = ElementTree.Element("title", {"id": f"{key}-title"}), ElementTree.Element("desc", {"id": f"{key}-desc"})
    for element, text in zip(names, (title, description), strict=True):
        element.text = text
    root[:0] = names
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{key}-title {key}-desc",
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _attributes(element: ElementTree.Element, key: str, used: set[str]) -> dict[str, str]:
    """Style declarations as attributes, ids and what points at them with the figure's key, coordinates in 1/100."""
    attributes = dict(element.attrib)
    for declaration in attributes.pop("style", "").split(";"):
        name, _, value = declaration.partition(":")
        if name.strip() and name.strip() != "font-family":  # that of the page
            attributes[name.strip()] = value.strip()
    identity = attributes.pop("id", None)
    for name, value in attributes.items():
        if "#" in value and ("url(" in value or _local(name) == "href"):
            attributes[name] = _REFERENCE.sub(rf"#{key}-\1", value)
        elif name in ("d", "x", "y", "width", "height", "transform"):
            attributes[name] = _DECIMALS.sub(r"\1", value).replace("\n", "")
    return attributes | ({"id": f"{key}-{identity}"} if identity in used else {})

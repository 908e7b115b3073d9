"""A matplotlib figure as a piece of a page: SVG whose text is text, whose colours are the page's, without any style.

Colours follow the page's variables, so that one drawing serves light, dark and print; style attributes become
attributes of SVG, so that the page's policy need allow none. matplotlib is from the optional extra ``report``.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#010203", "#010204", "#010205", "#010206"
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
"""What figures are drawn in: no colours, but names of the page's."""

_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {
    colour: f"series-{number}" for number, colour in enumerate(SERIES, 1)
}
_SVG, _LINK = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/xlink}href"
_DROPPED = {f"{{{_SVG}}}{name}" for name in ("metadata", "style", "title")}
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
WIDTH = 5.0
"""Inches, 72 units of the drawing each: what a phone shows at about its own size, so that labels stay legible."""
FONT_SIZE = 11.5


@contextmanager
def page_style() -> Iterator[None]:
    """matplotlib's settings for figures of a page, colours included."""
    import matplotlib

    settings: Any = {
        "font.size": FONT_SIZE,
        "axes.labelsize": FONT_SIZE,
        "xtick.labelsize": FONT_SIZE - 1,
        "ytick.labelsize": FONT_SIZE - 1,
        "legend.fontsize": FONT_SIZE - 0.5,
        "legend.frameon": False,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": RULE,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "d3tom-export",
        "mathtext.default": "regular",
    }
    with matplotlib.rc_context(settings):
        yield


def inline_svg(figure: Figure, name: str) -> str:
    """``figure`` as an ``<svg>`` element that is told as one picture: as what element ``{name}-alt`` of the page says.

    ``name`` keeps its ids apart from those of other figures. The same figure gives the same text.
    """
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        # Of characters that its own font lacks, which the page's fonts draw, and of labels that leave little room.
        for message in ("Glyph", "constrained_layout not applied"):
            warnings.filterwarnings("ignore", message, UserWarning)
        figure.savefig(drawn, format="svg", dpi=144, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(drawn.getvalue())
    referred = {match for node in root.iter() for value in node.attrib.values() for match in _REFERENCE.findall(value)}
    referred |= {node.attrib[_LINK][1:] for node in root.iter() if node.attrib.get(_LINK, "").startswith("#")}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in _DROPPED:
                parent.remove(child)
    for node in root.iter():
        _restyle(node)
        if node.attrib.get("id") not in referred:
            node.attrib.pop("id", None)
        for key, value in list(node.attrib.items()):
            node.attrib[key] = _REFERENCE.sub(rf"url(#{name}-\1)", value)
        if "id" in node.attrib:
            node.attrib["id"] = f"{name}-{node.attrib['id']}"
        link = node.attrib.pop(_LINK, None)
        if link is not None:
            node.attrib["href"] = f"#{name}-{link[1:]}" if link.startswith("#") else link
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-alt", "stroke-linejoin": "round", "class": "figure"}
    ElementTree.register_namespace("", _SVG)
    text = ElementTree.tostring(root, encoding="unicode")
    return text.replace(f' xmlns="{_SVG}"', "").replace("\n", "")


def _restyle(node: ElementTree.Element) -> None:
    """Turn a node's style into attributes, with the page's colours."""
    for declaration in node.attrib.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":
            size = re.search(r"([\d.]+)px", value)
            if size:
                node.attrib["font-size"] = size[1]
            words = value.split()
            node.attrib |= {"font-weight": "bold"} if {"bold", "700"} & set(words) else {}
            node.attrib |= {"font-style": "italic"} if {"italic", "oblique"} & set(words) else {}
        elif name == "font-size":
            node.attrib["font-size"] = value.removesuffix("px")
        elif name and name not in ("font-family", "-inkscape-font-specification", "image-rendering"):
            node.attrib[name] = value
        elif name == "image-rendering":
            node.attrib["class"] = "cells"
    for key in ("fill", "stroke"):
        variable = _VARIABLES.get(node.attrib.get(key, "").lower())
        if variable:
            node.attrib[key] = f"var(--{variable})"
    if node.tag == f"{{{_SVG}}}text" and "fill" not in node.attrib:
        node.attrib["fill"] = "#000"  # it was asked to be black, which SVG need not say: the page's text may be light

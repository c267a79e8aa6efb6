"""Composition: figures outside the page. In: a figure of the page. Out: an SVG that needs no style sheet, and a PNG.

The page's drawings use few elements: groups, lines, rectangles, circles, text, paths of lines, and one round marker.
Their colours are read from the page's style sheet (light) and written into each element, so that any program shows
them; the PNG is drawn from the same elements with Pillow, which is there anyway.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from PIL import Image, ImageDraw, ImageFont

from consilium.report import html
from consilium.report.marks import key
from consilium.report.sections import Figure

Pair = tuple[float, float]
SCALE, SMOOTH = 2, 2  # pixels of the PNG per unit; how many times larger it is drawn before it is reduced
GAP, LINE = 16.0, 17.0
FONT = "system-ui, 'Segoe UI', Roboto, 'Noto Sans', 'Liberation Sans', sans-serif"
_TOKEN = re.compile(r"[MLHVAZ]|-?(?:\d+\.?\d*|\.\d+)")


# ------------------------------------------------------------------------------------------------ sheet
def sheet(figure: Figure, notes: Sequence[str] = ()) -> Element:
    """Caption, panels side by side (three at most), legend and notes on one white sheet, every colour written out."""
    panels = [(title, ElementTree.fromstring(str(drawing))) for title, drawing in figure.panels]
    sizes = [_size(panel) for _, panel in panels] or [(360.0, 0.0)]
    columns = min(3, len(sizes))
    width = max(columns * (max(w for w, _ in sizes) + GAP) + GAP, 480)
    root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg"})
    ElementTree.SubElement(root, "rect", {"width": "100%", "height": "100%", "fill": "#ffffff"})
    bottom = _words(root, [figure.caption], 24, width, "number")
    for start in range(0, len(panels), columns):
        bottom = _row(root, panels[start : start + columns], bottom, width / columns)
    bottom = _legend(root, figure.legend, bottom, width)
    bottom = _words(root, [f"Note: {' '.join(notes)}"] if notes else [], bottom + 4, width, "")
    root.set("viewBox", f"0 0 {width:.0f} {bottom:.0f}")
    root.set("width", f"{width:.0f}")
    root.set("height", f"{bottom:.0f}")
    for element in root.iter():
        _paint(element)
    return root


def _size(drawing: Element) -> Pair:
    _, _, width, height = map(float, drawing.get("viewBox", "0 0 0 0").split())
    return width, height


def _row(root: Element, panels: Sequence[tuple[str, Element]], top: float, step: float) -> float:
    for at, (title, drawing) in enumerate(panels):
        left = GAP + at * step
        if title:
            _word(root, left, top + 4, title, "number")
        place = ElementTree.SubElement(root, "g", {"transform": f"translate({left:.1f} {top + 12:.1f})"})
        place.extend(list(drawing))
    return top + 12 + max(_size(drawing)[1] for _, drawing in panels) + GAP


def _legend(root: Element, names: Sequence[str], top: float, width: float) -> float:
    shown = [(at, name) for at, name in enumerate(names) if name]
    step = 7.0 * max([len(name) for _, name in shown] or [0]) + 40
    columns = max(1, int((width - GAP) // step))
    for place, (at, name) in enumerate(shown):
        x, y = GAP + 8 + (place % columns) * step, top + LINE * (place // columns)
        mark = ElementTree.SubElement(root, "g", {"transform": f"translate({x:.1f} {y - 4:.1f})"})
        mark.extend(list(ElementTree.fromstring(str(key(at)))))
        _word(root, x + 12, y, name, "")
    return top + LINE * math.ceil(len(shown) / columns) + (6 if shown else 0)


def _words(root: Element, texts: Sequence[str], top: float, width: float, style: str) -> float:
    """Lines of text, broken where they would leave the sheet."""
    for text in texts:
        for line in _broken(text, int((width - 2 * GAP) / 6.2)):
            _word(root, GAP, top, line, style)
            top += LINE
    return top + 4


def _broken(text: str, length: int) -> list[str]:
    lines = [""]
    for part in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(part) > length:
            lines.append("")
        lines[-1] = f"{lines[-1]} {part}".strip()
    return lines


def _word(root: Element, x: float, y: float, text: str, style: str) -> None:
    found = ElementTree.SubElement(root, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "class": style})
    found.text = text


# ------------------------------------------------------------------------------------------------ colours
@cache
def colours() -> Mapping[str, str]:
    """Names and values of the light colours of the page's style sheet."""
    style = (Path(html.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    return dict(re.findall(r"--([\w-]+): (#\w+);", style.partition("@media")[0]))


def _paint(element: Element) -> None:
    """Colours, widths and fonts in place of a class."""
    names = element.attrib.pop("class", "").split()
    series = next((colours()[f"c{name[1:]}"] for name in names if re.fullmatch(r"s\d", name)), colours()["muted"])
    for name in names:
        for attribute, value in _styles(series).get(name, {}).items():
            element.set(attribute, value)
    if element.tag == "text":
        bold = "number" in names
        element.set("font-family", FONT)
        element.set("font-size", "11.5")
        element.set("fill", colours()["ink" if bold else "muted"])
        element.set("font-weight", "600" if bold else "400")


def _styles(series: str) -> Mapping[str, Mapping[str, str]]:
    line = {"fill": "none", "stroke-width": "1.6"}
    return {
        "mark": {"fill": series},
        "solid": {"fill": series},
        "faint": {"fill-opacity": "0.4"},
        "line": {**line, "stroke": series},
        "whisker": {"stroke": series, "stroke-width": "2"},
        "grid": {"stroke": colours()["grid"], "stroke-width": "1"},
        "rule": {"stroke": colours()["grid"], "stroke-width": "1"},
        "axis": {"stroke": colours()["muted"], "stroke-width": "1"},
        "diagonal": {"stroke": colours()["muted"], "stroke-width": "1", "stroke-dasharray": "3 4"},
        "steps": {"fill": "none", "stroke": colours()["muted"], "stroke-width": "1.2"},
        "ring": {"fill": "none", "stroke": colours()["ink"], "stroke-width": "1.5"},
    }


def svg(root: Element) -> bytes:
    """The sheet as a file."""
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


# ------------------------------------------------------------------------------------------------ pixels
def png(root: Element) -> bytes:
    """The sheet as an image."""
    width, height = _size(root)
    factor = SCALE * SMOOTH
    image = Image.new("RGB", (round(width * factor), round(height * factor)), "white")
    _draw(ImageDraw.Draw(image, "RGBA"), root, (0.0, 0.0), factor)
    buffer = io.BytesIO()
    image.resize((round(width * SCALE), round(height * SCALE)), Image.Resampling.BOX).save(buffer, "PNG")
    return buffer.getvalue()


def _draw(pen: ImageDraw.ImageDraw, element: Element, at: Pair, factor: float) -> None:
    moved = re.match(r"translate\((\S+) (\S+)\)", element.get("transform", ""))
    here = (at[0] + float(moved[1]), at[1] + float(moved[2])) if moved else at
    if element.tag == "text":
        _draw_text(pen, element, here, factor)
    elif element.tag in ("line", "path", "rect", "circle") and element.get("width") != "100%":
        for points, closed in _outlines(element):
            _draw_outline(pen, element, [((x + here[0]) * factor, (y + here[1]) * factor) for x, y in points], closed,
                          factor)  # fmt: skip
    for child in element:
        _draw(pen, child, here, factor)


def _draw_text(pen: ImageDraw.ImageDraw, element: Element, at: Pair, factor: float) -> None:
    font = ImageFont.load_default(float(element.get("font-size", "11.5")) * factor)
    place = ((at[0] + float(element.get("x", 0))) * factor, (at[1] + float(element.get("y", 0))) * factor)
    anchor = {"end": "rs", "middle": "ms"}.get(element.get("text-anchor", ""), "ls")
    bold = factor * 0.25 if element.get("font-weight") == "600" else 0
    fill = element.get("fill", "#000000")
    pen.text(place, element.text or "", fill=fill, font=font, anchor=anchor, stroke_width=bold)


def _draw_outline(
    pen: ImageDraw.ImageDraw, element: Element, points: Sequence[Pair], closed: bool, factor: float
) -> None:
    fill, stroke = element.get("fill", "none"), element.get("stroke", "none")
    if fill != "none" and closed:
        opacity = round(255 * float(element.get("fill-opacity", "1")))
        pen.polygon(list(points), fill=f"{fill}{opacity:02x}")
    if stroke != "none":
        width = max(1, round(float(element.get("stroke-width", "1")) * factor))
        drawn = [*points, points[0]] if closed else list(points)
        for piece in _dashes(drawn, factor) if element.get("stroke-dasharray") else [drawn]:
            pen.line(piece, fill=stroke, width=width, joint="curve")


def _dashes(points: Sequence[Pair], factor: float) -> Iterator[list[Pair]]:
    (x0, y0), (x1, y1) = points[0], points[-1]
    length = math.hypot(x1 - x0, y1 - y0) or 1.0
    for start in range(0, int(length), round(7 * factor)):
        ends = (start / length, min(start + 3 * factor, length) / length)
        yield [(x0 + t * (x1 - x0), y0 + t * (y1 - y0)) for t in ends]


def _outlines(element: Element) -> Iterator[tuple[list[Pair], bool]]:
    """(points, closed) of an element's parts."""
    number = {name: float(element.get(name, 0)) for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r")}
    if element.tag == "line":
        yield [(number["x1"], number["y1"]), (number["x2"], number["y2"])], False
    elif element.tag == "circle":
        yield _arc((number["cx"], number["cy"]), number["r"], 0, 2 * math.pi), True
    elif element.tag == "rect":
        x, y, w, h = number["x"], number["y"], float(element.get("width", 0)), float(element.get("height", 0))
        yield [(x, y), (x + w, y), (x + w, y + h), (x, y + h)], True
    else:
        scale = re.search(r"scale\((\S+)\)", element.get("transform", ""))
        size = float(scale[1]) if scale else 1.0
        for points, closed in _path(element.get("d", "")):
            yield [(x * size, y * size) for x, y in points], closed


def _arc(centre: Pair, radius: float, start: float, stop: float) -> list[Pair]:
    angles = [start + (stop - start) * k / 24 for k in range(25)]
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def _path(text: str) -> Iterator[tuple[list[Pair], bool]]:
    """Parts of a path of M, L, H, V, Z, and A, which here is always half a circle, clockwise."""
    points: list[Pair] = []
    tokens = _TOKEN.findall(text)
    command, at = "M", 0
    while at < len(tokens):
        if tokens[at].isalpha():
            command, at = tokens[at], at + 1
        if command in "MZ" and points:
            yield points, command == "Z"
            points = []
        if command == "Z":
            continue
        count = {"H": 1, "V": 1, "A": 7}.get(command, 2)
        points += _step(command, list(map(float, tokens[at : at + count])), points)
        at, command = at + count, "L" if command == "M" else command
    if points:
        yield points, False


def _step(command: str, numbers: Sequence[float], points: Sequence[Pair]) -> list[Pair]:
    if command == "H":
        return [(numbers[0], points[-1][1])]
    if command == "V":
        return [(points[-1][0], numbers[0])]
    end = (numbers[-2], numbers[-1])
    if command == "A":
        start = points[-1]
        first = math.atan2(start[1] - end[1], start[0] - end[0])
        centre = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        return _arc(centre, numbers[0], first, first + math.pi)
    return [end]

"""A flame graph of the thread that a block runs on: how wide a function is, so much of the time it took."""

from __future__ import annotations

import html
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deploy.bench.figures import BenchError

INTERVAL_S = 0.001
WIDTH, ROW = 1_400, 17
NARROW = 0.4
"""Pixels; a function of less is not drawn."""
LETTER = 6.2
"""Pixels that a letter takes."""
SUFFIXES = (".svg", ".html", ".json")


def check(path: Path) -> None:
    """Raises BenchError where `graph` would not be able to write."""
    if path.suffix not in SUFFIXES:
        raise BenchError(
            f"--profile writes .svg, .html (pyinstrument's own page) or .json (for speedscope), not {path}"
        )
    if not find_spec("pyinstrument"):
        raise BenchError("--profile needs pyinstrument: pip install 'carousel[bench]'")


@contextmanager
def graph(path: Path) -> Iterator[None]:
    """Sample the block, and write what was seen. Raises BenchError where the file cannot be written."""
    pyinstrument: Any = import_module("pyinstrument")
    profiler = pyinstrument.Profiler(interval=INTERVAL_S, async_mode="disabled")
    with profiler:
        yield
    try:
        path.write_text(_rendered(path.suffix, profiler), encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from error


def _rendered(suffix: str, profiler: Any) -> str:
    if suffix == ".html":
        return str(profiler.output_html())
    if suffix == ".json":
        renderers: Any = import_module("pyinstrument.renderers")
        return str(profiler.output(renderers.SpeedscopeRenderer()))
    return svg(profiler.last_session.root_frame())


def svg(root: Any) -> str:
    """The tree of pyinstrument's frames as a picture; hovering tells the rest."""
    boxes: list[str] = []
    depth = _draw(root, 0.0, WIDTH / root.time, 0, root.time, boxes)
    height = (depth + 1) * ROW
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="monospace"'
    return f'{head} font-size="10">\n' + "\n".join(boxes) + "\n</svg>\n"


def _draw(frame: Any, x: float, scale: float, depth: int, whole_s: float, boxes: list[str]) -> int:
    """Draw a function and all that it called. -> the depth of the deepest."""
    width = frame.time * scale
    if width < NARROW:
        return depth
    where = f"{frame.file_path_short or ''}:{frame.line_no or ''}"
    told = html.escape(f"{frame.function} ({where}) {frame.time:.3f} s, {frame.time / whole_s:.1%}")
    name = html.escape(frame.function[: int(width / LETTER)])
    hue = zlib.crc32(where.encode()) % 50  # from red to yellow, the same for the same place
    boxes.append(
        f'<g><title>{told}</title><rect x="{x:.1f}" y="{depth * ROW}" width="{width:.1f}" height="{ROW - 1}"'
        f' fill="hsl({hue},85%,65%)"/><text x="{x + 2:.1f}" y="{depth * ROW + 12}">{name}</text></g>'
    )
    deepest = depth
    for child in frame.children:
        deepest = max(deepest, _draw(child, x, scale, depth + 1, whole_s, boxes))
        x += child.time * scale
    return deepest

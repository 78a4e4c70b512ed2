"""The files that the page loads: its own, and Bokeh's script as its wheel has it. Nothing comes from elsewhere."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
OWN = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
BOKEH = "bokeh.min.js"


@dataclass(frozen=True)
class Static:
    """Content that stays as it is while the service runs."""

    content: bytes
    media_type: str

    @cached_property
    def packed(self) -> bytes:
        """By gzip."""
        return gzip.compress(self.content)

    @cached_property
    def version(self) -> str:
        return hashlib.sha256(self.content).hexdigest()[:12]


@cache
def statics() -> Mapping[str, Static]:
    """All files by their names; Bokeh's where it is installed."""
    found = {name: Static((HERE / name).read_bytes(), media_type) for name, media_type in OWN.items()}
    if bokeh := find_spec("bokeh"):
        [package] = bokeh.submodule_search_locations or [""]
        script = Path(package) / "server" / "static" / "js" / BOKEH
        found[BOKEH] = Static(script.read_bytes(), "text/javascript")
    return found


def url_of(name: str) -> str:
    """Where the page finds a file; another URL for each version of it."""
    return f"/page/static/{name}?v={statics()[name].version}"

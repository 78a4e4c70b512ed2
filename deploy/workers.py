"""`carousel serve` as a process of its own: its command, and where its log says that it listens."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any


def command(settings: Mapping[str, Any]) -> list[str]:
    """A worker with these settings. Whatever CAROUSEL_LOG_* the environment has, people and `url` can read its log;
    SIGABRT leaves in it where each thread stood.
    """
    told = {"log_level": "info"} | dict(settings) | {"log_format": "console"}
    flags = [f"--{name.replace('_', '-')}={_text(value)}" for name, value in told.items()]
    return [sys.executable, "-X", "faulthandler", "-m", "carousel", "serve", *flags]


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def url(log: str) -> str:
    r"""Where a worker listens, of whose log this is the beginning, in either format; empty until that is told whole.

    >>> url("12:00 INFO service.serve: serving m-1: http://127.0.0.1:8000\n")
    'http://127.0.0.1:8000'
    >>> url('{"event": "serving m-1: http://127.0.0.1:8000"}'), url("12:00 INFO service.serve: serving m-1: http://127.0")
    ('http://127.0.0.1:8000', '')
    """
    told = re.search(r'(http://[^\s"]+)[\s"]', log)
    return told[1] if told else ""

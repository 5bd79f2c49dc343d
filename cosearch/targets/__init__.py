"""Chips, one per file. To add one, write `<name>.py` here and register a function that gives its `Target`.

A chip that is at hand may be measured: the function gets the cache folder and a way to run `measure/peaks.py` in a
worker. One that is not is a literal from its datasheet, cited.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cosearch.core.registry import Registry
from cosearch.core.target import Target

MeasurePeaks = Callable[[], Mapping[str, Any]]

TARGETS: Registry[Callable[[Path, MeasurePeaks], Target]] = Registry("target", __name__)

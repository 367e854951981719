"""The figures of docs/ from the records of measurements/, and whether two drawings are the same.

`python docs/build.py` draws them. Needs matplotlib, of which another version may place the texts elsewhere.
"""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
NUMBER = re.compile(r"-?\d+\.\d+|-?\d+")
IDS = re.compile(r"#?\b[mp][0-9a-f]{10}\b")  # hashes of what a marker or a clip path looks like


def figures(study: Any, lab: Sequence[Any]) -> dict[Path, str]:
    """Each figure of docs/, drawn from the study and from the lines of the lab's table."""
    from sampo.lab.report import draw_figure
    from studies.page import write_figures

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for path in write_figures(study, Path(folder)):
            found[DOCS / "study" / path.name] = path.read_text(encoding="utf-8")
        path = Path(folder) / "lab.svg"
        draw_figure(lab, path)
        found[DOCS / "lab" / path.name] = path.read_text(encoding="utf-8")
    return found


def same_drawing(a: str, b: str, tolerance: float = 0.05) -> bool:
    """Whether two SVG files have the same shapes and texts, and numbers that differ by rounding (in points)."""
    a, b = (re.sub(r"Matplotlib v[\d.]+", "", IDS.sub("", text)) for text in (a, b))
    if NUMBER.sub("", a) != NUMBER.sub("", b):
        return False
    pairs = zip(NUMBER.findall(a), NUMBER.findall(b), strict=True)
    return all(abs(float(x) - float(y)) <= tolerance for x, y in pairs)

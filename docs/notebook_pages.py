"""Tutorials: the notebooks with their committed outputs, as Markdown.

A converter of our own instead of mkdocs-jupyter or nbconvert: their HTML templates load scripts from other hosts,
their code cells do not look like those of the other pages, and the links of the cells would need a second pass.
"""

import base64
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STYLE = re.compile(r"<style.*?</style>\s*", re.DOTALL)


@dataclass
class Tutorial:
    """A page in Markdown, and its pictures by file name."""

    markdown: str
    pictures: dict[str, bytes] = field(default_factory=dict)


def convert(path: Path, about: str) -> Tutorial:
    """The notebook as a page, with `about` below its title; without the cells of its set-up."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tutorial, blocks = Tutorial(""), []
    for cell in cells:
        source = "".join(cell["source"])
        if is_setup(source):
            continue
        if cell["cell_type"] == "markdown":
            blocks.append(source)
        else:
            blocks.append(_fence(source, "python"))
            blocks += [_output(output, tutorial.pictures, path.stem) for output in cell["outputs"]]
    title, *rest = "\n\n".join(blocks).split("\n", 1)
    tutorial.markdown = f"{title}\n\n{about}\n{''.join(rest)}\n"
    return tutorial


def is_setup(source: str) -> bool:
    """Whether a cell only opens or installs, which `notebooks/execute.py` writes into each notebook."""
    return "/assets/colab-badge.svg" in source or source.startswith("# Installs sampo")


def _output(output: dict[str, Any], pictures: dict[str, bytes], stem: str) -> str:
    """One output of a cell: a picture, a table or text."""
    data = output.get("data", {})
    html = "".join(data.get("text/html", ""))
    if "image/png" in data:
        name = f"{stem}_{len(pictures) + 1}.png"
        pictures[name] = base64.b64decode("".join(data["image/png"]))
        return f"![Figure drawn by the cell above]({name})"
    if "<table" in html:
        return STYLE.sub("", html).strip()
    return _fence("".join(output.get("text", data.get("text/plain", ""))).strip("\n"), "text")


def _fence(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"

"""Blocks, sections and the page: its contents, the origin of each number, and its HTML."""

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..io import records as results
from ..io.records import Record
from .collect import BROKEN, Found, Problem, plain, reason
from .svg import SIZE, inline_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


_CODE = re.compile("`([^`]*)`")
MAX_RUNS = 6  # in one figure: more colours cannot be distinguished


class FoundFile(Protocol):
    """The contents of a file, with its name for the list of problems."""

    @property
    def file(self) -> str:
        """Name below the folder that the report is of."""


_FileT = TypeVar("_FileT", bound=FoundFile)


@dataclass(frozen=True)
class Origin:
    """Where numbers come from; an empty field was not recorded."""

    file: str
    command: str = ""
    commit: str = ""
    versions: str = ""
    dates: str = ""


def origins_of(records: Sequence[Record], file: str) -> tuple[Origin, ...]:
    """One origin for each command, commit and set of versions of the records, with the first and the last day."""
    days: dict[tuple[str, str, str], list[str]] = {}
    for record in records:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()))
        days.setdefault((record.command, record.commit or "", versions), []).append(record.created[:10])
    return tuple(
        Origin(file, *key, dates=min(some) if min(some) == max(some) else f"{min(some)} to {max(some)}")
        for key, some in days.items()
    )


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Listing:
    """A list of sentences."""

    items: Sequence[str]
    kind: str = "list"


@dataclass(frozen=True)
class Heading:
    """A heading below that of the section."""

    text: str
    kind: str = "heading"


@dataclass(frozen=True)
class PageTable:
    """Rows under heads; the first cell of a row is its head, the first `names` cells are texts.

    `n` is the sample size with its unit, such as `59 pairs`.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    origins: tuple[Origin, ...] = ()
    n: str = ""
    names: int = 1
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """A drawn figure."""

    title: str
    svg: str
    origins: tuple[Origin, ...]
    n: str
    about: str = ""
    wide: bool = False
    kind: str = "figure"


@dataclass(frozen=True)
class Shown:
    """An answer in a comparison: its system, its text, its length, and how many characters were omitted."""

    system: str
    text: str
    length: str
    omitted: int = 0


@dataclass(frozen=True)
class Sample:
    """A prompt with the answers of several systems."""

    title: str
    prompt: str
    omitted: int
    answers: Sequence[Shown]
    kind: str = "sample"


Block = Text | Listing | Heading | PageTable | Figure | Sample


@dataclass
class Section:
    """A part of the page with its blocks; `problems` are those of its files."""

    name: str
    title: str
    problems: list[Problem] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    figures: int = 0

    def add(self, *blocks: Block) -> None:
        """Put blocks at the end."""
        self.blocks += blocks

    def draw(
        self,
        draw: "Callable[[Drawing], Any]",
        *,
        title: str,
        description: str,
        origins: tuple[Origin, ...],
        n: str,
        about: str = "",
        size: tuple[float, float] = SIZE,
    ) -> None:
        """Draw a figure and put it at the end; on an error a problem is added instead."""
        self.figures += 1
        key = f"{self.name}-{self.figures}"
        try:
            svg = inline_svg(draw, key=key, title=plain(title), description=plain(description), size=size)
        except BROKEN as error:
            file = origins[0].file if origins else ""
            self.problems.append(Problem(file, f"the figure “{title}” is not drawn: {reason(error)}"))
        else:
            self.add(Figure(title, svg, origins, n, about, wide=size[0] > SIZE[0]))

    def guarded(self, file: str, build: Callable[[], None]) -> None:
        """Build from one file; on an error the file is listed as a problem, and none of its blocks stays."""
        before = len(self.blocks)
        try:
            build()
        except BROKEN as error:
            del self.blocks[before:]
            self.problems.append(Problem(file, reason(error)))


def build_section(name: str, title: str, files: Iterable[_FileT], add: "Callable[[Section, _FileT], None]") -> Section:
    """A section with the blocks that `add` makes of each file, in the order of the files."""
    section = Section(name, title)
    for file in files:
        section.guarded(file.file, partial(add, section, file))
    return section


def render(
    sections: Sequence[Section],
    found: Found,
    *,
    title: str,
    folder: str,
    missing: Sequence[tuple[str, str]],
    problems: Sequence[Problem],
) -> str:
    """The page as HTML.

    Args:
        sections: those with blocks are shown.
        found: for notes and files that were not used.
        title: of the page.
        folder: that the report is of.
        missing: `(what, command)` of the contents that are missing.
        problems: files that were omitted.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape

    package = resources.files(__package__)
    styles = package.joinpath("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(styles.encode()).digest()).decode()
    shown = [section for section in sections if section.blocks]
    origins = numbered(shown)
    environment = Environment(
        autoescape=True, finalize=_plain_text, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["markup"] = Markup  # of our own drawings and styles, and of nothing else
    environment.filters["origin"] = origins.get
    environment.filters["code"] = lambda text: Markup(_CODE.sub(r"<code>\1</code>", str(escape(plain(text)))))
    template = environment.from_string(package.joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        folder=folder,
        styles=styles,
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        sections=shown,
        origins=origins,
        missing=missing,
        problems=problems,
        unused=found.unused,
        notes=list(dict.fromkeys(found.notes)),
        made_by=results.provenance(),
    )


def numbered(sections: Iterable[Section]) -> dict[Origin, int]:
    """Every origin of the page with its number, in the order of their first appearance."""
    blocks = [block for section in sections for block in section.blocks if isinstance(block, PageTable | Figure)]
    return {origin: n for n, origin in enumerate(dict.fromkeys(o for b in blocks for o in b.origins), 1)}


def _plain_text(value: Any) -> Any:
    """Text without characters that a page cannot hold; `Markup` is generated here and is not changed."""
    return plain(value) if type(value) is str else value


def shorten(text: str, length: int = 32) -> str:
    """A name that fits into a legend."""
    text = re.sub(r"\s+", " ", text)
    return text if len(text) <= length else f"{text[: length - 1]}…"

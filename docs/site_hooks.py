"""Hooks of MkDocs: pages from outside of docs/ or made during the build, and links that fit both GitHub and the site.

The Markdown files link to each other by their paths in the repository. The hooks map such a link to the page of the
site, or to the file in the repository where the site has no page of it.
"""

import posixpath
import re
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.nav import Section

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

from api_pages import api_pages, public_names  # noqa: E402, found by the path above
from notebook_pages import convert  # noqa: E402, found by the path above
from packages import package_drawing  # noqa: E402, found by the path above

OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
    "measurements/README.md": "measurements.md",
}  # path in the repository -> page of the site
NOTEBOOKS = {
    f"notebooks/{path.name}": f"tutorials/{path.stem}.md" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}
FENCES = re.compile(r"(^ *```.*?^ *```[^\n]*$)", re.DOTALL | re.MULTILINE)
COMMENTS = re.compile(r"^<!--.*?-->$", re.DOTALL | re.MULTILINE)
LINKS = re.compile(r"(\]\(|(?:src|srcset|href)=\")([^)\"#\s]+)")
BADGES = re.compile(r"^\[!\[.*\n", re.MULTILINE)  # of README: a page of the site loads nothing from another host
TABLES = re.compile(r"^\|.*\|$", re.MULTILINE)
BRACKETS = re.compile(r"\[<code>(\w+)</code>\]")
MERMAID = re.compile(r"^```mermaid\n.*?^```$", re.DOTALL | re.MULTILINE)
NO_SUMMARY = ("[!", "This is the notebook ")  # paragraphs that do not describe their page
FULL_TEXT = "llms-full.txt"
_shown: dict[str, str] = {}  # page of the site -> Markdown as it was rendered


@cache
def repository() -> str:
    """Address of the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["urls"]["Repository"])


def colab(notebook: str) -> str:
    """Address at which Colab opens a notebook of the repository."""
    return f"https://colab.research.google.com/github/{repository().split('github.com/')[1]}/blob/main/{notebook}"


def on_config(config: Any) -> Any:
    """The link to the repository. `repo_url` would make every page ask GitHub for the number of stars."""
    config.extra["social"] = [{"icon": "fontawesome/brands/github", "link": repository(), "name": "Repository"}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/."""
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    for path, page in NOTEBOOKS.items():
        about = f"This is the notebook [{path}]({repository()}/blob/main/{path}) as it was executed. "
        about += f"[Open it in Colab]({colab(path)}) or run it on your own data."
        tutorial = convert(ROOT / path, about)
        files.append(File.generated(config, page, content=tutorial.markdown))
        for name, picture in tutorial.pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=picture))
    for name, text in api_pages().items():
        files.append(File.generated(config, f"api/{name}", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links, draw diagrams, and leave out the marks of generated parts."""
    source = page.file.src_uri
    known = {file.src_uri for file in files if file.inclusion != InclusionLevel.EXCLUDED}
    markdown = MERMAID.sub(lambda match: package_drawing(), markdown)
    markdown = BADGES.sub("", markdown) if source == OUTSIDE["README.md"] else markdown
    parts = FENCES.split(markdown)
    parts[::2] = [TABLES.sub(_fit_table, COMMENTS.sub("\n", rewrite_links(p, source, known))) for p in parts[::2]]
    text = "".join(parts)
    page.meta.setdefault("description", first_sentence(text))
    _shown[source] = text
    return text


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """In docstrings, names in brackets (TRL's style) as links to what has the name."""

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name not in public_names():
            return f"<code>{name}</code>"
        return f'<autoref identifier="{public_names()[name]}" optional><code>{name}</code></autoref>'

    return BRACKETS.sub(replace, html) if page.file.src_uri.startswith("api/") else html


def _fit_table(match: re.Match[str]) -> str:
    """A row of a table: in code a bar needs no escape here, unlike on GitHub, and a number stays on one line."""
    row = re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), match[0])
    row = re.sub(r"^\| `(--\w+)` \|", r'| <code class="option">\1</code> |', row)
    return re.sub(r"(?<=\d) (±|…) (?=[-+\d])", "\u00a0\\1\u00a0", row)


def rewrite_links(markdown: str, page: str, known: set[str]) -> str:
    """Links between files of the repository, as links of the site, whose files are `known`."""
    origin = origins().get(page, f"docs/{page}")

    here = posixpath.dirname(page) or "."

    def replace(match: re.Match[str]) -> str:
        before, target = match[1], match[2]
        if re.match(r"[a-z]+:|/", target) or page.startswith("api/"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        found = pages().get(path, path.removeprefix("docs/"))
        if found not in known or (path == found and path not in pages()):  # no file of the site
            if not (ROOT / path).exists():
                return match[0]  # MkDocs reports it if it leads nowhere
            return f"{before}{repository()}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
        return before + posixpath.relpath(found, here)

    return LINKS.sub(replace, markdown)


def pages() -> dict[str, str]:
    """Path in the repository -> page of the site, for pages from outside of docs/."""
    return OUTSIDE | NOTEBOOKS


@cache
def origins() -> dict[str, str]:
    """Page of the site -> path in the repository."""
    return {page: path for path, page in pages().items()}


def first_sentence(markdown: str) -> str:
    """The first sentence of the first paragraph, as plain text; empty if a page starts otherwise."""
    for block in re.split(r"\n\s*\n", FENCES.sub("", markdown)):
        if re.match(r"\s*(?:[A-Z`\"*\[]|\d+ )", block) and not block.startswith(NO_SUMMARY):
            plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)|[`*]", lambda match: match[1] or "", " ".join(block.split()))
            return re.split(r"(?<=[\w)])[.:](?= [A-Z]|$)", plain)[0].strip()
    return ""


def on_post_build(config: Any) -> None:
    """Write `llms.txt` (llmstxt.org): a list of all pages, each also as Markdown; and all of them in one file."""
    site = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    lines += [
        f"Each page but those of the API is listed as Markdown. [{FULL_TEXT}]({FULL_TEXT}) has all of these.",
        "",
    ]
    for item in _nav.items:
        lines += [f"## {item.title}", "", *_listed(item), ""]
    (site / "llms.txt").write_text("\n".join(lines), encoding="utf-8")
    texts = {page: text for page, text in _shown.items() if not page.startswith("api/")}
    for page, text in texts.items():
        (site / page).parent.mkdir(parents=True, exist_ok=True)
        (site / page).write_text(text, encoding="utf-8")
    (site / FULL_TEXT).write_text("\n\n".join(texts.values()), encoding="utf-8")


def on_nav(nav: Any, config: Any, files: Files) -> Any:
    """Keep the navigation for `llms.txt`."""
    global _nav
    _nav = nav
    return nav


def _listed(item: Any) -> list[str]:
    """One line for each page below an item of the navigation."""
    if isinstance(item, Section):
        return [line for child in item.children for line in _listed(child)]
    source = item.file.src_uri
    about = first_sentence(_shown[source])
    shown = item.file.dest_uri if source.startswith("api/") else source  # the Markdown of the API is directives
    return [f"- [{item.title}]({shown}){f': {about}.' if about else ''}"]

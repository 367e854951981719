"""The site: every page is in its navigation, links fit GitHub and the site, and it builds without a network."""

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
from api_pages import PACKAGE, api_pages, module_names, public_names  # noqa: E402, found by the path above
from command_pages import GUIDES, options_table, usage  # noqa: E402, found by the path above
from drawing import columns, draw  # noqa: E402, found by the path above
from figures import same_drawing  # noqa: E402, found by the path above
from notebook_pages import convert  # noqa: E402, found by the path above

needs_mkdocs = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings_handlers")),
    reason="the site needs `pip install 'sampo-dpo[docs]'`",
)


class Tags(yaml.SafeLoader):
    """Reads mkdocs.yml: `!ENV [NAME, default]` is its default."""


Tags.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node)[-1])
CONFIG = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Tags)


def leaves(nav):
    """Pages of a navigation."""
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav.values() if isinstance(nav, dict) else nav) for page in leaves(item)]


NAV = leaves(CONFIG["nav"])


def test_the_navigation_lists_every_page_once():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - {"lab/table.md"}
    pages |= {f"tutorials/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
    pages |= {f"api/{name}" for name in api_pages()}
    assert len(NAV) == len(set(NAV))
    outside = {"index.md", "changelog.md", "contributing.md", "benchmarks.md", "measurements.md"}
    assert set(NAV) == pages | outside


def test_each_command_has_a_page_with_every_option_and_a_guide():
    from sampo.cli import COMMANDS
    from sampo.commands import judge, options

    assert set(GUIDES) == set(COMMANDS)
    assert {path.stem for path in (DOCS / "commands").glob("*.md")} == {*COMMANDS, "README"}
    missing = [page for pages in GUIDES.values() for page in pages if not (DOCS / f"{page}.md").is_file()]
    assert not missing
    unlinked = [
        name for name, (page, *_) in GUIDES.items() if f"commands/{name}.md" not in (DOCS / f"{page}.md").read_text()
    ]
    assert not unlinked
    for name, parser in (("judge", judge.make_parser()), ("train", options.make_parser())):
        page = (DOCS / "commands" / f"{name}.md").read_text(encoding="utf-8")
        wanted = [action.option_strings[0] for action in parser._actions if action.option_strings]
        negatives = {word for word in wanted if word.startswith("--no_")} - {"--no_repeat_ngram_size"}
        assert [
            word for word in wanted if f"| `{word}` |" not in page and word != "-h" and word not in negatives
        ] == []


def test_a_table_of_options_and_a_usage_by_hand():
    import argparse

    parser = argparse.ArgumentParser(prog="sampo x")
    parser.add_argument("place", metavar="PLACE", help="where")
    parser.add_argument("--many", nargs="+", type=int, required=True, help="numbers")
    parser.add_argument("--kind", choices=("a", "b"), default="a", help="one of two | or <both>; default %(default)s")
    parser.add_argument("--dry", action="store_true", help="do nothing")
    assert usage(parser) == "sampo x PLACE --many N … [options]"
    assert options_table(parser._actions[1:], parser).splitlines()[2:] == [
        "| `PLACE` |  |  | where |",
        "| `--many` | `N …` | required | numbers |",
        r"| `--kind` | `a \| b` | `a` | one of two \| or &lt;both>; default a |",
        "| `--dry` |  |  | do nothing |",
    ]


def test_the_api_pages_cover_the_public_names_and_every_package_but_that_of_the_commands():
    import sampo

    assert set(public_names()) == set(sampo.__all__)
    first = api_pages()["index.md"]
    assert [name for name, path in public_names().items() if f"::: {path}\n" not in first] == []
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {f"{name}.md" for name in packages - {"commands"}} == set(api_pages()) - {"index.md"}
    assert "sampo.evaluation.results.win_rate" in module_names("evaluation")


def test_a_drawing_puts_every_node_left_of_what_it_points_to():
    graph = {"a": {"b", "d"}, "b": {"c"}, "c": {"d"}, "d": set()}
    assert columns(graph) == {"a": 0, "b": 1, "c": 2, "d": 3}
    svg = draw(graph, "A <graph>")
    assert svg.count("<rect") == 4
    assert svg.count('marker-end="url(#arrow)"') == 4
    assert 'aria-label="A &lt;graph&gt;"' in svg


def test_drawings_are_the_same_up_to_rounding():
    one = '<!-- Matplotlib v3.11.2 --><path id="m1234567890" d="M 1.5 2"/><text>DPO</text>'
    assert same_drawing(
        one, one.replace("1.5", "1.52").replace("m1234567890", "m12345abcde").replace("3.11.2", "3.12")
    )
    assert not same_drawing(one, one.replace("1.5", "1.7"))
    assert not same_drawing(one, one.replace("DPO", "DPQ"))
    assert not same_drawing(one, one + "<path/>")


def test_every_figure_of_the_documents_is_drawn_from_records():
    """And `docs/build.py --check` compares these with what the records give."""
    drawn = {"study/frontier.svg", "study/prediction.svg", "study/biases.svg", "lab/lab.svg", "lab/bars.svg"}
    kinds = (".svg", ".png", ".jpg", ".gif", ".webp", ".pdf")
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*") if path.suffix in kinds} == drawn
    assert [path for path in (ROOT / "sampo").rglob("*") if path.suffix in kinds] == []


def test_a_notebook_becomes_a_page(tmp_path):
    picture = base64.b64encode(b"png").decode()
    cells = [
        {"cell_type": "markdown", "source": ["[![x](https://y/assets/colab-badge.svg)](z)"]},
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "Text."]},
        {"cell_type": "code", "source": ["# Installs sampo"], "outputs": []},
        {
            "cell_type": "code",
            "source": ["1 + 1"],
            "outputs": [
                {"text": ["two\n"]},
                {"data": {"text/html": ["<style>a</style>\n<table><tr><td>2</td></tr></table>"], "text/plain": "2"}},
                {"data": {"text/html": ["<pre>coloured</pre>"], "text/plain": "plain"}},
                {"data": {"image/png": picture}},
            ],
        },
    ]
    (tmp_path / "some.ipynb").write_text(json.dumps({"cells": cells}))
    found = convert(tmp_path / "some.ipynb", "About.")
    assert found.markdown == (
        "# Title\n\nAbout.\n\nText.\n\n```python\n1 + 1\n```\n\n```text\ntwo\n```\n\n"
        "<table><tr><td>2</td></tr></table>\n\n```text\nplain\n```\n\n![Figure drawn by the cell above](some_1.png)\n"
    )
    assert found.pictures == {"some_1.png": b"png"}


@needs_mkdocs
def test_links_lead_to_pages_of_the_site_or_to_files_of_the_repository():
    from site_hooks import repository, rewrite_links

    known = {"index.md", "lab.md", "scale.md", "study/frontier.svg", "tutorials/length_bias.md", "commands/train.md"}
    known |= {"benchmarks.md"}
    for page, before, after in (
        ("index.md", "[x](docs/lab.md#results)", "[x](lab.md#results)"),
        ("index.md", '<img src="docs/study/frontier.svg">', '<img src="study/frontier.svg">'),
        ("lab.md", "[x](../README.md)", "[x](index.md)"),
        ("lab.md", "[x](../notebooks/length_bias.ipynb)", "[x](tutorials/length_bias.md)"),
        ("lab.md", "[x](../sampo/config.py)", f"[x]({repository()}/blob/main/sampo/config.py)"),
        ("lab.md", "[x](../sampo)", f"[x]({repository()}/tree/main/sampo)"),
        ("lab.md", "[x](scale.md) [y](#here) [z](https://a.b/c.md)", None),
        ("lab.md", "[x](absent.md)", None),  # MkDocs reports it
        ("commands/train.md", "[x](../scale.md)", None),
        ("tutorials/length_bias.md", "[x](../docs/scale.md)", "[x](../scale.md)"),
        ("benchmarks.md", "[x](../docs/lab.md)", "[x](lab.md)"),
    ):
        assert rewrite_links(before, page, known) == (after or before), (page, before)


class Page(HTMLParser):
    """What a page loads, and its headings."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.headings = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag in ("img", "script", "iframe", "source", "video"):
            self.loads += [found[key] for key in ("src", "srcset") if found.get(key)]
        elif tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(found["href"])
        elif tag == "h1":
            self.headings.append(tag)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml"]
    done = subprocess.run(
        [*map(str, command), "--site-dir", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": ""},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@needs_mkdocs
def test_the_site_builds_and_its_pages_load_nothing_from_another_host(site):
    pages = sorted(site.rglob("*.html"))
    assert {path.relative_to(site).with_suffix(".md").as_posix() for path in pages} == {
        *(page.replace("README.md", "index.md") for page in NAV),
        "404.md",
    }
    for path in pages:
        page = Page(path.read_text(encoding="utf-8"))
        assert page.loads
        assert [url for url in page.loads if re.match("(?:https?:)?//", url)] == [], path
        local = [url for url in page.loads if path.name != "404.html" and not url.startswith("data:")]
        assert [url for url in local if not (path.parent / url.split("?")[0].split("#")[0]).is_file()] == [], path
        assert len(page.headings) == 1 or path.name == "404.html", path
    assert json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]


@needs_mkdocs
def test_llms_txt_lists_every_page_and_each_is_there(site):
    text = (site / "llms.txt").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\)", text, re.MULTILINE)
    assert {name.replace(".html", ".md") for name in listed} == set(NAV)
    assert [name for name in listed if not (site / name).is_file()] == []
    assert text.startswith(f"# sampo\n\n> {CONFIG['site_description']}\n")
    whole = (site / "llms-full.txt").read_text(encoding="utf-8")
    assert "# Choose a method" in whole
    assert "<!-- generated" not in whole

"""The API reference: one page per package, with the directives that mkdocstrings replaces by the docstrings."""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "sampo"
# Page -> title and the modules or packages on it. What the command line alone uses has the pages of the commands.
PAGES = {
    "data": ("Preference data", ("data",)),
    "scoring": ("Scoring", ("scoring",)),
    "models": ("Models", ("models",)),
    "training": ("Training", ("training",)),
    "reference_cache": ("Reference cache", ("reference_cache",)),
    "checkpointing": ("Checkpoints", ("checkpointing",)),
    "diagnostics": ("Diagnostics", ("diagnostics",)),
    "audit": ("Audit", ("audit",)),
    "evaluation": ("Evaluation", ("evaluation",)),
    "pairs": ("Pairs from answers", ("pairs",)),
    "stats": ("Statistics", ("stats",)),
    "report": ("Report and figures", ("report",)),
    "io": ("Files and records", ("io",)),
    "lab": ("Lab", ("lab",)),
    "sweep": ("Sweep", ("sweep",)),
}


def api_pages() -> dict[str, str]:
    """Name in api/ -> Markdown."""
    pages = {"index.md": _public_page()}
    for page, (title, packages) in PAGES.items():
        parts = [f"# {title}"]
        for package in packages:
            parts += [about] if (about := ast.get_docstring(_parse(PACKAGE / package / "__init__.py"))) else []
            parts += [_directive(name) for name in module_names(package)]
        pages[f"{page}.md"] = "\n\n".join(parts) + "\n"
    return pages


def module_names(package: str) -> list[str]:
    """Modules of a package that have public names, without those that are executed as scripts."""
    found = []
    for path in sorted((PACKAGE / package).rglob("*.py")):
        tree = _parse(path)
        kinds = (ast.FunctionDef, ast.ClassDef)
        public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
        if public and path.stem not in ("__init__", "__main__"):
            found.append(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    return found


def _directive(module: str) -> str:
    """A module, without the names that the first page documents: a name has one place."""
    elsewhere = [name for name, path in public_names().items() if path == f"{module}.{name}"]
    if not elsewhere:
        return f"::: {module}"
    filters = ", ".join(f'"!^{name}$"' for name in ("_", *elsewhere)).replace("!^_$", "!^_")
    links = ", ".join(f"[`{name}`](index.md#{module}.{name})" for name in elsewhere)
    return f"::: {module}\n    options:\n      filters: [{filters}]\n\nOn the [first page](index.md): {links}."


@cache
def public_names() -> dict[str, str]:
    """Each name of `from sampo import …` with its full path, from the table in `sampo/__init__.py`."""
    tree = _parse(PACKAGE / "__init__.py")
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "_PUBLIC" for target in node.targets)
    )
    return {name: f"sampo.{module}.{name}" for name, module in ast.literal_eval(table).items()}


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _public_page() -> str:
    """The names that `sampo` itself has: the trainer first, the errors last."""
    names = public_names()
    errors = [name for name in names if name.endswith("Error") or name == "Preempted"]
    short = "\n    options:\n      heading_level: {level}\n      show_root_full_path: false"
    parts = [
        "# API reference",
        "`from sampo import …` has these names. The pages of the packages list every public function and class; their "
        "paths may change between versions, with a line in the [changelog](../changelog.md). The options of "
        "`SamPOConfig` are listed in [configuration](../configuration.md).",
        *(f"::: {path}{short.format(level=2)}" for name, path in names.items() if name not in errors),
        "## Errors",
        *(f"::: {names[name]}{short.format(level=3)}" for name in errors),
    ]
    return "\n\n".join(parts) + "\n"

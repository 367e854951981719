"""The packages of `sampo` as a graph, read from the import statements. docs/architecture.md shows it."""

import ast
from pathlib import Path

from drawing import draw

PACKAGE = Path(__file__).resolve().parent.parent / "sampo"


def imported_packages(path: Path) -> set[str]:
    """Packages and top-level modules of `sampo` that a module imports, by their name below `sampo`."""
    found = set()
    here = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(here[: len(here) - node.level])
            target = base + (node.module.split(".") if node.module else [])
            found |= {target[0]} if target else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sampo":
            found |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("sampo.")}
    return found - {"__version__"}


def package_graph() -> dict[str, set[str]]:
    """Each package or top-level module of `sampo`, with those that it imports."""
    graph: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        package = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if package != "__init__":
            graph.setdefault(package, set()).update(imported_packages(path) - {package})
    return {package: imports & graph.keys() for package, imports in graph.items()}


def reduce_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without the arrows that a longer path implies (its transitive reduction)."""
    reduced = {package: set(imports) for package, imports in graph.items()}
    for package in sorted(graph):
        for imported in sorted(graph[package]):
            reduced[package].discard(imported)
            if imported not in reachable(reduced, package):
                reduced[package].add(imported)
    return reduced


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """All nodes to which a path leads from `start`."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for node in graph[waiting.pop()] - found:
            found.add(node)
            waiting.append(node)
    return found


def package_diagram() -> str:
    """The reduced graph as a Mermaid diagram: an arrow points from a package to one that it imports."""
    lines = [
        f"    {a} --> {b}" for a, imports in sorted(reduce_graph(package_graph()).items()) for b in sorted(imports)
    ]
    return "\n".join(["```mermaid", "graph LR", *lines, "```"])


def package_drawing() -> str:
    """The same as an SVG for the site, where Mermaid would load a script from another host."""
    return f'<div class="drawing">\n{draw(reduce_graph(package_graph()), "Imports between the packages")}\n</div>'


def module_map() -> str:
    """Every module with the first sentence of its docstring, by package."""
    groups: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if path.name == "__init__.py":
            continue
        summary = " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
        folder = path.parent.relative_to(PACKAGE.parent).as_posix()
        groups.setdefault(folder, []).append(f"- `{path.name}`: {summary}")
    return "\n\n".join("\n".join([f"**{folder}**", "", *lines]) for folder, lines in sorted(groups.items()))

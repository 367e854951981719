"""The direction of imports, and what an install without extras can do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
from packages import imported_packages, reachable, reduce_graph  # noqa: E402, found by the path above

PACKAGE = ROOT / "sampo"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Which package may import which, in the order of the data: those that import nobody first. `commands` may import
# everything, and nothing but `cli` imports `commands`. docs/architecture.md draws these arrows.
ARROWS = {
    "logs": set(),
    "plugins": set(),
    "old_options": set(),
    "methods": {"plugins", "weighting"},
    "io": set(),
    "stats": set(),
    "budget": set(),
    "transport": set(),
    "weighting": {"budget", "plugins", "transport"},
    "data": {"io", "weighting"},
    "config_checks": {"data", "old_options", "weighting"},
    "config": {"config_checks", "old_options", "weighting"},
    "models": {"data", "io"},
    "scoring": {"data", "logs", "models", "weighting"},
    "reference_cache": {"config", "data", "io", "logs", "models", "scoring"},
    "checkpointing": {"data", "io", "logs", "models", "weighting"},
    "training": {
        *{"checkpointing", "config", "data", "io", "logs", "models", "old_options", "reference_cache", "scoring"},
        "weighting",
    },
    "trainer": {
        *{"checkpointing", "config", "data", "io", "logs", "models", "old_options", "reference_cache", "scoring"},
        *{"training", "weighting"},
    },
    "diagnostics": {"data", "io", "reference_cache", "scoring", "stats", "weighting"},
    "audit": {"data", "io", "methods", "models", "stats"},
    "evaluation": {"data", "io", "models", "scoring", "stats"},
    "pairs": {"audit", "data", "evaluation", "io", "stats"},
    "report": {"audit", "checkpointing", "data", "diagnostics", "evaluation", "io", "stats"},
    "lab": {"config", "evaluation", "io", "methods", "report", "scoring", "trainer", "weighting"},
    "sweep": {"audit", "diagnostics", "evaluation", "io", "reference_cache", "report", "stats", "training"},
    "cli": {"commands", "plugins"},
}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_one_way(path):
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if part in ("commands", "__init__"):
        return
    assert part in ARROWS, f"say in this test what `{part}` may import"
    assert imported_packages(path) <= ARROWS[part] | {part}


MAX_CLASS, MAX_FILE, MAX_FUNCTION = 300, 450, 70  # lines


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_classes_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            limit = MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION
            assert node.end_lineno - node.lineno + 1 <= limit, node.name


def private_uses(path: Path) -> list[str]:
    """Private names of other modules of `sampo` that a module imports or reads from an imported module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "sampo")
    ]
    names = {alias.asname or alias.name for node in imports for alias in node.names}
    found = [alias.name for node in imports for alias in node.names if is_private(alias.name)]
    return found + [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in names
        and is_private(node.attr)
    ]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


NOT_SHARED = {
    "logger",
    "main",
    "make_parser",
    "run",
    "start",
    "__all__",
    "__getattr__",
    "__dir__",
}  # roles of a module
ALLOWED = {"WinRate", "Verbosity"}  # of the `evaluate` modules, whose users load them by these names


def public_names(tree: ast.Module) -> set[str]:
    """Functions, classes and constants that a module defines at its top level."""
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]
    return {name for name in names if not is_private(name)}


def test_each_public_name_is_defined_in_one_module():
    modules: dict[str, list[str]] = {}
    for path in MODULES:
        for name in public_names(ast.parse(path.read_text(encoding="utf-8"))) - NOT_SHARED - ALLOWED:
            modules.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    assert not {name: paths for name, paths in modules.items() if len(paths) > 1}


def test_public_names_of_a_module_are_found():
    tree = ast.parse("A, B = 1, 2\nC: int = 3\n_D = 4\ndef f(): g = 1\nclass H: i = 1\nimport j\n")
    assert public_names(tree) == {"A", "B", "C", "f", "H"}


TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_stay_in_their_module(path):
    assert private_uses(path) == []


def test_a_private_name_of_another_module_is_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("from .other import _hidden, shown\nfrom . import files\nfiles._secret, shown.ok, files.__doc__\n")
    assert private_uses(path) == ["_hidden", "files._secret"]


def test_the_step_is_readable():
    """One training step fits a screen, beside the paper."""
    tree = ast.parse((PACKAGE / "trainer.py").read_text(encoding="utf-8"))
    (step,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_compute_loss"]
    assert step.end_lineno - step.lineno < 20


def test_the_diagram_omits_exactly_the_arrows_that_a_longer_path_implies():
    graph = {"a": {"b", "c", "d"}, "b": {"c"}, "c": set(), "d": {"c"}}
    reduced = reduce_graph(graph)
    assert reduced == {"a": {"b", "d"}, "b": {"c"}, "c": set(), "d": {"c"}}
    assert {node: reachable(reduced, node) for node in graph} == {node: reachable(graph, node) for node in graph}


def test_architecture_describes_every_package_and_top_level_module():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    parts = {path.stem for path in PACKAGE.iterdir() if (path.suffix == ".py" and path.stem != "__init__")}
    parts |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert not {part for part in parts if f"\n| `{part}` |" not in page}


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def test_importing_sampo_loads_neither_torch_nor_transformers():
    done = run(
        "import sampo, sys; print([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


NEED_AN_EXTRA = {"sampo.evaluation.results.evaluate_metrics"}  # its classes derive from `evaluate.Metric`


def test_every_module_imports_without_the_optional_packages():
    optional = ["matplotlib", "jinja2", "deepspeed", "bitsandbytes", "gguf", "openai", "lm_eval", "evaluate"]
    code = f"""
import importlib, pkgutil, sys
import peft, datasets, transformers  # look by themselves for what is installed
from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser
for name in list(sys.modules):
    if name.split('.')[0] in {optional!r}: del sys.modules[name]
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {optional!r}: raise ImportError('not installed: ' + name)
sys.meta_path.insert(0, Blocked())
import sampo
for module in pkgutil.walk_packages(sampo.__path__, 'sampo.'):
    if module.name not in {NEED_AN_EXTRA!r}:
        importlib.import_module(module.name)
print('all')
"""
    done = run(code)
    assert done.stdout.strip().endswith("all"), done.stderr[-2000:]


def test_public_names_are_there_and_an_unknown_one_is_named():
    import sampo

    for name in sampo.__all__:
        assert getattr(sampo, name) is not None
    with pytest.raises(AttributeError, match="has no attribute `SampoTrainer`"):
        _ = sampo.SampoTrainer

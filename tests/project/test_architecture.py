"""The direction of imports, and what an install without extras can do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "sampo"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Which package may import which, in the order of the data: those that import nobody first. `commands` may import
# everything, and nothing but `cli` imports `commands`. docs/architecture.md draws these arrows.
ARROWS = {
    "logs": set(),
    "plugins": set(),
    "old_options": set(),
    "io": set(),
    "stats": set(),
    "weighting": {"plugins"},
    "config_checks": {"old_options", "weighting"},
    "config": {"config_checks", "old_options", "weighting"},
    "data": {"io", "weighting"},
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
    "audit": {"data", "io", "models", "stats"},
    "evaluation": {"data", "io", "models", "scoring", "stats"},
    "report": {"audit", "checkpointing", "data", "diagnostics", "evaluation", "io", "stats"},
    "lab": {"config", "evaluation", "io", "plugins", "report", "trainer", "weighting"},
    "cli": {"commands", "plugins"},
}


def imported_parts(path: Path) -> set[str]:
    """Parts of the package that a module imports, by their name below `sampo`."""
    parts = set()
    here = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(here[: len(here) - node.level])
            target = base + (node.module.split(".") if node.module else [])
            parts |= {target[0]} if target else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sampo":
            parts |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            parts |= {a.name.split(".")[1] for a in node.names if a.name.startswith("sampo.")}
    return parts - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_one_way(path):
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if part in ("commands", "__init__"):
        return
    assert part in ARROWS, f"say in this test what `{part}` may import"
    assert imported_parts(path) <= ARROWS[part] | {part}


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

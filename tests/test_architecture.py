"""The direction of imports, and what an install without extras can do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sampo"
MODULES = sorted(PACKAGE.rglob("*.py"))
# who may import whom inside the package, those who import nobody first; commands may import everything, and nothing
# imports commands but the cli
ARROWS = {
    "cli": {"commands", "plugins"},
    "head": set(),
    "io": {"io"},
    "logs": set(),
    "memory": set(),
    "model_card": set(),
    "old_options": set(),
    "pieces": set(),
    "plugins": set(),
    "ref_key": set(),
    "repeated_prompts": set(),
    "run_state": set(),
    "stream_attention": set(),
    "tables": set(),
    "checkpoints": {"io"},
    "pair_rows": {"repeated_prompts"},
    "pair_stream": {"head", "logs", "stream_attention"},
    "ref_logps": {"io", "ref_key"},
    "results": {"io"},
    "weighting": {"plugins"},
    "chat": {"pair_rows", "repeated_prompts"},
    "config": {"old_options", "weighting"},
    "iterate": {"checkpoints", "io"},
    "json_files": {"pair_rows"},
    "run_identity": {"weighting"},
    "token_scorer": {"head", "pair_stream"},
    "treatment": {"pair_rows", "repeated_prompts"},
    "data_files": {"json_files", "pair_rows"},
    "end_tokens": {"chat"},
    "model_checks": {"chat", "io"},
    "source_columns": {"json_files", "pair_rows"},
    "lengths": {"end_tokens"},
    "model_loading": {"model_checks"},
    "pair_files": {"data_files", "json_files", "pair_rows", "source_columns"},
    "adapters": {"io", "model_checks", "model_loading"},
    "cached_reference": {"config", "logs", "model_loading", "ref_key", "ref_logps"},
    "data": {"chat", "json_files", "pair_files", "pair_rows", "repeated_prompts", "source_columns", "treatment"},
    "pair_tokens": {"lengths", "repeated_prompts", "weighting"},
    "resuming": {"checkpoints", "io", "lengths", "logs", "model_loading", "run_identity"},
    "guards": {"config", "data", "end_tokens", "lengths", "logs"},
    "pair_scores": {"chat", "io", "pair_tokens", "ref_key", "ref_logps", "token_scorer", "weighting"},
    "trainer": {
        "cached_reference",
        "chat",
        "checkpoints",
        "config",
        "end_tokens",
        "guards",
        "head",
        "io",
        "lengths",
        "logs",
        "model_card",
        "model_checks",
        "model_loading",
        "old_options",
        "pair_stream",
        "pair_tokens",
        "pieces",
        "ref_logps",
        "resuming",
        "run_state",
        "weighting",
    },
    "lab": {"config", "io", "lab", "plugins", "results", "tables", "trainer", "weighting"},
    "evaluation": {
        "chat",
        "evaluation",
        "io",
        "json_files",
        "lab",
        "model_checks",
        "model_loading",
        "pair_files",
        "pair_rows",
        "results",
        "source_columns",
        "tables",
    },
    "audit": {
        "audit",
        "chat",
        "data",
        "end_tokens",
        "evaluation",
        "io",
        "json_files",
        "lengths",
        "pair_files",
        "pair_rows",
        "pair_tokens",
        "repeated_prompts",
        "results",
        "source_columns",
        "tables",
        "treatment",
    },
    "diagnostics": {"evaluation"},
    "report": {"audit", "checkpoints", "diagnostics", "evaluation", "io", "lab", "pair_rows", "report", "results"},
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
    assert imported_parts(path) <= ARROWS[part]


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def test_importing_sampo_loads_neither_torch_nor_transformers():
    done = run(
        "import sampo, sys; print([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


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

"""Writes the generated parts of the documents: `python docs/build.py`, or `--check` to fail where they differ."""

import argparse
import re
import sys
from dataclasses import MISSING
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def methods() -> str:
    """The table of weightings."""
    from sampo.weighting import WEIGHTINGS

    lines = ["| `token_weighting` | method | weight of a completion token | source |", "|---|---|---|---|"]
    for name, method in WEIGHTINGS.items():
        default = " (default)" if name == "sampo" else ""
        lines.append(f"| `{name}`{default} | {method.title} | {method.formula} | {method.source} |")
    return "\n".join(lines)


def options() -> str:
    """What `SamPOConfig` adds to TRL's config."""
    from trl import DPOConfig

    from sampo import SamPOConfig

    lines = ["| option | default | meaning |", "|---|---|---|"]
    for name, field in SamPOConfig.__dataclass_fields__.items():
        if name not in DPOConfig.__dataclass_fields__:
            assert field.default is not MISSING
            text = re.sub(r"\s+", " ", field.metadata["help"]).replace("|", "\\|")
            lines.append(f"| `{name}` | `{field.default}` | {text} |")
    return "\n".join(lines)


LAB_COLUMNS = ("tokens", "quality", "win_rate", "accuracy_better_shorter", "correlation")


def lab() -> str:
    """The main columns of the lab's table, from the records of its last run for these documents."""
    from sampo import results
    from sampo.lab.report import collect, markdown_table, outcomes_of

    lines = collect(outcomes_of(results.read(ROOT / "docs" / "lab" / "records.jsonl")))
    return markdown_table(lines, LAB_COLUMNS)


def speed() -> str:
    """README's few lines of the benchmark of a training step, from the records of its last run."""
    from tables import readme_table

    return readme_table(_measured())


def benchmark() -> str:
    """All tables of the benchmark of a training step."""
    from tables import results_tables

    return results_tables(_measured())


def coverage() -> str:
    """How often the intervals of an evaluation hold the truth."""
    from interval_coverage import coverage_table

    return coverage_table(_simulated())


def overlap() -> str:
    """How far control of length errs where lengths hardly overlap."""
    from interval_coverage import overlap_table

    return overlap_table(_simulated())


def _simulated() -> list:
    from sampo import results

    return results.read(ROOT / "docs" / "evaluation" / "records.jsonl")


def _measured() -> list:
    from sampo import results

    return results.read(ROOT / "benchmarks" / "records.jsonl")


PARTS = {
    "methods": methods,
    "options": options,
    "lab": lab,
    "speed": speed,
    "benchmark": benchmark,
    "coverage": coverage,
    "overlap": overlap,
}
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end generated -->)", re.DOTALL)


def main() -> None:
    """Fill every generated block of README and docs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, no part of the package
    stale = []
    for path in [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[3]}", old)
        if new != old and check:
            stale.append(str(path.relative_to(ROOT)))
        elif new != old:
            path.write_text(new, encoding="utf-8")
    if stale:
        sys.exit(f"{', '.join(stale)} differ from what the code says: run `python docs/build.py`.")


if __name__ == "__main__":
    main()

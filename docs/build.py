"""Writes the generated parts of the documents: `python docs/build.py`, or `--check` to fail where they differ."""

import argparse
import re
import sys
from dataclasses import MISSING
from functools import cache, partial
from pathlib import Path
from typing import Any

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


def old_options() -> str:
    """What TRL, transformers and alignment-handbook have dropped, and what replaces it."""
    from sampo.old_options import OLD_OPTIONS

    lines = ["| option | what to do |", "|---|---|"]
    lines += [f"| `{name}` | {OLD_OPTIONS[name]()} |" for name in sorted(OLD_OPTIONS)]
    return "\n".join(lines)


LAB_COLUMNS = ("tokens", "quality", "win_rate", "accuracy_better_shorter", "correlation")


def lab() -> str:
    """The main columns of the lab's table, from the records of its last run for these documents."""
    from sampo.io import records as results
    from sampo.lab.report import collect, markdown_table, outcomes_of

    lines = collect(outcomes_of(results.read(ROOT / "docs" / "lab" / "records.jsonl")))
    return markdown_table(lines, LAB_COLUMNS)


@cache
def _study():
    from sampo.io import records as results
    from sampo.lab.analysis import Study

    records = results.read(ROOT / "docs" / "study" / "records.jsonl.gz")
    return Study(records) if records else None


def study(part: str) -> str:
    """One part of the study, from the records of its last run."""
    from sampo.lab.study_page import PARTS as parts

    return parts[part](_study()) if _study() else "Not measured yet."


def real_model() -> str:
    """The study's methods on a real model, from the records of benchmarks/real_model_study.py."""
    from real_model_study import table

    from sampo.io import records as results

    records = results.read(ROOT / "docs" / "study" / "real_model.jsonl")
    return table(records) if records else "Not measured yet."


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


def hard_prompts() -> str:
    """How far control of length errs where hard prompts have longer answers."""
    from interval_coverage import difficulty_table

    return difficulty_table(_simulated())


def overlap() -> str:
    """How far control of length errs where lengths hardly overlap."""
    from interval_coverage import overlap_table

    return overlap_table(_simulated())


def audit() -> str:
    """The table of the audit that docs/audit.md shows."""
    return _audited().overall_table()


def audit_faults() -> str:
    """Its issues, by kind."""
    return _audited().issue_list()


def audit_cuts() -> str:
    """What `max_length` cuts there."""
    return _audited().cut_table()


def audit_columns() -> str:
    """Columns of `pairs.parquet`."""
    from sampo.audit.files import PARQUET_COLUMNS

    return "\n".join(["| column | meaning |", "|---|---|", *(f"| `{k}` | {v} |" for k, v in PARQUET_COLUMNS.items())])


def _audited() -> Any:
    from sampo.audit.report import AuditTables
    from sampo.io import records as results

    return AuditTables(results.read(ROOT / "docs" / "audit" / "records.jsonl"))


def lab_judged() -> str:
    """The lab's models by the truth and by a ruler, from the records of benchmarks/lab_judged.py."""
    return _judged("lab_judged.jsonl", {"lab": "the truth", "longer": "a ruler"}, empty="lab")


def real_judged() -> str:
    """The real model's answers by a model and by a ruler, from the records of benchmarks/real_model_judged.py."""
    from sampo.io import records as results

    table = _judged(
        "real_judged.jsonl", {"implicit adapter": "the judge", "longer": "a ruler"}, empty="implicit adapter"
    )
    records = results.read(ROOT / "docs" / "evaluation" / "real_judged.jsonl")
    (accuracy,) = (record for record in records if record.name == "judge_accuracy")
    agrees = f"The judge agrees with people on {100 * accuracy.value:.0f} % of {accuracy.n} held-out pairs."
    return f"{table}\n\n{agrees} `{accuracy.command}`"


def _judged(file: str, judges: dict[str, str], empty: str) -> str:
    """Verbosity, and win rates by each judge, of each system."""
    from sampo.io import records as results

    cells: dict[str, dict[str, str]] = {}
    for record in results.read(ROOT / "docs" / "evaluation" / file):
        if "system" not in record.config:  # of the judge, or of two systems
            continue
        scale = 1 if record.name.startswith("verbosity/") else 100
        form = ".2f" if record.name == "verbosity/tokens_ratio" else ".1f"
        bounds = " [{}, {}]".format(*(f"{scale * x:{form}}" for x in record.interval)) if record.interval else ""
        name = f"{record.config.get('judge', '')} {record.name}".strip()
        value = "–" if record.value is None else f"{scale * record.value:{form}}"
        cells.setdefault(record.config["system"], {})[name] = value + bounds
    columns = {"verbosity/tokens_mean": "tokens", "verbosity/tokens_ratio": "ratio"}
    for judge, title in judges.items():
        columns |= {
            f"{judge} win_rate": f"win rate by {title}, %",
            f"{judge} win_rate/equal_length": "at equal length, %",
        }
        if judge == empty:
            columns[f"{judge} win_rate/control_empty"] = "an empty answer, %"
    lines = ["| system | " + " | ".join(columns.values()) + " |", "|---|" + "---|" * len(columns)]
    for system, found in cells.items():
        lines.append(f"| {system} | " + " | ".join(found.get(name, "") for name in columns) + " |")
    return "\n".join(lines)


def _simulated() -> list:
    from sampo.io import records as results

    return results.read(ROOT / "docs" / "evaluation" / "records.jsonl")


def _measured() -> list:
    from sampo.io import records as results

    return results.read(ROOT / "benchmarks" / "records.jsonl")


def campaign() -> str:
    """What came of the runs that were killed, from the records of tests/support/kill_campaign.py."""
    from sampo.io import records as results

    runs: dict[str, dict[str, results.Record]] = {}
    for record in results.read(ROOT / "docs" / "resume" / "records.jsonl"):
        runs.setdefault(record.command, {})[record.name] = record
    columns = {
        "kills": "kills",
        "kills_in_save": "of which in a save",
        "kills_before_training": "before the first step of a launch",
        "steps": "steps of the run",
        "steps_again": "steps begun again",
        "half_checkpoints": "half checkpoints found",
        "differences": "differences",
    }
    lines = [f"| command | {' | '.join(columns.values())} |", f"|---|{'---|' * len(columns)}"]
    for command, numbers in runs.items():
        lines.append(f"| `{command}` | {' | '.join(f'{numbers[name].value:.0f}' for name in columns)} |")
    return "\n".join(lines)


def memory_formula() -> str:
    """Bytes of each trainable parameter, by engine."""
    from sampo.training.memory import ENGINES

    parts = ("weights", "gradients", "master", "adam", "copies")
    lines = ["| engine | " + " | ".join(parts) + " | reference |", "|---|" + "---|" * (len(parts) + 1)]
    for name, engine in ENGINES.items():
        cells = []
        for part in parts:
            number = getattr(engine, part)
            cells.append(f"{number}{' / N' if number and part in engine.spread else ''}" if number else "")
        reference = 4 + 2 if not engine.spread else 2
        cells.append(f"{reference}{' / N' if 'reference' in engine.spread else ''}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


FITS_GB = 72.0  # of an 80 GB GPU, with a tenth to spare


def memory() -> str:
    """Gigabytes per GPU of every model, engine and method."""
    from sampo.training.memory import ENGINES, METHODS, QLORA_ENGINES, REFERENCES, SHAPES, gpu_bytes, machine_bytes

    blocks, titles = [], {"full": "All parameters", "lora": "LoRA", "qlora": "QLoRA"}
    for method in METHODS:
        lines = [
            f"**{titles[method]}**",
            "",
            f"| engine |{' reference |' if method == 'full' else ''} " + " | ".join(SHAPES) + " |",
            "|---|" + "---|" * (len(SHAPES) + (method == "full")),
        ]
        for engine in QLORA_ENGINES if method == "qlora" else ENGINES:
            for reference in REFERENCES if method == "full" else REFERENCES[:1]:
                cells = []
                for shape in SHAPES.values():
                    size = sum(gpu_bytes(shape, engine, method, reference=reference).values()) / 1e9
                    text = f"{size:,.0f}" if size >= 10 else f"{size:.1f}"
                    cells.append(f"**{text}**" if size <= FITS_GB else text)
                head = f"| `{engine}` |" + (f" {reference} |" if method == "full" else "")
                lines.append(f"{head} " + " | ".join(cells) + " |")
        if method != "qlora":
            cells = [f"{machine_bytes(shape, method) / 1e9:,.0f}" for shape in SHAPES.values()]
            live = " live |" if method == "full" else ""
            lines.append(f"| main memory of `zero3_offload`, all machines |{live} " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def engines() -> str:
    """Largest difference of a loss from one process, from the last run of the tests that kept records."""
    from sampo.io import records as results

    last: dict[str, dict[str, results.Record]] = {}
    for record in results.read(ROOT / "docs" / "engines.jsonl"):
        last.setdefault(record.config["engine"], {})[record.config["mode"]] = record
    if not last:
        return "Not measured yet."
    first = next(iter(next(iter(last.values())).values()))
    modes = list(dict.fromkeys(mode for found in last.values() for mode in found))
    lines = ["| engine | " + " | ".join(modes) + " |", "|---|" + "---|" * len(modes)]
    for engine, found in last.items():
        cells = [f"{found[mode].value:.0e}" if mode in found else "" for mode in modes]
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {number}" for name, number in sorted(first.versions.items()))
    about = f"{first.n} steps, {first.config['processes']} processes on the CPU against one. `{first.command}`; "
    return "\n".join([about + f"{first.created[:10]}; {versions}.", "", *lines])


def merging() -> str:
    """What merging an adapter changes, from the records of benchmarks/merging.py."""
    import merging as measured

    from sampo.io import records as results

    return measured.table(results.read(ROOT / "docs" / "merging.jsonl"))


def diagnosed() -> str:
    """Length pressure of a real model before training, from the records of `sampo diagnose`."""
    from sampo.io import records as results

    groups = ("all", "chosen longer", "chosen shorter")
    cells: dict[str, dict[str, str]] = {}
    for record in results.read(ROOT / "docs" / "diagnose" / "records.jsonl"):
        if record.interval is None:
            raise ValueError(f"The record of {record.config['method']} must have an interval, got none.")
        low, high = record.interval
        group = f"{record.config['group']} ({record.n})"
        cells.setdefault(record.config["method"], {})[group] = f"{record.value:+.3f} ({low:+.3f} … {high:+.3f})"
    heads = [head for group in groups for head in next(iter(cells.values())) if head.startswith(f"{group} (")]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    lines += [f"| `{name}` | " + " | ".join(found[head] for head in heads) + " |" for name, found in cells.items()]
    return "\n".join([f"`{record.command}`; {record.created[:10]}", "", *lines])


STUDY_PARTS = (
    *("about", "verdicts", "details", "headline", "against_dpo"),
    *("at_best", "equal_kl", "equal_win_rate", "frontiers", "biases", "penalties"),
)
PARTS = {
    **{
        "methods": methods,
        "options": options,
        "old_options": old_options,
        "lab": lab,
        "speed": speed,
        "benchmark": benchmark,
    },
    **{"campaign": campaign, "memory": memory, "memory_formula": memory_formula, "engines": engines},
    **{"coverage": coverage, "overlap": overlap, "hard_prompts": hard_prompts, "merging": merging},
    **{"real_model": real_model, "lab_judged": lab_judged, "real_judged": real_judged, "diagnosed": diagnosed},
    **{"audit": audit, "audit_faults": audit_faults, "audit_cuts": audit_cuts, "audit_columns": audit_columns},
    **{f"study_{part}": partial(study, part) for part in STUDY_PARTS},
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

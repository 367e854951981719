"""Writes the generated parts of the documents: `python docs/build.py`, or `--check` to fail where they differ."""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `sampo` and `studies` of this checkout
sys.path.insert(1, str(ROOT / "benchmarks"))  # scripts, no part of the package

if TYPE_CHECKING:
    from sampo.io.records import Record

MEASUREMENTS = ROOT / "measurements"  # the records; README.md there says what measured each file


def read(name: str) -> "list[Record]":
    """The records of a file of measurements."""
    from sampo.io import records

    return records.read(MEASUREMENTS / name)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(heads)}", *lines[1:]])


def methods() -> str:
    """The table of weightings."""
    from sampo.weighting import WEIGHTINGS

    rows = [
        [f"`{name}`{' (default)' if name == 'sampo' else ''}", method.title, method.formula, method.source]
        for name, method in WEIGHTINGS.items()
    ]
    return table(["`token_weighting`", "method", "weight of a completion token", "source"], rows)


def options() -> str:
    """The options that `SamPOConfig` adds to TRL's config."""
    from trl import DPOConfig

    from sampo import SamPOConfig

    rows = []
    for name, field in SamPOConfig.__dataclass_fields__.items():
        if name not in DPOConfig.__dataclass_fields__:
            assert field.default is not MISSING
            text = re.sub(r"\s+", " ", field.metadata["help"]).replace("|", "\\|")
            rows.append([f"`{name}`", f"`{field.default}`", text])
    return table(["option", "default", "meaning"], rows)


def old_options() -> str:
    """Options that TRL, transformers and alignment-handbook have dropped, and their replacements."""
    from sampo.old_options import OLD_OPTIONS

    return table(["option", "what to do"], [[f"`{name}`", OLD_OPTIONS[name]()] for name in sorted(OLD_OPTIONS)])


def package_diagram() -> str:
    """The imports between the packages of `sampo`."""
    import packages

    return packages.package_diagram()


def module_map() -> str:
    """Every module of `sampo` with the first sentence of its docstring."""
    import packages

    return packages.module_map()


LAB_COLUMNS = ("tokens", "quality", "win_rate", "accuracy_better_shorter", "correlation")


def lab() -> str:
    """The main columns of the lab's table, from the records of its last run for these documents."""
    from sampo.lab.report import markdown_table

    return markdown_table(_lab_lines(), LAB_COLUMNS)


def _lab_lines() -> Any:
    from sampo.lab.report import collect_lines, outcomes_of

    return collect_lines(outcomes_of(read("lab.jsonl")))


def claims() -> str:
    """README's four bullets."""
    from front import claims as written
    from tables import newest_real_swap

    from studies.analysis import prediction

    coverage_records = [record for record in read("interval_coverage.jsonl") if record.name == "coverage"]
    swap = newest_real_swap(read("class_swap.jsonl"))
    return written(_lab_lines(), swap, prediction(_study(), "pressure"), coverage_records)


def caption() -> str:
    """The line under README's picture."""
    from front import caption as written

    return written(_lab_lines())


def lab_table() -> str:
    """The whole table of the lab, as `sampo lab` writes it."""
    from sampo.lab.report import collect_lines, describe_runs, markdown, outcomes_of

    outcomes = outcomes_of(read("lab.jsonl"))
    return markdown(collect_lines(outcomes), about=describe_runs(outcomes, "sampo lab"))


@cache
def _study() -> Any:
    from studies.analysis import Study

    return Study(read("study.jsonl.gz"))


def study(part: str) -> str:
    """One part of the study, from the records of its last run."""
    from studies.page import PARTS as parts

    return parts[part](_study())


def onpolicy(part: str) -> str:
    """The table, or the verdicts, of the study of on-policy rounds."""
    from studies.onpolicy import OnPolicyStudy, onpolicy_table, onpolicy_verdicts

    parts = {"table": onpolicy_table, "verdicts": onpolicy_verdicts}
    return parts[part](OnPolicyStudy(read("onpolicy.jsonl.gz")))


def piecewise(part: str) -> str:
    """The table, or the verdicts, of the trial of a piecewise linear length penalty."""
    from studies.piecewise import Trial, piecewise_table, piecewise_verdicts

    parts = {"table": piecewise_table, "verdicts": piecewise_verdicts}
    return parts[part](Trial(read("study.jsonl.gz"), read("piecewise.jsonl.gz")))


def onpolicy_real_model() -> str:
    """Times and counts of on-policy rounds on a real model."""
    import onpolicy_real_model as measured

    return measured.table(read("onpolicy_real_model.jsonl"))


def real_sweep(part: str) -> str:
    """A part of the pages on the sweeps on a real model."""
    import real_sweep as measured

    return getattr(measured, part)(read("real_sweep.jsonl.gz"))


def real_model() -> str:
    """The study's methods on a real model, from the records of benchmarks/real_model_study.py."""
    import real_model_study

    return real_model_study.table(read("real_model_study.jsonl"))


def speed() -> str:
    """README's few lines of what a class swap gives, from the records of benchmarks/class_swap.py."""
    from tables import readme_swap

    return readme_swap(read("class_swap.jsonl"))


def class_swap() -> str:
    """All tables of what a class swap gives."""
    from tables import swap_tables

    return swap_tables(read("class_swap.jsonl"))


def benchmark() -> str:
    """All tables of the benchmark of a training step."""
    from tables import results_tables

    return results_tables(read("step_time.jsonl"))


def coverage() -> str:
    """Coverage of the intervals of an evaluation."""
    from interval_coverage import coverage_table

    return coverage_table(read("interval_coverage.jsonl"))


def hard_prompts() -> str:
    """Bias of length control if hard prompts have longer answers."""
    from interval_coverage import difficulty_table

    return difficulty_table(read("interval_coverage.jsonl"))


def style_coverage() -> str:
    """Bias and coverage of the win rate at equal style."""
    from style_coverage import style_coverage_table

    return style_coverage_table(read("style_coverage.jsonl"))


def evaluation_scale() -> str:
    """Time and memory of judge and compare."""
    from evaluation_scale import scale_table

    return scale_table(read("evaluation_scale.jsonl"))


def overlap() -> str:
    """Bias of length control if lengths hardly overlap."""
    from interval_coverage import overlap_table

    return overlap_table(read("interval_coverage.jsonl"))


def audit() -> str:
    """The table of the audit that docs/audit.md shows."""
    from sampo.audit.report import MEASURES, PART_KEYS, format_interval, format_value

    found = {r.name.removeprefix("audit/"): r for r in read("audit.jsonl") if not PART_KEYS & set(r.config)}
    first = found["longer"]
    rows = [
        [
            title.format(unit=first.config["unit"]),
            format_value(found[name].value, how),
            format_interval(found[name].interval, how),
        ]
        for name, (title, how) in MEASURES.items()
    ]
    by = f"lengths in {first.config['unit']}"
    by += f" of {first.config['tokenizer']}" if "tokenizer" in first.config else ""
    about = f"{first.config['data']}: {first.n:,} pairs, {by}. `{first.command}`"
    return "\n".join([table(["", "value", "95 % interval"], rows), "", about])


def audit_faults() -> str:
    """The issues of its rows, by kind."""
    from sampo.data.issues import phrase

    bad = [record for record in read("audit.jsonl") if record.name == "audit/bad_rows"]
    return "\n".join(
        f"- {record.value:,.0f} of {record.n:,} pairs "
        f"{phrase(record.config['kind'], record.config['column'], int(record.value or 0))}"
        for record in bad
    )


def audit_cuts() -> str:
    """What `max_length` cuts there."""
    from sampo.audit.report import CUT_COUNTS, format_value

    cuts: dict[int | None, dict[str, Record]] = {}
    for record in read("audit.jsonl"):
        if "max_length" in record.config:
            cuts.setdefault(record.config["max_length"], {})[record.name.removeprefix("audit/")] = record
    cuts = dict(sorted(cuts.items(), key=lambda item: item[0] or 0))
    lengths = ["none" if length is None else f"{length:,}" for length in cuts]
    rows = [
        [title, *(format_value(found[name].value, 0) for found in cuts.values())] for name, title in CUT_COUNTS.items()
    ]
    return table(["`max_length`", *lengths], rows)


def audit_columns() -> str:
    """Columns of `pairs.parquet`."""
    from sampo.audit.files import PARQUET_COLUMNS

    return table(["column", "meaning"], [[f"`{name}`", meaning] for name, meaning in PARQUET_COLUMNS.items()])


def lab_judged() -> str:
    """The lab's models judged by true quality and by length, from the records of benchmarks/lab_judged.py."""
    return _judged("lab_judged.jsonl", {"lab": "true quality", "longer": "a ruler"}, empty="lab")


def real_judged() -> str:
    """The real model's answers judged by a model and by length: benchmarks/real_model_judged.py."""
    judged = _judged(
        "real_model_judged.jsonl", {"implicit adapter": "the judge", "longer": "a ruler"}, empty="implicit adapter"
    )
    records = read("real_model_judged.jsonl")
    names = ("judge_accuracy", "agreement/accuracy")  # before and since `sampo judge --labelled`
    judges = {
        record.config.get("judge") or record.config["judged_by"]["name"]: record
        for record in records
        if record.name in names
    }
    accuracy = judges["implicit"]
    agrees = f"The judge agrees with human preferences on {100 * accuracy.value:.0f} % of {accuracy.n} held-out pairs."
    return f"{judged}\n\n{agrees} `{accuracy.command}`"


def _judged(file: str, judges: dict[str, str], empty: str) -> str:
    """Verbosity, and win rates by each judge, of each system."""
    cells: dict[str, dict[str, str]] = {}
    for record in read(file):
        if "system" not in record.config:  # a record of the judge, or of two systems
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
    rows = [[system, *(found.get(name, "") for name in columns)] for system, found in cells.items()]
    return table(["system", *columns.values()], rows)


def campaign() -> str:
    """Results of the runs that were killed, from the records of tests/support/kill_campaign.py."""
    runs: dict[str, dict[str, Record]] = {}
    for record in read("kill_campaign.jsonl"):
        runs.setdefault(record.command, {})[record.name] = record
    columns = {
        "kills": "kills",
        "kills_in_save": "of which during a save",
        "kills_before_training": "before the first step of a launch",
        "steps": "steps of the run",
        "steps_again": "repeated steps",
        "half_checkpoints": "incomplete checkpoints found",
        "differences": "differences",
    }
    rows = [[f"`{command}`", *(f"{numbers[name].value:.0f}" for name in columns)] for command, numbers in runs.items()]
    return table(["command", *columns.values()], rows)


def memory_formula() -> str:
    """Bytes of each trainable parameter, by engine."""
    from sampo.training.memory import ENGINES

    parts = ("weights", "gradients", "master", "adam", "copies")
    rows = []
    for name, engine in ENGINES.items():
        cells = []
        for part in parts:
            number = getattr(engine, part)
            cells.append(f"{number}{' / N' if number and part in engine.spread else ''}" if number else "")
        reference = 4 + 2 if not engine.spread else 2
        cells.append(f"{reference}{' / N' if 'reference' in engine.spread else ''}")
        rows.append([f"`{name}`", *cells])
    return table(["engine", *parts, "reference"], rows)


FITS_GB = 72.0  # leaves a tenth of an 80 GB GPU free


def memory() -> str:
    """Gigabytes per GPU of every model, engine and method."""
    from sampo.training.memory import (
        ENGINES,
        MEMORY_METHODS,
        MEMORY_REFERENCES,
        QLORA_ENGINES,
        SHAPES,
        gpu_bytes,
        machine_bytes,
    )

    blocks, titles = [], {"full": "All parameters", "lora": "LoRA", "qlora": "QLoRA"}
    for method in MEMORY_METHODS:
        rows = []
        for engine in QLORA_ENGINES if method == "qlora" else ENGINES:
            for reference in MEMORY_REFERENCES if method == "full" else MEMORY_REFERENCES[:1]:
                cells = []
                for shape in SHAPES.values():
                    size = sum(gpu_bytes(shape, engine, method, reference=reference).values()) / 1e9
                    text = f"{size:,.0f}" if size >= 10 else f"{size:.1f}"
                    cells.append(f"**{text}**" if size <= FITS_GB else text)
                rows.append([f"`{engine}`", *([reference] if method == "full" else []), *cells])
        if method != "qlora":
            cells = [f"{machine_bytes(shape, method) / 1e9:,.0f}" for shape in SHAPES.values()]
            live = ["live"] if method == "full" else []
            rows.append(["main memory of `zero3_offload`, all machines", *live, *cells])
        heads = ["engine", *(["reference"] if method == "full" else []), *SHAPES]
        blocks.append(f"**{titles[method]}**\n\n{table(heads, rows)}")
    return "\n\n".join(blocks)


def engines() -> str:
    """Largest difference of a loss from one process, from the last run of the tests that kept records."""
    last: dict[str, dict[str, Record]] = {}
    for record in read("engines.jsonl"):
        last.setdefault(record.config["engine"], {})[record.config["mode"]] = record
    first = next(iter(next(iter(last.values())).values()))
    modes = list(dict.fromkeys(mode for found in last.values() for mode in found))
    rows = [
        [engine, *(f"{found[mode].value:.0e}" if mode in found else "" for mode in modes)]
        for engine, found in last.items()
    ]
    versions = ", ".join(f"{name} {number}" for name, number in sorted(first.versions.items()))
    about = f"{first.n} steps, {first.config['processes']} processes on the CPU against one. `{first.command}`; "
    return "\n".join([about + f"{first.created[:10]}; {versions}.", "", table(["engine", *modes], rows)])


def families() -> str:
    """Which families of causal language models are packed, and the reason for each other one."""
    by_kind: dict[str, dict[str, list[str]]] = {}
    last = {(each.config["family"], each.name): each for each in read("families.jsonl")}
    largest: dict[str, float] = {}
    for (family, name), record in last.items():
        if record.value is not None:
            largest[name] = max(largest.get(name, 0.0), record.value)
        if name == "logps_difference_max":
            ways = by_kind.setdefault(record.config["kind"], {})
            ways.setdefault(record.config["way"], []).append(f"`{family}`")
    ways = by_kind["softmax attention"]
    n_packed, n_softmax = len(ways["packed"]), sum(map(len, ways.values()))
    others = {kind: sum(map(len, found.values())) for kind, found in by_kind.items() if kind != "softmax attention"}
    about = [
        f"Of {sum(others.values()) + n_softmax} families, {others.pop('skipped')} are not tried. Of the {n_softmax} "
        f"with softmax attention in every layer, {n_packed} ({100 * n_packed / n_softmax:.0f} %) are packed. "
        + " ".join(f"{number} have {kind}, and are not packed." for kind, number in others.items()),
        f"Largest difference between packed and padded: {largest['logps_difference_max']:.0e} nats for a log-prob, "
        f"and {largest['gradients_difference']:.0e} of the norm for all gradients. `{record.command}`; "
        f"{record.created[:10]}; transformers {record.versions['transformers']}.",
    ]
    rows = [
        [kind, way, str(len(names)), ", ".join(names)]
        for kind in sorted(by_kind, key=["softmax attention", *others, "skipped"].index)
        for way, names in by_kind[kind].items()
    ]
    return "\n\n".join([*about, table(["layers", "packed, or the reason", "number", "families"], rows)])


def merging() -> str:
    """What merging an adapter changes, from the records of benchmarks/merging.py."""
    import merging as measured

    return measured.table(read("merging.jsonl"))


def diagnosed() -> str:
    """Length pressure of a real model before training, from the records of `sampo diagnose`."""
    groups = ("all", "chosen longer", "chosen shorter")
    cells: dict[str, dict[str, str]] = {}
    for record in read("diagnose.jsonl"):
        if record.interval is None:
            raise ValueError(f"The record of {record.config['method']} must have an interval, got none.")
        low, high = record.interval
        group = f"{record.config['group']} ({record.n})"
        cells.setdefault(record.config["method"], {})[group] = f"{record.value:+.3f} ({low:+.3f} … {high:+.3f})"
    heads = [head for group in groups for head in next(iter(cells.values())) if head.startswith(f"{group} (")]
    rows = [[f"`{name}`", *(found[head] for head in heads)] for name, found in cells.items()]
    return "\n".join([f"`{record.command}`; {record.created[:10]}", "", table(["method", *heads], rows)])


STUDY_PARTS = (
    *("about", "summary", "verdicts", "details"),
    *("headline", "against_dpo", "forecast"),
    *("at_best", "equal_kl", "equal_win_rate", "frontiers", "biases", "penalties"),
)
REAL_SWEEP_PARTS = ("short_table", "forecast", "long_tables", "conclusions", "llmbar_table")
PARTS = {
    **{
        "claims": claims,
        "caption": caption,
        "methods": methods,
        "options": options,
        "old_options": old_options,
        "lab": lab,
        "speed": speed,
        "class_swap": class_swap,
        "benchmark": benchmark,
    },
    **{"package_diagram": package_diagram, "module_map": module_map},
    **{"campaign": campaign, "memory": memory, "memory_formula": memory_formula, "engines": engines},
    **{"coverage": coverage, "overlap": overlap, "hard_prompts": hard_prompts, "merging": merging},
    **{"style_coverage": style_coverage, "evaluation_scale": evaluation_scale},
    "families": families,
    **{"real_model": real_model, "lab_judged": lab_judged, "real_judged": real_judged, "diagnosed": diagnosed},
    **{"audit": audit, "audit_faults": audit_faults, "audit_cuts": audit_cuts, "audit_columns": audit_columns},
    **{f"study_{part}": partial(study, part) for part in STUDY_PARTS},
    **{f"real_sweep_{part}": partial(real_sweep, part) for part in REAL_SWEEP_PARTS},
    **{f"onpolicy_{part}": partial(onpolicy, part) for part in ("table", "verdicts")},
    **{f"piecewise_{part}": partial(piecewise, part) for part in ("table", "verdicts")},
    "onpolicy_real_model": onpolicy_real_model,
}
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end generated -->)", re.DOTALL)


def generated() -> dict[Path, str]:
    """Every file with a generated part, and what it must hold."""
    from command_pages import command_pages, train_help

    found = {}
    for path in [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        found[path] = BLOCK.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[3]}", old)
    from front import picture

    found[ROOT / "docs" / "lab" / "bars.svg"] = picture(_lab_lines())
    found[ROOT / "docs" / "lab" / "table.md"] = lab_table()
    found[ROOT / "sampo" / "commands" / "train_help.txt"] = train_help()
    return found | {ROOT / "docs" / "commands" / name: text for name, text in command_pages().items()}


def notebooks() -> dict[Path, str]:
    """Each notebook with its badge and the cell that installs sampo; none without nbformat and nbclient."""
    from importlib.util import find_spec

    if not (find_spec("nbformat") and find_spec("nbclient")):
        return {}
    import nbformat

    sys.path.insert(1, str(ROOT / "notebooks"))
    from execute import with_setup

    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    read = {path: nbformat.read(path, as_version=4) for path in paths}
    return {path: nbformat.writes(with_setup(notebook, path.name)) + "\n" for path, notebook in read.items()}


def stale_figures() -> dict[Path, str]:
    """Figures that differ from what the records give, as they should be; none without matplotlib."""
    from importlib.util import find_spec

    from figures import figures, same_drawing

    if not find_spec("matplotlib"):
        return {}
    drawn = figures(_study(), _lab_lines())
    return {path: new for path, new in drawn.items() if not path.is_file() or not same_drawing(path.read_text(), new)}


def main() -> None:
    """Fill every generated block of README and docs, and write the generated pages and figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    pages = {**generated(), **notebooks(), **stale_figures()}
    for path, text in pages.items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for path in sorted(set((ROOT / "docs" / "commands").glob("*.md")) - set(pages)):  # of a command that is gone
        stale.append(str(path.relative_to(ROOT)))
        if not check:
            path.unlink()
    if stale and check:
        sys.exit(f"{', '.join(stale)} must match the code, and do not: run `python docs/build.py`.")


if __name__ == "__main__":
    main()

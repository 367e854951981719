"""The sweeps on a real model: accuracy of their implicit rewards on LLMBar, and all records in one file.

    sampo sweep --config benchmarks/real_sweep.yaml --model_name_or_path FOLDER --dataset_name pairs/harmless \
        --out sweeps/harmless                 # and the same for pairs/alpaca_eval; see real_pairs.py
    python benchmarks/real_sweep.py --sweeps sweeps/harmless sweeps/alpaca_eval --llmbar llmbar.jsonl.gz \
        --out real_sweep.jsonl   # kept as measurements/real_sweep.jsonl.gz

LLMBar (arXiv 2310.07641) has objective labels, and in its adversarial subsets the worse answer is mostly the longer
one. Runs that are scored already are not scored again. The output is written anew from the finished runs.
`python docs/build.py` makes the tables of docs/results.md from it.
"""

import argparse
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sampo import load_preferences
from sampo.cli import main as sampo
from sampo.diagnostics.findings import PairScores, read_scores
from sampo.io import records as results
from sampo.io.files import write_atomic
from sampo.io.records import Record
from sampo.report.numbers import estimate, number
from sampo.stats.intervals import rate_interval
from sampo.sweep.conclusion import conclude
from sampo.sweep.lines import SWEEP_LEGEND, Lines, read_lines
from sampo.sweep.outcome import right_pairs
from sampo.sweep.plan import Sweep, SweepRun
from sampo.sweep.state import read_state_file
from sampo.sweep.table import duel_rows, method_rows

ALL = "all"
LONGER, SHORTER = "right one longer", "right one shorter"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=Path, nargs="+", required=True, help="folders of `sampo sweep`")
    parser.add_argument("--llmbar", type=Path, help="pairs with a column `subset`; not scored without it")
    parser.add_argument("--llmbar_seeds", type=int, help="score only so many runs of each method on LLMBar")
    parser.add_argument("--out", type=Path, required=True, help="file of all records")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    command = shlex.join(["python", "benchmarks/real_sweep.py", *(sys.argv[1:] if argv is None else argv)])
    subsets = np.array(load_preferences(str(args.llmbar))["subset"]) if args.llmbar else None
    found = []
    for folder in args.sweeps:
        state = read_state_file(folder)
        if state is None:
            raise SystemExit(f"real_sweep: {folder} must hold a sweep.")
        sweep = Sweep(folder, state.definition)
        data = {"data": folder.name}
        found += [replace(one, config={**one.config, **data}) for one in results.read(folder / "records.jsonl")]
        if subsets is not None:
            runs = [run for run in state.definition.runs if sweep.is_evaluated(run.name)]
            runs = first_seeds(runs, args.llmbar_seeds)
            score_llmbar(sweep, runs, args.llmbar)
            found += llmbar_records(sweep, runs, subsets, {**data, "experiment": "llmbar"}, command)
    write_atomic(args.out, results.lines(found))
    print("\n\n".join(part(found) for part in (short_table, long_tables, conclusions, llmbar_table, forecast)))


def first_seeds(runs: Sequence[SweepRun], most: int | None) -> list[SweepRun]:
    """Of each method the first `most` runs; all of them without a number."""
    seen: Counter[str] = Counter()
    kept = []
    for run in runs:
        seen[run.method] += 1
        if most is None or seen[run.method] <= most:
            kept.append(run)
    return kept


def score_llmbar(sweep: Sweep, runs: Sequence[SweepRun], llmbar: Path) -> None:
    """Implicit rewards of all runs on LLMBar by `sampo diagnose`, which continues what it has begun."""
    one = sweep.definition
    words = ["diagnose", "--reference", one.model, "--data", str(llmbar), "--out", str(sweep.folder / "llmbar")]
    words += ["--policy", *(str(sweep.run_folder(run.name)) for run in runs), "--text_as_messages"]
    words += ["--max_length", "0", "--dtype", one.settings["dtype"], "--ref_cache_dir", str(sweep.ref_cache)]
    print(f"$ {shlex.join(['sampo', *words, '--use_cpu'])}", flush=True)
    sampo([*words, "--use_cpu"])


def read_llmbar(sweep: Sweep, run: SweepRun) -> PairScores:
    """The scores of a run on LLMBar, in the order of the file."""
    found = [path for path in (sweep.folder / "llmbar" / "pairs").glob(f"{run.name}-*") if path.is_dir()]
    if len(found) != 1:
        raise SystemExit(f"real_sweep: {run.name} must have one folder of scores on LLMBar, got {len(found)}.")
    return read_scores(sorted(found[0].glob("*.parquet")))


def llmbar_records(
    sweep: Sweep, runs: Sequence[SweepRun], subsets: np.ndarray, config: dict[str, Any], command: str
) -> Iterator[Record]:
    """Accuracy of each method by subset, each pair's value the mean over the seeds."""
    methods: dict[str, list[SweepRun]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    for method, seeds in methods.items():
        scores = [read_llmbar(sweep, run) for run in seeds]
        right, difference = np.mean([right_pairs(one) for one in scores], axis=0), scores[0].difference
        groups = {ALL: np.full(len(right), True), LONGER: difference > 0, SHORTER: difference < 0}
        groups |= {name: subsets == name for name in sorted(set(subsets))}
        for name, inside in groups.items():
            one = rate_interval(right[inside])
            about = {"method": method, "title": seeds[0].title, "group": name, "seeds": [run.seed for run in seeds]}
            yield Record(
                name="llmbar/accuracy",
                value=one.value,
                n=one.n,
                interval=one.interval,
                config={**config, **about},
                command=command,
                **results.provenance(),
            )


# --- tables ----------------------------------------------------------------------------------------------------------


def lines_by_data(records: Sequence[Record]) -> dict[str, Lines]:
    """The lines of each sweep."""
    names = dict.fromkeys(record.config["data"] for record in records)
    return {
        data: read_lines([r for r in records if r.config["data"] == data and r.name.startswith("sweep/")])
        for data in names
    }


def long_tables(records: Sequence[Record]) -> str:
    """Of each sweep the table of its methods and their comparisons."""
    parts = []
    for data, lines in lines_by_data(records).items():
        commands = dict.fromkeys(
            r.command for r in records if r.config["data"] == data and r.name.startswith("sweep/")
        )
        tables = [_table(*rows) for rows in (method_rows(lines), duel_rows(lines)) if rows[1]]
        parts += [f"### Pairs `{data}`", *tables, "Measured by " + ", ".join(f"`{c}`" for c in commands) + "."]
    return "\n\n".join([*parts, SWEEP_LEGEND])


def conclusions(records: Sequence[Record]) -> str:
    """What each sweep decides, as `sampo sweep` says it."""
    return "\n\n".join(
        "\n".join([f"`{data}`:", "", *(f"- {sentence}" for sentence in conclude(lines))])
        for data, lines in lines_by_data(records).items()
    )


def short_table(records: Sequence[Record]) -> str:
    """Of each sweep and method: length against the start, ended, KL, and accuracy by length class."""
    heads = ["pairs", "method", "seeds", "pressure before", "length / start", "ended", "KL"]
    heads += ["accuracy", "chosen longer", "chosen shorter"]
    llmbar = {
        (r.config["data"], r.config["method"]): _plain(number(estimate(r), "%"))
        for r in records
        if r.name == "llmbar/accuracy" and r.config["group"] == ALL
    }
    names = ("pressure", "tokens_ratio", "ended", "kl", "accuracy", "accuracy_longer", "accuracy_shorter")
    rows = []
    for data, lines in lines_by_data(records).items():
        rows.append([f"`{data}`", "start", "", "", "", _plain(lines.start.cell("ended")), *[""] * (4 + bool(llmbar))])
        for line in lines.methods:
            cells = [_plain(line.cell(name)) if name != "tokens_ratio" else line.cell(name) for name in names]
            rows.append([f"`{data}`", line.config["title"], str(line.seeds), *cells])
            if llmbar:
                rows[-1].append(llmbar.get((data, line.config["method"]), "–"))
    return _table([*heads, "LLMBar"] if llmbar else heads, rows)


def _plain(cell: str) -> str:
    return re.sub(r" \(.*\)", "", cell)


def llmbar_table(records: Sequence[Record]) -> str:
    """Accuracy on LLMBar by method and group."""
    found: dict[tuple[str, str, int], dict[str, str]] = {}
    for record in records:
        if record.name == "llmbar/accuracy":
            config = record.config
            row = found.setdefault((config["data"], config["title"], len(config["seeds"])), {})
            row[f"{config['group']} ({record.n})"] = number(estimate(record), "%")
    if not found:
        return "LLMBar has not been scored yet."
    groups = list(next(iter(found.values())))
    rows = [[f"`{data}`", title, str(seeds), *cells.values()] for (data, title, seeds), cells in found.items()]
    return _table(["trained on", "method", "seeds", *groups], rows)


def forecast(records: Sequence[Record]) -> str:
    """How well the pressure before training orders the methods by the length of their answers."""
    from scipy.stats import spearmanr

    parts = []
    for data, lines in lines_by_data(records).items():
        points = [
            (line.get("pressure").value, line.get("tokens_ratio").value)
            for line in lines.methods
            if line.get("pressure").value is not None and line.get("tokens_ratio").value is not None
        ]
        if len(points) >= 4:
            before, after = zip(*points, strict=True)
            rho = float(spearmanr(before, after).statistic)
            parts.append(f"{rho:+.2f} over the {len(points)} methods on `{data}`")
    if not parts:
        return "Too few methods are finished."
    return f"Rank correlation of the pressure before training with the length against the start: {'; '.join(parts)}."


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


if __name__ == "__main__":
    main()

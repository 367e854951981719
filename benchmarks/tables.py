"""Tables of what `step_time.py` recorded. Nothing here is heavier than reading a file."""

import json
from dataclasses import dataclass, field
from statistics import median

from sampo.io.records import Record

OF_A_PART = ("side", "repeat", "group")
# (what, better side, other side, the least that it must be times better)
TARGETS = (
    ("step with live reference, against TRL", "SamPO, stream", "TRL", 8.0),
    ("step with cached reference, against TRL", "SamPO, stream, reference cached", "TRL", 12.0),
    ("step with live reference, against TRL with compact head", "SamPO, stream", "TRL, compact head", 2.5),
    (
        "step with cached reference, against TRL with compact head",
        "SamPO, stream, reference cached",
        "TRL, compact head",
        3.5,
    ),
    ("`sampo` against `all` on the same path (1 % slower at most)", "SamPO, stream", "DPO, stream", 1 / 1.01),
)
MEMORY_TARGET = ("SamPO, stream", "TRL", 0.5)
README_SIDES = {
    "TRL": "TRL `DPOTrainer`",
    "TRL, compact head": "TRL, head on labelled tokens only",
    "authors' SamPO loss": "the authors' SamPO loss",
    "SamPO, stream": "sampo, live reference",
    "SamPO, stream, reference cached": "sampo, cached reference",
}


@dataclass
class Run:
    """All numbers of one setting that one commit measured.

    Attributes:
        setting: what all sides share.
        last: the newest record.
        commands: those that measured it.
        sides: side -> name of a number -> the number; `seconds` by repeat, `group_seconds` by group.
        device: numbers that belong to no side.
    """

    setting: dict
    last: Record
    commands: list[str] = field(default_factory=list)
    sides: dict[str, dict] = field(default_factory=dict)
    device: dict[str, float] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        self.last = record
        if record.command not in self.commands:
            self.commands.append(record.command)
        side, part = record.config.get("side"), record.config.get("repeat", record.config.get("group"))
        numbers = self.device if side is None else self.sides.setdefault(side, {})
        if part is None:
            numbers[record.name] = record.value
        else:
            numbers.setdefault(record.name, {})[part] = record.value

    @property
    def timed(self) -> list[str]:
        return [side for side, numbers in self.sides.items() if "seconds" in numbers]

    def speeds(self, side: str) -> list[float]:
        """Pairs per second of each repeat, slowest first."""
        pairs = self.setting["batch"] * self.setting["batches"]
        return sorted(pairs / seconds for seconds in self.sides[side]["seconds"].values())

    def ratio(self, side: str, base: str) -> tuple[float, float, float] | None:
        """How many times as fast a side is: median, lowest and highest over the repeats that both have."""
        ours, theirs = (self.sides.get(name, {}).get("seconds", {}) for name in (side, base))
        ratios = sorted(theirs[i] / ours[i] for i in ours.keys() & theirs.keys())
        return (median(ratios), ratios[0], ratios[-1]) if ratios else None

    def repeats(self, *sides: str) -> int:
        """Of all these sides."""
        return min(len(self.sides.get(side, {}).get("seconds", ())) for side in sides)


def runs(records: list[Record]) -> list[Run]:
    """One run per setting: of the commits that measured it the one with the most sides, and of these the last."""
    return [max(several, key=lambda run: (len(run.sides), run.last.created)) for several in _by_setting(records)]


def _by_setting(records: list[Record]) -> list[list[Run]]:
    """For each setting the runs of all commits that measured it."""
    found: dict[str, dict[str | None, Run]] = {}
    for record in records:
        setting = {name: value for name, value in record.config.items() if name not in OF_A_PART}
        if setting.get("benchmark") == "step_time":
            by_commit = found.setdefault(json.dumps(setting, sort_keys=True), {})
            by_commit.setdefault(record.commit, Run(setting, record)).add(record)
    return [list(by_commit.values()) for by_commit in found.values()]


def times(ratio: tuple[float, float, float] | None) -> str:
    if ratio is None:
        return "–"
    digits = 2 if ratio[0] < 3 else 1
    return f"{ratio[0]:.{digits}f} ×"


def about(run: Run) -> str:
    """The setting in words, with command, date and versions."""
    s = run.setting
    versions = ", ".join(f"{name} {number}" for name, number in sorted(run.last.versions.items()))
    commands = ", ".join(f"`{command}`" for command in run.commands)
    measured = f"{run.last.created[:10]}, commit {(run.last.commit or 'unknown')[:7]}"
    data = s["data"] if s["data"] != "random words" else f"random words, shape {s['shape']}"
    return (
        f"{s['model']}, {s['dtype']}, {s['device']}, {s['threads']} thread(s), batch of {s['batch']} pairs, "
        f"{s['batches']} batch(es), {data}, max_length {s['max_length']}. "
        f"{commands}; {measured}; {versions}."
    )


def sides_table(run: Run) -> list[str]:
    """All that is known of each side."""
    bases = [base for base in ("TRL", "TRL, compact head") if base in run.timed]
    peak = run.device.get("peak_flops")
    heads = ["side", "repeats", "pairs/s (lowest to highest)", *(f"× {base}" for base in bases)]
    heads += ["peak memory, GiB", "added, GiB", "tokens: backbone", "head", *(["utilisation"] if peak else [])]
    lines = [row(heads), row(["---"] * len(heads))]
    for side, numbers in run.sides.items():
        cells = [side, str(len(numbers.get("seconds", ()))), "–", *(["–"] * len(bases))]
        if side in run.timed:
            speeds = run.speeds(side)
            cells[2] = f"{median(speeds):.3g} ({speeds[0]:.3g} to {speeds[-1]:.3g})"
            cells[3:] = [times(run.ratio(side, base)) for base in bases]
        for name in ("peak_memory_gib", "added_memory_gib"):
            cells.append(f"{numbers[name]:.2f}" if name in numbers else "–")
        for name in ("backbone_tokens", "head_tokens"):
            cells.append(f"{numbers[name]:,.0f}" if name in numbers else "–")
        if peak:
            useful = side in run.timed and "useful_flops" in numbers
            share = numbers["useful_flops"] / median(numbers["seconds"].values()) / peak if useful else 0.0
            cells.append(f"{share:.1%}" if useful else "–")
        lines.append(row(cells))
    return lines


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main_run(all_runs: list[Run]) -> Run | None:
    """The run for the targets: real pairs on a CPU; the largest batch, then the newest."""
    real = [run for run in all_runs if run.timed and run.setting["data"] != "random words" and is_cpu(run)]
    real = [run for run in real if "purpose" not in run.setting]
    return max(real, key=lambda run: (run.setting["batch"], run.last.created), default=None)


def is_cpu(run: Run) -> bool:
    return run.setting["device"].endswith("(CPU)")


def targets_table(run: Run, records: list[Record]) -> list[str]:
    """What was wanted, and what came out of the commit that repeated both sides of a ratio most often."""
    (same,) = (several for several in _by_setting(records) if several[0].setting == run.setting)
    lines = [row(["target", "wanted", "measured (lowest to highest)", "repeats, commit", "met"]), row(["---"] * 5)]
    for what, side, base, wanted in TARGETS:
        best = max(same, key=lambda one: (one.repeats(side, base), one.last.created))
        ratio = best.ratio(side, base)
        measured = f"{ratio[0]:.2f} × ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else "not measured"
        source = f"{best.repeats(side, base)}, {(best.last.commit or 'unknown')[:7]}" if ratio else "–"
        met = "–" if ratio is None else "yes" if ratio[0] >= wanted else "no"
        lines.append(row([what, f"≥ {wanted:.2f} ×", measured, source, met]))
    side, base, wanted = MEMORY_TARGET
    peaks = [run.sides.get(name, {}).get("peak_memory_gib") for name in (side, base)]
    share = peaks[0] / peaks[1] if all(peaks) else None
    measured = "not measured" if share is None else f"{share:.2f} ×"
    met = "–" if share is None else "yes" if share <= wanted else "no"
    source = f"1, {(run.last.commit or 'unknown')[:7]}"
    return [*lines, row([f"peak memory, {side} against {base}", f"≤ {wanted:.2f} ×", measured, source, met])]


def profile_table(run: Run) -> list[str]:
    """Share of the operations' time by groups; columns are sides."""
    sides = {side: numbers["group_seconds"] for side, numbers in run.sides.items() if "group_seconds" in numbers}
    groups = sorted(
        {g for shares in sides.values() for g in shares}, key=lambda g: -sum(s.get(g, 0) for s in sides.values())
    )
    lines = [row(["group of operations", *sides]), row(["---"] * (1 + len(sides)))]
    for group in groups:
        shares = [f"{s.get(group, 0):.2f} s, {s.get(group, 0) / sum(s.values()):.0%}" for s in sides.values()]
        lines.append(row([group, *shares]))
    return [*lines, row(["sum", *(f"{sum(s.values()):.2f} s" for s in sides.values())])]


def sweep_tables(all_runs: list[Run]) -> list[str]:
    """One table for each thing that was varied."""
    varied = {"length difference": "shape", "batch": "batch", "model": "model"}
    lines: list[str] = []
    for sweep, name in varied.items():
        found = [run for run in all_runs if run.setting.get("purpose") == sweep and run.timed]
        if not found:
            continue
        sides = list(dict.fromkeys(side for run in found for side in run.timed))
        heads = [name, *(f"{side}, pairs/s" for side in sides), *(f"{side}, × TRL" for side in sides[1:])]
        lines += [f"Varied: {sweep}. {about(found[-1])}", "", row(heads), row(["---"] * len(heads))]
        for run in found:
            speeds = [f"{median(run.speeds(side)):.3g}" if side in run.timed else "–" for side in sides]
            ratios = [times(run.ratio(side, "TRL")) for side in sides[1:]]
            lines.append(row([str(run.setting[name]), *speeds, *ratios]))
        lines.append("")
    return lines[:-1]


def readme_table(records: list[Record]) -> str:
    """The few sides that a reader wants first."""
    run = main_run(runs(records))
    if run is None:
        return "Not measured yet."
    heads = ["forward and backward pass", "pairs/s", "× TRL", "peak memory, GiB"]
    lines = [row(heads), row(["---"] * len(heads))]
    for side, title in README_SIDES.items():
        if side not in run.timed:
            lines.append(row([title, "not measured", "–", "–"]))
            continue
        peak = run.sides[side].get("peak_memory_gib")
        speed = f"{median(run.speeds(side)):.3g}"
        lines.append(row([title, speed, times(run.ratio(side, "TRL")), "–" if peak is None else f"{peak:.2f}"]))
    s = run.setting
    text = (
        f"{s['model']}, {s['dtype']}, {s['threads']} CPU thread(s), {s['batches']} batch(es) of {s['batch']} HH-RLHF "
        f"pairs, median of {len(run.sides[run.timed[0]]['seconds'])} repeats."
    )
    return "\n".join([*lines, "", text])


def results_tables(records: list[Record]) -> str:
    """All of RESULTS.md that is numbers."""
    all_runs = runs(records)
    lines: list[str] = []
    if main := main_run(all_runs):
        lines += ["### Targets", "", about(main), "", *targets_table(main, records), ""]
    for run in all_runs:
        if run.timed and "purpose" not in run.setting:
            lines += [f"### {run.setting['model']}, {run.setting['shape']}", "", about(run), "", *sides_table(run), ""]
    if sweeps := sweep_tables(all_runs):
        lines += ["### How the cost grows", "", *sweeps, ""]
    for run in all_runs:
        if any("group_seconds" in numbers for numbers in run.sides.values()):
            lines += ["### Where the time goes", "", about(run), "", *profile_table(run), ""]
    return "\n".join(lines[:-1] or ["Nothing is recorded."])


def class_swap_table(records: list[Record], setting: dict) -> list[str]:
    """Pairs per second of each side through `train()`, against TRL and against the limit."""
    found = [r for r in records if setting.items() <= r.config.items()]
    seconds: dict[str, list[float]] = {}
    for record in found:
        if record.name == "seconds":
            seconds.setdefault(record.config["side"], []).append(record.value)
    heads = ["side", "pairs/s"]
    lines = [row(heads), row(["---"] * len(heads))]
    for side, values in seconds.items():
        lines.append(row([side, f"{setting['batch'] * setting['batches'] / median(values):.3g}"]))
    return lines

"""Tables of what `step_time.py` recorded. Nothing here is heavier than reading a file."""

import json
from dataclasses import dataclass, field
from statistics import median

from sampo.io.records import Record

OF_A_PART = ("side", "repeat", "group")


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


def runs(records: list[Record]) -> list[Run]:
    """One run per setting: of the commits that measured it the one with the most sides, and of these the last."""
    found: dict[str, dict[str | None, Run]] = {}
    for record in records:
        setting = {name: value for name, value in record.config.items() if name not in OF_A_PART}
        if setting.get("benchmark") == "step_time":
            by_commit = found.setdefault(json.dumps(setting, sort_keys=True), {})
            by_commit.setdefault(record.commit, Run(setting, record)).add(record)
    return [max(each.values(), key=lambda run: (len(run.sides), run.last.created)) for each in found.values()]


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


def results_tables(records: list[Record]) -> str:
    """All of RESULTS.md that is numbers."""
    all_runs = runs(records)
    lines: list[str] = []
    for run in all_runs:
        if run.timed and "purpose" not in run.setting:
            lines += [f"### {run.setting['model']}, {run.setting['shape']}", "", about(run), "", *sides_table(run), ""]
    if sweeps := sweep_tables(all_runs):
        lines += ["### How the cost grows", "", *sweeps, ""]
    for run in all_runs:
        if any("group_seconds" in numbers for numbers in run.sides.values()):
            lines += ["### Where the time goes", "", about(run), "", *profile_table(run), ""]
    return "\n".join(lines[:-1] or ["Nothing is recorded."])


# --- class_swap.py ---------------------------------------------------------------------------------------------------

CACHED = ", reference cached"
BASES = ("TRL", "TRL, compact head", "limit")
# (side, base, the least that it must be times as fast)
TARGETS = (
    ("SamPO", "TRL", 9.0),
    ("SamPO" + CACHED, "TRL", 11.0),
    ("SamPO", "TRL, compact head", 4.0),
    ("SamPO" + CACHED, "TRL, compact head", 5.0),
    ("SamPO", "limit", 0.8),
    ("SamPO" + CACHED, "limit" + CACHED, 0.8),
)
SWAPPED = {
    "TRL": "TRL `DPOTrainer`",
    "TRL, compact head": "TRL, head on labelled tokens only",
    "SamPO": "sampo",
}


@dataclass
class Swap:
    """All numbers of one setting of `class_swap.py` that one commit measured.

    Attributes:
        setting: what all sides share.
        last: the newest record.
        seconds: side -> repeat -> seconds.
        memory: side -> repeat -> peak in GiB.
    """

    setting: dict
    last: Record
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    memory: dict[str, dict[int, float]] = field(default_factory=dict)

    def speed(self, side: str) -> float | None:
        """Pairs per second, the median over the repeats."""
        found = self.seconds.get(side)
        return self.setting["batch"] * self.setting["batches"] / median(found.values()) if found else None

    def ratio(self, side: str, base: str) -> tuple[float, float, float] | None:
        """How many times as fast a side is as another: of the medians, with the lowest and highest quotient."""
        ours, theirs = self.seconds.get(side), self.seconds.get(base)
        if not ours or not theirs:
            return None
        quotients = sorted(theirs[i] / ours[i] for i in ours.keys() & theirs.keys())
        return median(theirs.values()) / median(ours.values()), quotients[0], quotients[-1]


def swaps(records: list[Record]) -> list[Swap]:
    """One per setting: of the commits that measured it the one with the most sides, and of these the last."""
    found: dict[str, dict[str | None, Swap]] = {}
    for record in records:
        if record.config.get("benchmark") != "class_swap":
            continue
        setting = {name: value for name, value in record.config.items() if name not in OF_A_PART}
        by_commit = found.setdefault(json.dumps(setting, sort_keys=True), {})
        swap = by_commit.setdefault(record.commit, Swap(setting, record))
        swap.last = record
        part = {"seconds": swap.seconds, "peak_memory_gib": swap.memory}.get(record.name)
        if part is not None:
            part.setdefault(record.config["side"], {})[record.config["repeat"]] = record.value
    return [max(each.values(), key=lambda s: (len(s.seconds), s.last.created)) for each in found.values()]


def class_swap_table(swap: Swap) -> list[str]:
    """Each side against TRL, TRL with a compact head and the limit, with the reference as live as its own."""
    heads = ["side", "pairs/s", *(f"× {base}" for base in BASES[:2]), "of the limit", "peak memory, GiB"]
    lines = [row(heads), row(["---"] * len(heads))]
    for side in swap.seconds:
        cached = CACHED if side.endswith(CACHED) else ""
        # a cache is what sampo adds: its step is compared with TRL's step with a live reference too
        ratios = [swap.ratio(side, base + ("" if side.startswith("SamPO") else cached)) for base in BASES[:2]]
        limit = swap.ratio(side, "limit" + cached)
        memory = swap.memory.get(side)
        cells = [f"{swap.speed(side):.3g}", *map(times, ratios), f"{limit[0]:.0%}" if limit else "–"]
        lines.append(row([side, *cells, f"{max(memory.values()):.2f}" if memory else "–"]))
    return lines


def about_swap(swap: Swap) -> str:
    """The setting in words."""
    s = swap.setting
    data = f"pairs of {s['data']}" if s["data"] != "random words" else f"pairs of random words, shape {s['shape']}"
    repeats = max(len(each) for each in swap.seconds.values())
    return (
        f"{s['model']}, {s['device']}, {s['threads']} thread(s), {s['batches']} shuffled batches of {s['batch']} "
        f"{data}, max_length {s['max_length']}, all other options at their defaults, median of {repeats} run(s). "
        f"`{swap.last.command}`; {swap.last.created[:10]}, commit {(swap.last.commit or 'unknown')[:7]}"
    )


def targets_table(swap: Swap) -> list[str]:
    """What was wanted, and what came out."""
    lines = [row(["target", "wanted", "measured", "met"]), row(["---"] * 4)]
    for side, base, wanted in TARGETS:
        if (ratio := swap.ratio(side, base)) is not None:
            cells = [f"{side} against {base}", f"≥ {wanted:g} ×", f"{ratio[0]:.2f} ×"]
            lines.append(row([*cells, "yes" if ratio[0] >= wanted else "no"]))
    return lines


def swap_tables(records: list[Record]) -> str:
    """All settings."""
    lines: list[str] = []
    for swap in swaps(records):
        lines += [f"### {swap.setting['model']}, {swap.setting['shape']}", "", about_swap(swap) + ".", ""]
        lines += [*class_swap_table(swap), ""]
        if swap.setting["data"] != "random words":
            lines += [*targets_table(swap), ""]
    return "\n".join(lines[:-1] or ["Not measured yet."])


def newest_real_swap(records: list[Record]) -> Swap | None:
    """Of the settings with real pairs the one with the most sides, and of these the newest; None before the first."""
    real = [swap for swap in swaps(records) if swap.setting["data"] != "random words"]
    return max(real, key=lambda each: (len(each.seconds), each.last.created), default=None)


def readme_swap(records: list[Record]) -> str:
    """The few sides that a reader wants first."""
    swap = newest_real_swap(records)
    if swap is None:
        return "Not measured yet."
    heads = ["`trainer.train()` with", "pairs/s", "× TRL", "peak memory, GiB"]
    lines = [row(heads), row(["---"] * len(heads))]
    for side, title in SWAPPED.items():
        for name, words in (("", "live reference"), (CACHED, "cached reference")):
            if (speed := swap.speed(side + name)) is None:
                continue
            memory = swap.memory[side + name]
            cells = [f"{title}, {words}", f"{speed:.3g}", times(swap.ratio(side + name, "TRL"))]
            lines.append(row([*cells, f"{max(memory.values()):.2f}"]))
    return "\n".join([*lines, "", about_swap(swap) + "."])

"""README's first screen: the picture and the four claims, each from the records of measurements/."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sampo.io.records import Record
    from sampo.lab.report import Line

GROUP = "all"  # mixed pairs: the chosen response is the longer one in most of them, not in all
SHOWN = {"sft": "the start", "dpo": "DPO", "sampo": "SamPO", "sampo_rejected_learned": "one-sided + learned"}
PANELS = (("tokens", "tokens per answer", "{:.1f}"), ("win_rate", "win rate against the start", "{:.2f}"))
COLOURS = {"sft": "#9aa0a6", "dpo": "#d9822b", "sampo": "#3f7fbf", "sampo_rejected_learned": "#2f9e77"}
NAMES, BAR, GAP, ROW, TOP = 150, 250, 70, 34, 56  # widths and heights in pixels


def picture(lines: Sequence["Line"]) -> str:
    """Two panels of bars: the length of answers and the win rate, of the start and of three methods."""
    found = {line.method: line for line in lines if line.group in (GROUP, "")}
    width, height = NAMES + len(PANELS) * (BAR + GAP), TOP + len(SHOWN) * ROW + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'role="img" font-family="system-ui, sans-serif" font-size="13" fill="#202124">',
        "<title>Tokens per answer and win rate after training on mixed pairs, in the lab</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>',
    ]
    for number, (name, title, form) in enumerate(PANELS):
        left = NAMES + number * (BAR + GAP)
        parts.append(f'<text x="{left}" y="30" font-weight="600">{escape(title)}</text>')
        largest = max(_mean(found[method], name) for method in SHOWN)
        for row, method in enumerate(SHOWN):
            value, y = _mean(found[method], name), TOP + row * ROW
            size = round(BAR * value / largest, 1)
            parts.append(f'<rect x="{left}" y="{y}" width="{size}" height="20" rx="3" fill="{COLOURS[method]}"/>')
            parts.append(f'<text x="{left + size + 6:.1f}" y="{y + 15}">{form.format(value)}</text>')
    for row, (method, title) in enumerate(SHOWN.items()):
        weight = ' font-weight="600"' if method == "sampo_rejected_learned" else ""
        parts.append(f'<text x="{NAMES - 12}" y="{TOP + row * ROW + 15}" text-anchor="end"{weight}>{title}</text>')
    return "\n".join([*parts, "</svg>", ""])


def caption(lines: Sequence["Line"]) -> str:
    """What the picture shows, and how sure it is."""
    dpo = next(line for line in lines if (line.group, line.method) == (GROUP, "dpo"))
    seeds = len(dpo.values("tokens"))
    return (
        f"`sampo lab` on a CPU, mixed pairs, {seeds} seeds: a tiny model in a small world whose answers have a known "
        "quality. A real model is the subject of [results](docs/results.md)."
    )


def claims(lines: Sequence["Line"], swap: Any, forecast: Any, coverage: Sequence["Record"]) -> str:
    """Four bullets: length at equal win rate, speed, forecast, evaluation.

    Args:
        lines: of the lab.
        swap: the newest class swap on real pairs (`tables.swaps`).
        forecast: rank correlation of the length pressure with the change in length (`studies.analysis.prediction`).
        coverage: records of benchmarks/interval_coverage.py.
    """
    from tables import CACHED, times

    of = {line.method: line for line in lines if line.group == GROUP}
    cell = {(method, name): of[method].cell(name) for method in ("dpo", "sampo") for name in ("tokens", "win_rate")}
    live, cached = (swap.ratio(side, "TRL") for side in ("SamPO", f"SamPO{CACHED}"))
    assert forecast is not None
    shares = [100 * record.value for record in coverage if record.value is not None]
    shorter = (
        f"- **Shorter at an equal win rate.** On mixed pairs in the lab SamPO answers with {cell['sampo', 'tokens']} "
        f"tokens and DPO with {cell['dpo', 'tokens']}, at win rates of {cell['sampo', 'win_rate']} and "
        f"{cell['dpo', 'win_rate']}."
    )
    faster = (
        f"- **{times(live)} as fast as TRL by a class swap**, {times(cached)} with a cached reference "
        "([CPU, real pairs](benchmarks/RESULTS.md); no GPU measured yet). Packed rows, each prompt computed once."
    )
    known = (
        "- **A forecast before training.** `sampo diagnose` computes the length pressure of every method. Its rank "
        f"correlation with the change in length is {forecast.mean:.2f} [{forecast.low:.2f}, {forecast.high:.2f}] over "
        "[the study's runs](docs/results.md)."
    )
    judged = (
        "- **Evaluation with controls.** Both orders, ties, failures, the win rate at equal length, those of the "
        f"longer and of an empty answer. The 95 % intervals cover {min(shares):.1f} to {max(shares):.1f} % "
        "[in simulations](docs/evaluation.md)."
    )
    return "\n".join([shorter, faster, known, judged])


def _mean(line: "Line", name: str) -> float:
    mean = line.mean(name)
    assert mean is not None
    return mean

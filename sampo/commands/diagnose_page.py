"""What `sampo diagnose` says of one or several checkpoints: tables on one page, and a sentence for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..diagnostics import PLAIN, Finding
from ..evaluation.intervals import FEW, Estimate

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Checkpoint:
    """A policy by its short name, and what was found of it."""

    name: str
    findings: list[Finding]

    def of(self, quantity: str, **labels: object) -> list[Finding]:
        """The findings of a quantity that have these labels."""
        found = [finding for finding in self.findings if finding.quantity == quantity]
        return [f for f in found if all(f.labels.get(name) == value for name, value in labels.items())]

    def one(self, quantity: str, **labels: object) -> Estimate | None:
        """The estimate with these labels, if there is one."""
        found = self.of(quantity, **labels)
        return found[0].estimate if found else None


def show(page: Sequence[Checkpoint]) -> None:
    """Print everything."""
    from rich.console import Console

    console = Console()
    for table in tables(page):
        console.print(table)
    for checkpoint in page:
        console.print(sentence(checkpoint), soft_wrap=True, highlight=False, markup=False)


def tables(page: Sequence[Checkpoint]) -> list["Table"]:
    """The tables that the findings are enough for."""
    made = [_pressures(page)]
    if any(checkpoint.of("accuracy") for checkpoint in page):
        made += [_margins(page), _rewards(page), _log_ratios(page)]
    return made


def cell(estimate: Estimate | None, digits: int = 3) -> str:
    """Value and half the width of its interval, or both bounds where they are not alike."""
    if estimate is None or estimate.value is None:
        return "–"
    value = f"{estimate.value:+.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} ({estimate.low:+.{digits}f} … {estimate.high:+.{digits}f})"


def share(estimate: Estimate | None) -> str:
    """A share in per cent with its interval."""
    if estimate is None or estimate.value is None:
        return "–"
    bounds = "" if estimate.low is None or estimate.high is None else f" ({estimate.low:.0%} … {estimate.high:.0%})"
    return f"{estimate.value:.0%}{bounds}"


def _table(title: str, heads: Sequence[str]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < 2 else "right", overflow="fold")
    return table


def _pressures(page: Sequence[Checkpoint]) -> "Table":
    groups = list(dict.fromkeys(f.labels["group"] for c in page for f in c.of("pressure")))
    table = _table(
        "Length pressure: below 0, training lengthens (mean over pairs, 95 % interval)",
        ["checkpoint", "method", *groups],
    )
    for checkpoint in page:
        for method in dict.fromkeys(f.labels["method"] for f in checkpoint.of("pressure")):
            found = [checkpoint.one("pressure", method=method, group=group) for group in groups]
            table.add_row(checkpoint.name, method, *map(cell, found))
        prompts = [checkpoint.one("pressure", method=PLAIN, group=group) for group in groups]
        table.add_row(
            checkpoint.name, "prompts", *(str(each.n) if each else "–" for each in prompts), end_section=True
        )
    return table


def _margins(page: Sequence[Checkpoint]) -> "Table":
    groups = list(dict.fromkeys(f.labels["group"] for c in page for f in c.of("accuracy")))
    partial = any(c.of("margin_partial") for c in page)
    heads = ["checkpoint", "method", *groups, "corr(margin, T_w - T_l)", *["at equal quality"] * partial]
    table = _table("Margins: share above 0 by lengths, and how much of them is length", heads)
    for checkpoint in page:
        for method in dict.fromkeys(f.labels["method"] for f in checkpoint.of("accuracy")):
            shares = [share(checkpoint.one("accuracy", method=method, group=group)) for group in groups]
            names = ["margin_correlation", *["margin_partial"] * partial]
            table.add_row(
                checkpoint.name, method, *shares, *(cell(checkpoint.one(name, method=method), 2) for name in names)
            )
        table.add_section()
    return table


def _rewards(page: Sequence[Checkpoint]) -> "Table":
    table = _table(
        "Implicit reward (plain sums) of responses by their length in tokens", ["checkpoint", "tokens", "reward"]
    )
    for checkpoint in page:
        for finding in checkpoint.of("reward"):
            table.add_row(checkpoint.name, f"{finding.labels['from']}–{finding.labels['to']}", cell(finding.estimate))
        slope, explained = checkpoint.one("reward_slope"), checkpoint.one("reward_r2")
        table.add_row(checkpoint.name, "slope per 100 tokens", cell(slope))
        table.add_row(checkpoint.name, "share explained (R²)", share(explained), end_section=True)
    return table


def _log_ratios(page: Sequence[Checkpoint]) -> "Table":
    table = _table("Mean log-ratio of a token, nats", ["checkpoint", "tokens", "chosen", "rejected"])
    for checkpoint in page:
        kinds = dict.fromkeys(f.labels["class"] for f in checkpoint.of("log_ratio_of"))
        for kind in kinds:
            sides = [checkpoint.one("log_ratio_of", side=side, **{"class": kind}) for side in ("chosen", "rejected")]
            table.add_row(checkpoint.name, kind, *map(cell, sides))
        for low, high in dict.fromkeys((f.labels["from"], f.labels["to"]) for f in checkpoint.of("log_ratio_at")):
            sides = [checkpoint.one("log_ratio_at", side=side, **{"from": low}) for side in ("chosen", "rejected")]
            table.add_row(checkpoint.name, f"place {low}–{high}" if high > low else f"place {low}", *map(cell, sides))
        table.add_section()
    return table


def sentence(checkpoint: Checkpoint) -> str:
    """What the numbers say, and what they do not."""
    parts = [f"{checkpoint.name}: {_pressure_in_words(checkpoint)}"]
    correlation, slope = checkpoint.one("margin_correlation", method=PLAIN), checkpoint.one("reward_slope")
    longer, shorter = (checkpoint.one("accuracy", method=PLAIN, group=f"chosen {g}") for g in ("longer", "shorter"))
    if checkpoint.of("accuracy") and (correlation is None or correlation.value is None):
        parts.append("All its margins, or all differences of length, are alike: nothing can be said of length there.")
    elif correlation is not None and correlation.value is not None:
        explained = checkpoint.one("margin_r2", method=PLAIN)
        words = f"The difference of lengths explains {share(explained)} of the variance of its margins"
        if slope is not None and slope.value is not None:
            words += f", 100 tokens more change a response's reward by {cell(slope)}"
        if longer is not None and shorter is not None:
            words += (
                f", and it is right about {share(longer)} of the pairs whose chosen response is longer and "
                f"{share(shorter)} of those where it is shorter"
            )
        parts.append(words + ".")
    n = checkpoint.of("pressure")[0].estimate.n
    if n < FEW:
        parts.append(f"These are {n} prompts: below {FEW}, intervals are only a hint.")
    return " ".join(parts)


def _pressure_in_words(checkpoint: Checkpoint) -> str:
    signs: dict[str, list[str]] = {"lengthens": [], "shortens": [], "is not told from 0": []}
    for finding in checkpoint.of("pressure", group="all"):
        interval = finding.estimate.interval
        if interval is None or interval[0] <= 0 <= interval[1]:
            signs["is not told from 0"].append(finding.labels["method"])
        else:
            signs["lengthens" if interval[1] < 0 else "shortens"].append(finding.labels["method"])
    told = [f"{word}: {', '.join(names)}" for word, names in signs.items() if names]
    return f"by the length pressure over all pairs, training on them {'; '.join(told)}."

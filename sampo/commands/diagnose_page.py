"""The page of `sampo diagnose` for one or several checkpoints: tables, and a sentence for each."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..diagnostics.findings import PLAIN, Finding
from ..io.tables import Table
from ..stats.intervals import FEW, Estimate
from . import shown


@dataclass(frozen=True)
class Checkpoint:
    """A policy by its short name, and its findings."""

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


def show_page(page: Sequence[Checkpoint]) -> None:
    """Print everything."""
    shown.show(*tables(page))
    shown.say(*map(sentence, page))


def tables(page: Sequence[Checkpoint]) -> list[Table]:
    """The tables for which there are findings."""
    rewarded = [checkpoint for checkpoint in page if checkpoint.of("accuracy")]
    return [*map(_pressures, page), *(make(one) for make in (_margins, _rewards, _log_ratios) for one in rewarded)]


def cell(estimate: Estimate | None, digits: int = 3) -> str:
    """The value, and ± half the width of its interval; the records have both bounds."""
    if estimate is None or estimate.value is None:
        return "–"
    half = "" if estimate.interval is None else f" ± {_half(estimate):.{digits}f}"
    return f"{estimate.value:+.{digits}f}{half}"


def share(estimate: Estimate | None) -> str:
    """The same for a share, in per cent."""
    if estimate is None or estimate.value is None:
        return "–"
    half = "" if estimate.interval is None else f" ± {100 * _half(estimate):.0f}"
    return f"{100 * estimate.value:.0f}{half} %"


def explained(estimate: Estimate | None) -> str:
    """A share of variance in per cent with both bounds, for it cannot be below 0."""
    if estimate is None or estimate.value is None:
        return "–"
    bounds = (
        "" if estimate.interval is None else f" ({' to '.join(f'{100 * each:.0f}' for each in estimate.interval)})"
    )
    return f"{100 * estimate.value:.0f}{bounds} %"


def _half(estimate: Estimate) -> float:
    low, high = estimate.interval or (0.0, 0.0)
    return (high - low) / 2


def _pressures(checkpoint: Checkpoint) -> Table:
    groups = list(dict.fromkeys(f.labels["group"] for f in checkpoint.of("pressure")))
    table = Table(
        f"{checkpoint.name}: length pressure; below 0, training lengthens (mean, ± half of the 95 % interval)",
        ["method", *groups],
    )
    for method in dict.fromkeys(f.labels["method"] for f in checkpoint.of("pressure")):
        found = [checkpoint.one("pressure", method=method, group=group) for group in groups]
        table.add(method, *map(cell, found))
    prompts = [checkpoint.one("pressure", method=PLAIN, group=group) for group in groups]
    table.add("prompts", *(str(each.n) if each else "–" for each in prompts))
    return table


def _margins(checkpoint: Checkpoint) -> Table:
    groups = list(dict.fromkeys(f.labels["group"] for f in checkpoint.of("accuracy")))
    names = ["margin_correlation", *["margin_partial"] * bool(checkpoint.of("margin_partial"))]
    heads = ["method", *groups, "corr(margin, T_w - T_l)", "at equal quality"]
    title = f"{checkpoint.name}: margins, share above 0 by lengths, and how much of them is length"
    table = Table(title, heads[: len(groups) + 1 + len(names)])
    for method in dict.fromkeys(f.labels["method"] for f in checkpoint.of("accuracy")):
        shares = [share(checkpoint.one("accuracy", method=method, group=group)) for group in groups]
        table.add(method, *shares, *(cell(checkpoint.one(name, method=method), 2) for name in names))
    return table


def _rewards(checkpoint: Checkpoint) -> Table:
    title = f"{checkpoint.name}: implicit reward (plain sums) of responses by their length in tokens"
    table = Table(title, ["tokens", "reward"])
    for finding in checkpoint.of("reward"):
        table.add(f"{finding.labels['from']}–{finding.labels['to']}", cell(finding.estimate))
    table.add("slope per 100 tokens", cell(checkpoint.one("reward_slope")))
    table.add("share explained (R²)", explained(checkpoint.one("reward_r2")))
    return table


def _log_ratios(checkpoint: Checkpoint) -> Table:
    table = Table(f"{checkpoint.name}: mean log-ratio of a token, nats", ["tokens", "chosen", "rejected"])
    for kind in dict.fromkeys(f.labels["class"] for f in checkpoint.of("log_ratio_of")):
        pair = [checkpoint.one("log_ratio_of", side=side, **{"class": kind}) for side in ("chosen", "rejected")]
        table.add(kind, *map(cell, pair))
    for low, high in dict.fromkeys((f.labels["from"], f.labels["to"]) for f in checkpoint.of("log_ratio_at")):
        pair = [checkpoint.one("log_ratio_at", side=side, **{"from": low}) for side in ("chosen", "rejected")]
        table.add(f"position {low}–{high}" if high > low else f"position {low}", *map(cell, pair))
    return table


def sentence(checkpoint: Checkpoint) -> str:
    """Describe what the numbers show, and what they do not show."""
    parts = [f"{checkpoint.name}: {_describe_pressure(checkpoint)}"]
    correlation, slope = checkpoint.one("margin_correlation", method=PLAIN), checkpoint.one("reward_slope")
    longer, shorter = (checkpoint.one("accuracy", method=PLAIN, group=f"chosen {g}") for g in ("longer", "shorter"))
    if checkpoint.of("accuracy") and (correlation is None or correlation.value is None):
        parts.append(
            "All its margins, or all differences of length, are equal: no dependence on length can be measured."
        )
    elif correlation is not None and correlation.value is not None:
        r2 = checkpoint.one("margin_r2", method=PLAIN)
        text = f"The difference of lengths explains {explained(r2)} of the variance of its margins"
        if slope is not None and slope.value is not None:
            text += f", 100 tokens more change a response's reward by {cell(slope)}"
        if longer is not None and shorter is not None:
            text += (
                f", and it is right about {share(longer)} of the pairs whose chosen response is longer and "
                f"{share(shorter)} of those where it is shorter"
            )
        parts.append(text + ".")
    n = checkpoint.of("pressure")[0].estimate.n
    if n < FEW:
        parts.append(f"These are {n} prompts: below {FEW}, intervals are only a hint.")
    return " ".join(parts)


def _describe_pressure(checkpoint: Checkpoint) -> str:
    signs: dict[str, list[str]] = {"lengthens": [], "shortens": [], "has no significant direction": []}
    for finding in checkpoint.of("pressure", group="all"):
        method, interval = finding.labels["method"], finding.estimate.interval
        if "+" in method:  # the table has the variants
            continue
        sure = interval is not None and (interval[0] > 0 or interval[1] < 0)
        falls = sure and interval is not None and interval[1] < 0
        signs["lengthens" if falls else "shortens" if sure else "has no significant direction"].append(method)
    described = [f"{word} with {', '.join(names)}" for word, names in signs.items() if names]
    return f"by the length pressure over all these pairs, a first step {'; it '.join(described)}."

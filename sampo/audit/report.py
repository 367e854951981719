"""Records, tables and sentences of an audit. The numbers determine which sentences appear."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..io import records as results
from ..io.tables import Table, clean
from ..stats.intervals import Estimate
from .advice import advise
from .audit import Audit
from .bias import LengthBias, sign_of_effect
from .truncation import Truncation

# number -> its title and its format: a share in per cent, or so many digits
MEASURES: dict[str, tuple[str, str | int]] = {
    "longer": ("chosen is longer", "%"),
    "equal": ("both are equally long", "%"),
    "shorter": ("chosen is shorter", "%"),
    "chosen_mean": ("mean length of chosen, T_w ({unit})", 1),
    "rejected_mean": ("mean length of rejected, T_l ({unit})", 1),
    "difference": ("mean of T_w − T_l ({unit})", 1),
    "chosen_median": ("median length of chosen", 0),
    "rejected_median": ("median length of rejected", 0),
    "chosen_p90": ("90th percentile of chosen", 0),
    "rejected_p90": ("90th percentile of rejected", 0),
    "chosen_longest": ("longest chosen", 0),
    "rejected_longest": ("longest rejected", 0),
    "prompt_mean": ("mean length of prompts", 1),
    "prompt_longest": ("longest prompt", 0),
    "rms_difference": ("root mean square of T_w − T_l", 1),
    "auc": ("AUC of length for the preference", 3),
    "slope": ("log-odds per 100 {unit} longer", 2),
    "counted": ("SamPO selects, of all tokens", "%"),
    "counted_chosen": ("SamPO selects, of chosen tokens", "%"),
    "counted_rejected": ("SamPO selects, of rejected tokens", "%"),
    "end_chosen": ("SamPO keeps the end token of chosen", "%"),
    "end_rejected": ("SamPO keeps the end token of rejected", "%"),
}
GROUP_COLUMNS = ("chosen_mean", "rejected_mean", "longer", "shorter", "auc", "slope", "counted")
GROUPS_SHOWN = 20
PART_KEYS = {"split", "group", "max_length"}  # the config of a record about a part of the pairs has one of these
CUT_COUNTS = {
    "dropped": "pairs dropped because their prompt fills it",
    "cut_chosen": "chosen responses cut",
    "cut_rejected": "rejected responses cut",
    "without_end_chosen": "chosen without an end token",
    "without_end_rejected": "rejected without an end token",
    "one_sided_end": "pairs with an end token in one response only",
    "identical": "pairs with the same tokens in both responses",
}


def list_records(audit: Audit, *, command: str = "") -> list[results.Record]:
    """List every number as a record; its `config` names the split, group or `max_length` that it belongs to."""
    made = []
    for part, bias in _parts(audit):
        config = _config(audit) | part
        for name, estimate in bias.numbers().items():
            made.append(_make_record(f"audit/{name}", estimate, bias.pairs, config, command))
    for cut in audit.truncations:
        config = _config(audit) | {"max_length": cut.max_length, "truncation_mode": cut.truncation_mode}
        for name in CUT_COUNTS:
            estimate = Estimate(float(getattr(cut, name)), None, None, None, count_pairs(audit))
            made.append(_make_record(f"audit/{name}", estimate, count_pairs(audit), config, command))
    for scan in audit.scans:
        found = audit.repeats[scan.name]
        counts = {"rows": scan.rows, "faults": sum(issue.count for issue in scan.issues)}
        counts |= {"pairs": found.pairs, "prompts": found.prompts}
        counts |= {"repeated": found.repeated, "contradicted": found.contradicted}
        for name, count in counts.items():
            estimate = Estimate(float(count), None, None, None, scan.rows)
            made.append(
                _make_record(f"audit/{name}", estimate, scan.rows, _config(audit) | {"split": scan.name}, command)
            )
        for issue in scan.issues:
            config = _config(audit) | {"split": scan.name, "kind": issue.kind, "column": issue.column}
            bad = Estimate(float(issue.count), None, None, None, scan.rows)
            made.append(_make_record("audit/bad_rows", bad, scan.rows, config, command))
    return made


def _parts(audit: Audit) -> Iterator[tuple[dict[str, Any], LengthBias]]:
    yield {}, audit.overall
    yield from (({"split": name}, bias) for name, bias in audit.splits.items())
    yield from (({"group": name}, bias) for name, bias in audit.groups.items())
    for cut in audit.truncations[1:]:
        yield {"max_length": cut.max_length, "truncation_mode": cut.truncation_mode}, cut.bias


def count_pairs(audit: Audit) -> int:
    """Count the good pairs of all splits."""
    return audit.overall.pairs


def _config(audit: Audit) -> dict[str, Any]:
    return {"data": audit.label, "fingerprint": audit.fingerprint, "unit": audit.unit, **audit.about}


def _make_record(name: str, estimate: Estimate, n: int, config: dict[str, Any], command: str) -> results.Record:
    return results.Record(
        name=name,
        value=estimate.value,
        n=n,
        interval=estimate.interval,
        config=config,
        command=command,
        **results.provenance(),
    )


# --- tables ----------------------------------------------------------------------------------------------------------


def overall_rows(numbers: Mapping[str, Estimate], unit: str) -> list[tuple[str, str, str]]:
    """The rows of the table of all pairs: title, value, 95 % interval."""
    return [
        (title.format(unit=unit), format_value(numbers[name].value, how), format_interval(numbers[name].interval, how))
        for name, (title, how) in MEASURES.items()
    ]


def format_value(value: float | None, how: str | int) -> str:
    """Format a number in the format of its measure; an undefined number is a dash."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if how == "%" else f"{value:,.{how}f}"


def format_interval(interval: tuple[float, float] | None, how: str | int) -> str:
    """Format both bounds, or return an empty text."""
    return "" if interval is None else f"{format_value(interval[0], how)} to {format_value(interval[1], how)}"


def make_tables(audit: Audit) -> list[Table]:
    """Make the tables for a screen: all pairs, splits, groups, truncation."""
    overall = Table(f"{clean(audit.label)}: {count_pairs(audit):,} pairs", ["", "value", "95 % interval"])
    for row in overall_rows(audit.overall.numbers(), audit.unit):
        overall.add(*row)
    made = [overall]
    for title, parts in (("Splits", audit.splits), (f"By {clean(str(audit.about['by']))}", audit.groups)):
        if parts:
            made.append(_group_table(title, parts))
    if audit.truncations:
        made.append(_truncation_table(audit.truncations))
    return made


def _group_table(title: str, parts: Mapping[str, LengthBias]) -> Table:
    heads = {"chosen_mean": "T_w", "rejected_mean": "T_l", "longer": "longer", "shorter": "shorter"}
    heads |= {"auc": "AUC", "slope": "slope", "counted": "selected"}
    table = Table(title, ["", "pairs", *(heads[name] for name in GROUP_COLUMNS)])
    largest = sorted(parts.items(), key=lambda item: -item[1].pairs)
    for name, bias in largest[:GROUPS_SHOWN]:
        numbers = bias.numbers()
        cells = [format_value(numbers[column].value, MEASURES[column][1]) for column in GROUP_COLUMNS]
        table.add(name, f"{bias.pairs:,}", *cells)
    if len(largest) > GROUPS_SHOWN:
        table.add(f"… and {len(largest) - GROUPS_SHOWN} smaller ones", "")
    return table


def _truncation_table(cuts: list[Truncation]) -> Table:
    lengths = ["none" if cut.max_length is None else f"{cut.max_length:,}" for cut in cuts]
    table = Table(f"What `max_length` cuts ({cuts[0].truncation_mode})", ["", *lengths])
    for name, title in CUT_COUNTS.items():
        table.add(title, *(f"{getattr(cut, name):,}" for cut in cuts))
    table.add("chosen is longer, after the cut", *(format_value(cut.bias.longer.value, "%") for cut in cuts))
    return table


def issue_lines(audit: Audit) -> list[str]:
    """List issues with their rows and fixes, notes, duplicates and overlaps: one line each."""
    lines = []
    for scan in audit.scans:
        lines += [f"split `{scan.name}`: {issue.describe(scan.rows)}" for issue in scan.issues]
        lines += scan.notes
        found = audit.repeats[scan.name]
        if found.repeated or found.contradicted:
            lines.append(
                f"split `{scan.name}`: {found.repeated:,} of {found.pairs:,} pairs repeat an earlier one, "
                f"{found.contradicted:,} also occur with their responses swapped."
            )
    for both in audit.overlaps:
        if both.prompts:
            lines.append(
                f"splits `{both.first}` and `{both.second}` share {both.prompts:,} prompts: {both.pairs_of_second:,} "
                f"pairs of `{both.second}` have a prompt of `{both.first}`, {both.same_pairs:,} are the same pair, "
                f"{both.swapped_pairs:,} the same with swapped responses. To split by prompt: "
                "`sampo.data.subsets.split_by_prompt`, or the option `eval_fraction`."
            )
    return [clean(line) for line in lines]


# --- verdict ---------------------------------------------------------------------------------------------------------


def write_verdict(audit: Audit) -> str:
    """State in one to three sentences what was found and what to do; docs/choose.md has the reasons."""
    bias, sentences = audit.overall, []
    bad = sum(issue.count for scan in audit.scans for issue in scan.issues)
    if bad:
        sentences.append(
            f"{bad:,} of {audit.rows:,} rows cannot be trained on: correct them as listed below, or set "
            "`on_bad_rows: drop`."
        )
    advice = advise(bias, unit=audit.unit)
    shares = f"{format_value(bias.longer.value, '%')} longer, {format_value(bias.shorter.value, '%')} shorter"
    area = f"AUC of length {format_value(bias.auc.value, 2)}"
    found = f"{advice.found} ({bias.pairs:,} pairs: {shares}; {area})."
    options = ", ".join(f"`{name}: {str(value).lower()}`" for name, value in advice.options.items())
    start = f"Start with {advice.name} ({options}), because {advice.reason}."
    return " ".join([*sentences, found, start, "`sampo init` writes the recipe, docs/choose.md has the evidence."])


# --- conclusion ------------------------------------------------------------------------------------------------------


def write_conclusion(audit: Audit) -> str:
    """Describe the length bias and the options that it concerns; no training run is predicted."""
    bias, unit = audit.overall, audit.unit
    sentences = [*bias_sentences(bias, unit), *_option_sentences(bias)]
    sentences += _cut_sentences(audit.truncations)
    if any(both.prompts for both in audit.overlaps):
        sentences.append("Splits share prompts, so one of them is not a valid test set for the other.")
    sentences.append(
        "The data cannot show how training changes the length of answers: watch `length_gap/*` in its log."
    )
    return " ".join(sentences)


def bias_sentences(bias: LengthBias, unit: str) -> list[str]:
    """Which response is longer, and what length alone predicts."""
    return [_share_sentence(bias), _preference_sentence(bias, unit)]


def _share_sentence(bias: LengthBias) -> str:
    return (
        f"The chosen response is longer in {_format_estimate(bias.longer, '%')} of {bias.pairs:,} pairs, shorter in "
        f"{_format_estimate(bias.shorter, '%')}."
    )


def _preference_sentence(bias: LengthBias, unit: str) -> str:
    sign = sign_of_effect(bias.auc, 0.5)
    area = f"AUC {_format_estimate(bias.auc, 3)}"
    if sign == 0:
        return f"Length alone does not distinguish the chosen response from the rejected one ({area}, 0.5 is chance)."
    slope = "" if bias.slope.value is None else f", log-odds {_format_estimate(bias.slope, 2)} per 100 {unit}"
    return f"Length alone points to the {'longer' if sign > 0 else 'shorter'} response ({area}{slope})."


def _option_sentences(bias: LengthBias) -> list[str]:
    """The sentences depend on whether the interval of the AUC lies above or below 0.5, or contains it."""
    chosen, rejected = (format_value(value, "%") for value in (bias.end_chosen, bias.end_rejected))
    kept = f"{chosen} of chosen and {rejected} of rejected end tokens"
    if bias.end_chosen is None and bias.end_rejected is None:
        kept = "no end token, since no response has one"
    sign = sign_of_effect(bias.auc, 0.5)
    if sign > 0:
        return [
            f"`token_weighting: sampo` would downsample mostly the chosen responses and keep {kept}, which favours "
            "longer answers; `sampled_sides: rejected` keeps a longer chosen response complete, and `length_penalty: "
            "learned` fits what length explains (docs/concepts.md; so far measured in the lab only)."
        ]
    if sign < 0:
        return [
            f"`token_weighting: sampo` would downsample mostly the rejected responses and keep {kept}; with `all` "
            "(DPO) the longer rejected response has more terms to push down, the case that collapsed in the lab when "
            "every chosen response was shorter (docs/lab.md)."
        ]
    return [
        f"`token_weighting: sampo` would downsample both responses about equally and keep {kept}; nothing here "
        "calls for a length penalty."
    ]


def _cut_sentences(cuts: list[Truncation]) -> list[str]:
    sentences = []
    for cut in cuts:
        at = "Without a `max_length`" if cut.max_length is None else f"At `max_length: {cut.max_length}`"
        clauses = []
        if cut.dropped:
            clauses.append(f"{cut.dropped:,} pairs are dropped because their prompt fills it")
        if cut.without_end_chosen + cut.without_end_rejected == 2 * cut.bias.pairs > 0:
            clauses.append(
                f"none of {2 * cut.bias.pairs:,} responses has an end token, so no end is trained, and "
                "`balance_end_token` and `keep_end_token` raise an error"
            )
        if cut.one_sided_end:
            clauses.append(f"{cut.one_sided_end:,} pairs have an end token in one response only")
        if cut.identical:
            clauses.append(f"{cut.identical:,} pairs have the same tokens in both responses")
        if clauses:
            sentences.append(f"{at}, {', '.join(clauses)}.")
    return sentences


def _format_estimate(estimate: Estimate, how: str | int) -> str:
    interval = format_interval(estimate.interval, how)
    return format_value(estimate.value, how) + (f" ({interval})" if interval else "")

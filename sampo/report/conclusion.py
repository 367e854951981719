"""The conclusion at the top of the page: sentences from the records that are there, and no more than they support."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from ..audit.report import sign_of_effect
from ..diagnostics.findings import PLAIN
from ..io.names import readable_name
from ..stats.intervals import Estimate
from . import training_figures
from .collect import AnswerSet, Audited, Found, RecordFile, TrainingRun
from .numbers import SummaryRow, estimate, estimate_in_row, number
from .page import MAX_RUNS, Listing, Section, Text

_METHOD = re.compile("`token_weighting: ([^`]+)`")
_CHANGING = ("sampled_sides", "keep_end_token", "balance_end_token", "length_penalty")  # the pressure of a weighting
CONTROL = "longer"  # the judge of `sampo judge` that looks at the length alone
SURE = 0.05  # an adjusted p-value below it decides between two systems


def conclusion_section(found: Found, missing: Sequence[tuple[str, str]]) -> Section:
    """What was trained on what, what came of it, and what nobody has measured yet.

    Args:
        found: the files.
        missing: `(what, command)` of the contents that are missing.
    """
    section = Section("conclusion", "Conclusion")
    for audit in found.audits[:MAX_RUNS]:
        section.guarded(audit.file, partial(_add, section, partial(_about_data, audit)))
    for run in found.runs[:MAX_RUNS]:
        section.guarded(run.file, partial(_add, section, partial(_about_run, run)))
    for file in found.diagnoses[:MAX_RUNS]:
        section.guarded(file.file, partial(_add, section, partial(_about_model, file, found)))
    rows = _rows_of_results(found)
    for name, row in rows[: 2 * MAX_RUNS]:
        section.guarded(name, partial(_add, section, partial(_about_result, row)))
    for compared in found.compared:
        section.guarded(compared.file, partial(_add, section, partial(map, _about_duel, compared.duels)))
    for one in found.answers[:MAX_RUNS] if not rows else ():
        section.guarded(one.file, partial(_add, section, partial(_about_answers, one)))
    sentences = [block.text for block in section.blocks if isinstance(block, Text)]
    lacking = [f"Not measured here: {what}. `{command}`" for what, command in missing]
    section.blocks = [Listing([*sentences, *lacking])] if sentences else []
    return section


def _add(section: Section, sentences: Any) -> None:
    section.add(*(Text(sentence) for sentence in sentences()))


def _about_data(audit: Audited) -> Iterator[str]:
    verdict = audit.about.get("verdict") or str(audit.about["conclusion"]).split(". ")[0] + "."
    yield f"Data `{readable_name(str(audit.about['data']))}`: {verdict}"


def _about_run(run: TrainingRun) -> Iterator[str]:
    text = f"Run `{run.name}`: {run.step:,} steps"
    if run.card:
        text += f" from `{run.card['model']}` with {run.card['method']}, on {run.card['data']}"
    elif run.settings:
        text += f" with {', '.join(f'`{name}: {value}`' for name, value in run.settings.items())}"
    text += "" if run.card else "; its files do not name model and data"
    losses = training_figures.points(run.log, "loss")[1]
    yield f"{text}; last loss {losses[-1]:.4f}." if losses else f"{text}."
    steps, lengths = training_figures.points(run.log, "length/generated")
    ended = training_figures.points(run.log, "length/generated_ended")[1]
    if lengths and ended:
        pressures = training_figures.points(run.log, "length_gap/pressure")[1]
        yield (
            f"Answers of `{run.name}` to held-out prompts: {lengths[0]:.1f} tokens at step {steps[0]:.0f} and "
            f"{lengths[-1]:.1f} at step {steps[-1]:.0f}, {_ratio(lengths)}; {ended[-1]:.0%} of the last ones ended."
            + (f" Its first length pressure was {pressures[0]:+.3g}; below 0 lengthens." if pressures else "")
        )


def _ratio(lengths: Sequence[float]) -> str:
    return f"{lengths[-1] / lengths[0]:.2f} times as many"


# --- length pressure -------------------------------------------------------------------------------------------------


def _about_model(file: RecordFile, found: Found) -> Iterator[str]:
    """Without a reference what a first step would do; with one how far length explains the margins."""
    policies: dict[tuple[str, str], dict[str, Estimate]] = {}
    for record in file.records:
        config = record.config
        key = (str(config["policy"]), str(config.get("reference") or ""))
        if record.name == "diagnose/pressure" and config["group"] == "all" and "+" not in config["method"]:
            policies.setdefault(key, {})[str(config["method"])] = estimate(record)
        if record.name == "diagnose/margin_r2" and config["method"] == PLAIN and record.value is not None:
            policy, reference, data = (readable_name(str(each)) for each in (*key, config.get("data")))
            yield (
                f"Model `{policy}` against `{reference}` on `{data}`: the difference of lengths explains "
                f"{number(estimate(record), '%')} of the variance of its margins."
            )
    for (policy, reference), pressures in policies.items():
        if reference:  # a trained model: nothing is forecast
            continue
        signs = {method: sign_of_effect(one, 0) for method, one in pressures.items()}
        kinds = {"lengthens": -1, "shortens": 1, "has no sure direction": 0}
        said = [
            f"{what} with {', '.join(f'`{m}`' for m in some)}"
            for what, sign in kinds.items()
            if (some := [m for m, one in signs.items() if one == sign])
        ]
        yield f"Forecast for `{readable_name(policy)}`: by the length pressure, a first step {'; it '.join(said)}."
        yield from _outcomes(policy, signs, found)


def _outcomes(policy: str, signs: dict[str, int], found: Found) -> Iterator[str]:
    """Forecast against lengths, where the files name the model of a run, its method, and whose answers were judged."""
    models = {one.sha256: _last_part(str(one.answers[0].model)) for one in found.answers if one.answers}
    for run in found.runs:
        method = _METHOD.search(run.card.get("method", ""))
        # the pressure of a weighting alone is no forecast for a run with other options of the method
        if method is None or method[1] not in signs or any(f"`{name}: " in method.string for name in _CHANGING):
            continue
        if _last_part(run.card["model"]) != _last_part(policy):
            continue
        forecast = {-1: "longer", 1: "shorter", 0: "no sure direction"}[signs[method[1]]]
        if in_training := training_figures.points(run.log, "length/generated")[1]:
            yield (
                f"Answers of `{run.name}` (`{method[1]}`) in training: in the end {_ratio(in_training)} tokens as at "
                f"the start. The forecast was: {forecast}."
            )
        for judged in found.judged:
            sides = [models.get(one.sha256) for one in (judged.run.system, judged.run.baseline)]
            lengths = [estimate_in_row(judged.row, f"length/{side}") for side in ("system", "baseline")]
            if sides == [_last_part(run.name), _last_part(policy)] and all(one.value is not None for one in lengths):
                yield (
                    f"Outcome for `{run.name}` (`{method[1]}`): {number(lengths[0], 0)} {judged.row['length_unit']} "
                    f"per answer, {_compared(*lengths)} the start's {number(lengths[1], 0)}. The forecast was: "
                    f"{forecast}."
                )


def _compared(ours: Estimate, theirs: Estimate) -> str:
    if ours.interval is None or theirs.interval is None:
        return "against"
    (low, high), (their_low, their_high) = ours.interval, theirs.interval
    if low > their_high:
        return "longer than"
    return "shorter than" if high < their_low else "not surely longer or shorter than"


def _last_part(name: str) -> str:
    """Of a folder or a hub id, without a commit: files name a model in several ways."""
    return readable_name(name).rpartition("/")[2].partition("@")[0]


# --- results ---------------------------------------------------------------------------------------------------------


def _rows_of_results(found: Found) -> list[tuple[str, SummaryRow]]:
    """Each result once, with its file; a comparison repeats those of its judgements."""
    rows: dict[tuple[str, str, str], tuple[str, SummaryRow]] = {}
    every = [(run.file, run.row) for run in found.judged]
    every += [(one.file, row) for one in found.compared for row in one.systems if row.get("win_rate") is not None]
    for name, row in every:
        rows.setdefault((str(row.get("system")), str(row.get("baseline")), str(row.get("judge"))), (name, row))
    return list(rows.values())


def _about_result(row: SummaryRow) -> Iterator[str]:
    system, baseline = f"`{row['system']}`", f"`{row['baseline']}`"
    raw, equal = (estimate_in_row(row, key) for key in ("win_rate", "win_rate/equal_length"))
    ours, theirs = (estimate_in_row(row, f"length/{side}") for side in ("system", "baseline"))
    text = f"{system} against {baseline} by {row['judge']}, {raw.n:,} prompts: wins {number(raw, '%')}"
    text += "" if equal.value is None else f", at equal length {number(equal, '%')}"
    if ours.value is not None and theirs.value is not None:
        text += f"; {number(ours, 0)} {row.get('length_unit')} per answer against {number(theirs, 0)}"
    doubts = " Read its notes below first." if row.get("notes") else ""
    if row["judge"] == CONTROL:
        yield f"{text}. This judge takes the longer answer: a control, which shows nothing about quality."
        return
    yield f"{text}. {_decision(system, baseline, raw, equal)}{doubts}"


def _decision(system: str, baseline: str, raw: Estimate, equal: Estimate) -> str:
    better = {1: f"{system} wins", -1: f"{baseline} wins", 0: "undecided, the interval holds 50 %"}
    first = sign_of_effect(raw, 0.5)
    if equal.value is None:
        return f"Raw: {better[first]}. There is no win rate at equal length, so length may be the reason."
    second = sign_of_effect(equal, 0.5)
    if first == second:
        return f"Raw and at equal length: {better[first]}."
    hint = " Length may be the reason for the raw win rate." if first and not second else ""
    return f"Raw: {better[first]}. At equal length: {better[second]}.{hint}"


def _about_duel(duel: SummaryRow) -> str:
    first, second = f"`{duel['first']}`", f"`{duel['second']}`"
    difference = estimate_in_row(duel, "difference")
    decided = duel.get("p_holm") is not None and duel["p_holm"] < SURE and difference.value is not None
    better = (first if (difference.value or 0) > 0 else second) + " wins more" if decided else "undecided"
    p = "" if duel.get("p_holm") is None else f", p = {duel['p_holm']:.2g} (Holm)"
    points = number(difference, "%", sign=True).replace(" %", " points")
    return f"{first} − {second}, raw win rate prompt by prompt: {points}{p}: {better}."


def _about_answers(one: AnswerSet) -> Iterator[str]:
    count = len(one.answers)
    yield f"Answers `{one.name}`: {sum(a.chars for a in one.answers) / count:,.0f} characters on average of {count:,}."

"""The sections of the page on judgements and answers: win rates, lengths, and answers side by side."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..evaluation.answers.answers import prompt_text
from ..evaluation.judging.judges import drawn_prompts
from ..evaluation.results.verbosity import System, Verbosity, compare_verbosity
from ..io.names import readable_name
from . import evaluation_figures
from .collect import AnswerSet, Compared, Found, JudgedRun, plain
from .judge_section import checked_sentence
from .numbers import SummaryRow, estimate_in_row, number
from .page import Heading, Listing, Origin, PageTable, Sample, Section, Shown, Text, origins_of, shorten

SAMPLES = 6  # prompts whose answers are shown
SYSTEMS = 6  # of answers, in figures and side by side
PROMPT_CHARS, ANSWER_CHARS = 2000, 4000  # shown of a text
VERBOSITY: dict[str, tuple[str, str | int]] = {  # measure -> head of its column, how it is shown
    "tokens_mean": ("tokens, mean", 1),
    "tokens_median": ("tokens, median", 0),
    "characters_mean": ("characters, mean", 0),
    "characters_median": ("characters, median", 0),
    "characters_p90": ("characters, 90th percentile", 0),
    "cut": ("cut off", "%"),
    "empty": ("empty", "%"),
    "distinct_3": ("distinct-3", 2),
    "repeated_sentences": ("repeated sentences", "%"),
}


# --- win rates -------------------------------------------------------------------------------------------------------


def win_rate_section(found: Found) -> Section:
    """Win rates, with lengths and controls."""
    section = Section("win-rate", "Win rate and verbosity")
    for file in found.compared:
        section.guarded(file.file, partial(_add_comparison, section, file))
    groups: dict[tuple[str, str, str], list[JudgedRun]] = {}
    for run in found.judged:
        key = (str(run.run.baseline.sha256), str(run.row["judge"]), str(run.row.get("length_unit")))
        groups.setdefault(key, []).append(run)
    for runs in groups.values():
        section.guarded(runs[0].file, partial(_add_judged, section, runs, found))
    return section


def _add_judged(section: Section, runs: Sequence[JudgedRun], found: Found) -> None:
    rows = [run.row for run in runs]
    first = rows[0]
    origins = tuple(origin for run in runs for origin in origins_of(run.records, run.file))
    section.add(Heading(f"Against {first['baseline']}, by {first['judge']}"))
    section.add(Listing([checked_sentence(run, found) for run in runs]))
    if not _covered(rows, found.compared):
        _tables_and_figures(section, rows, origins)


def _covered(rows: Sequence[SummaryRow], compared: Sequence[Compared]) -> bool:
    """Whether a comparison shows the same systems already."""
    triples = {(row["system"], row["baseline"], row["judge"]) for row in rows}
    return any(triples <= {(r.get("system"), r.get("baseline"), r.get("judge")) for r in c.systems} for c in compared)


def _add_comparison(section: Section, file: Compared) -> None:
    origins = origins_of(file.records, file.file)
    rows = [row for row in file.systems if row.get("win_rate") is not None]
    if rows:
        section.add(Heading(f"Compared: {', '.join(str(row['system']) for row in rows)}"))
        _tables_and_figures(section, rows, origins)
    if file.duels:
        section.add(_duel_table(file.duels, origins))


def _tables_and_figures(section: Section, rows: Sequence[SummaryRow], origins: tuple[Origin, ...]) -> None:
    n = f"{', '.join(dict.fromkeys(_count(row.get('prompts')) for row in rows))} prompts"
    section.add(_win_rate_table(rows, origins, n))
    if notes := list(dict.fromkeys(f"{row['system']}: {row['notes']}" for row in rows if row.get("notes"))):
        section.add(Listing(notes))
    _win_rate_figures(section, rows, origins, n)


def _win_rate_figures(section: Section, rows: Sequence[SummaryRow], origins: tuple[Origin, ...], n: str) -> None:
    shown = [{**row, "system": shorten(str(row["system"])), "baseline": shorten(str(row["baseline"]))} for row in rows]
    shown = shown[:SYSTEMS]
    values = "; ".join(
        f"{row['system']}: {number(estimate_in_row(row, 'length/system'), 0)} {row.get('length_unit')}, win rate "
        f"{number(estimate_in_row(row, 'win_rate'), '%')}, at equal length "
        f"{number(estimate_in_row(row, 'win_rate/equal_length'), '%')}"
        for row in shown
    )
    if any(row.get("length/system") is not None for row in shown):
        section.draw(
            lambda figure: evaluation_figures.frontier(shown, ax=figure.add_subplot()),
            title=f"Verbosity and win rate against {shown[0]['baseline']}",
            description=f"Each system at the mean length of its answers and its win rate (95 % intervals). {values}.",
            origins=origins,
            n=n,
        )
    bins = {key: (low, high) for row in shown for low, high, key in evaluation_figures.ratio_bins(row)}
    if any(row.get(key) is not None for row in shown for key in bins):
        section.draw(
            lambda figure: evaluation_figures.win_rate_by_length_ratio(shown, ax=figure.add_subplot()),
            title="Win rate by the ratio of lengths",
            description="Win rate with 95 % interval where the system's answer is so many times as long as the "
            "baseline's. "
            + "; ".join(
                f"{row['system']} {evaluation_figures.bin_name(*bins[key])}: {number(estimate_in_row(row, key), '%')}"
                for row in shown
                for key in bins
                if row.get(key) is not None
            ),
            origins=origins,
            n=n,
        )


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def _win_rate_table(rows: Sequence[SummaryRow], origins: tuple[Origin, ...], n: str) -> PageTable:
    unit = str(rows[0].get("length_unit", "characters"))
    heads = ["system", "prompts", "win rate", "at equal length", unit, "baseline's", "the longer one wins"]
    heads += ["an empty one wins", "orders agree", "wins", "ties", "losses", "pairs failed"]
    keys = {"win_rate/control_longer_wins": "%", "win_rate/control_empty": "%", "order/consistent": "%"}
    cells = []
    for row in rows:
        lengths = [number(estimate_in_row(row, f"length/{side}"), 0) for side in ("system", "baseline")]
        rates = [number(estimate_in_row(row, key), "%") for key in ("win_rate", "win_rate/equal_length")]
        controls = [number(estimate_in_row(row, key), how) for key, how in keys.items()]
        counts = [_count(row.get(name)) for name in ("wins", "ties", "losses")]
        failed = _count(row.get("failed", 0) + row.get("half_failed", 0))
        cells.append([str(row["system"]), _count(row.get("prompts")), *rates, *lengths, *controls, *counts, failed])
    opponents = "; ".join(dict.fromkeys(f"{row['baseline']} by {row['judge']}" for row in rows))
    return PageTable(
        f"Win rates against {opponents}, with lengths and controls (95 % intervals)", heads, cells, origins, n
    )


def _duel_table(duels: Sequence[SummaryRow], origins: tuple[Origin, ...]) -> PageTable:
    rows = [
        [
            f"{duel['first']} − {duel['second']}",
            number(estimate_in_row(duel, "difference"), "%", sign=True),
            *(_count(duel.get(name)) for name in ("better", "worse", "equal")),
            *("–" if duel.get(name) is None else f"{duel[name]:.2g}" for name in ("p_value", "p_holm")),
        ]
        for duel in duels
    ]
    heads = ["first − second", "difference, points", "better", "worse", "equal", "p, sign test", "p, Holm"]
    n = f"{', '.join(dict.fromkeys(_count(duel.get('prompts')) for duel in duels))} prompts"
    return PageTable("Differences in win rate, prompt by prompt", heads, rows, origins, n)


# --- answers ---------------------------------------------------------------------------------------------------------


def answer_section(found: Found) -> Section:
    """Lengths of answers, and some of them side by side."""
    section = Section("answers", "Answers")
    sets = _sets_by_name(found.answers)
    if sets:
        section.guarded(found.answers[0].file, partial(_add_lengths, section, sets))
        section.guarded(found.answers[0].file, partial(_add_samples, section, sets, found.judged))
    elif found.judged:
        section.guarded(found.judged[0].file, partial(_add_judged_lengths, section, found.judged))
    return section


def _sets_by_name(sets: Sequence[AnswerSet]) -> dict[str, AnswerSet]:
    """Sets by names of their own: that of the file, with its folder if two files have the same name."""
    names = [one.name for one in sets]
    return {one.name if names.count(one.name) == 1 else one.file: one for one in sets if one.answers}


def _origin_of_answers(one: AnswerSet) -> Origin:
    """Answers name their model and their sampling, not a command."""
    first = one.answers[0]
    parts = [f"answers of {readable_name(first.model)}"] if first.model else []
    parts += [f"{key} {value}" for key, value in sorted(first.sampling.items())]
    parts += [f"seed {first.seed}"] if first.seed is not None else []
    return Origin(
        plain(one.file), versions=shorten(plain(", ".join(map(str, parts))), 200), dates=f"file of {one.date}"
    )


def _add_lengths(section: Section, sets: Mapping[str, AnswerSet]) -> None:
    systems = [System.of(name, one.answers) for name, one in sets.items()]
    origins = tuple(_origin_of_answers(one) for one in sets.values())
    n = f"{sum(len(one.answers) for one in sets.values()):,} answers"
    section.add(_verbosity_table(compare_verbosity(systems), origins, n))
    drawn = systems[:SYSTEMS]
    tokenizers = {system.tokenizer for system in drawn}
    unit = "tokens" if len(tokenizers) == 1 and None not in tokenizers else "characters"
    lengths = {shorten(system.name): values for system in drawn if (values := system.lengths(unit)) is not None}
    _length_figure(section, lengths, unit, origins[:SYSTEMS], n)


def _length_figure(
    section: Section, lengths: Mapping[str, np.ndarray], unit: str, origins: tuple[Origin, ...], n: str
) -> None:
    section.draw(
        lambda figure: evaluation_figures.answer_lengths(lengths, unit=unit, ax=figure.add_subplot()),
        title="How long the answers are",
        description=f"Histograms of the length of an answer in {unit}. "
        + " ".join(f"{name}: mean {v.mean():.0f}, median {np.median(v):.0f}." for name, v in lengths.items()),
        origins=origins,
        n=n,
    )


def _verbosity_table(found: Sequence[Verbosity], origins: tuple[Origin, ...], n: str) -> PageTable:
    """Measures without a value for any system, such as tokens of an unknown tokenizer, are omitted."""
    known = [name for name in VERBOSITY if any(_value(one, name) is not None for one in found)]
    rows = [
        [one.system, f"{one.prompts:,}", *(number(one.measures.get(name), VERBOSITY[name][1]) for name in known)]
        for one in found
    ]
    heads = ["system", "prompts", *(VERBOSITY[name][0] for name in known)]
    return PageTable("Length and repetition (95 % intervals)", heads, rows, origins, n)


def _value(one: Verbosity, name: str) -> float | None:
    return one.measures[name].value if name in one.measures else None


def _add_judged_lengths(section: Section, runs: Sequence[JudgedRun]) -> None:
    """Without the files of answers, their lengths come from the judgements."""
    section.add(Text("The files of answers are missing: the lengths come from the judgements."))
    lengths: dict[str, np.ndarray] = {}
    for run in runs[: SYSTEMS - 1]:
        for side in ("baseline", "system"):
            name = shorten(str(run.row[side]))
            values = {(r.prompt_id, r.sample): getattr(r, f"{side}_chars") for r in run.run.rows}
            lengths.setdefault(name, np.array(list(values.values()), dtype=float))
    origins = tuple(origin for run in runs for origin in origins_of(run.records, run.file))
    _length_figure(section, lengths, "characters", origins, f"{sum(map(len, lengths.values())):,} answers")


# --- side by side ----------------------------------------------------------------------------------------------------


def _add_samples(section: Section, sets: Mapping[str, AnswerSet], judged: Sequence[JudgedRun]) -> None:
    """Some prompts, drawn by a hash, with the answer of each system and the verdict on it."""
    shown = dict(list(sets.items())[:SYSTEMS])
    answers = {name: {a.prompt_id: a for a in reversed(one.answers)} for name, one in shown.items()}
    shared = set.intersection(*(set(of) for of in answers.values()))
    if not shared:
        answers = {name: answers[name] for name in [max(answers, key=lambda name: len(answers[name]))]}
        shared = set(next(iter(answers.values())))
        section.add(Text(f"The files of answers have no prompt in common: those of {next(iter(answers))} are shown."))
    drawn = sorted(drawn_prompts(shared, min(SAMPLES, len(shared)), seed=0))
    section.add(Heading("Answers side by side"))
    section.add(Text(f"{len(drawn)} of {len(shared):,} prompts, drawn by a hash of their ids, not selected by hand."))
    verdicts = {name: _verdicts(one, judged) for name, one in shown.items()}
    for i, prompt_id in enumerate(drawn, 1):
        prompt = prompt_text(next(iter(answers.values()))[prompt_id].prompt)
        texts = [_shown(name, of[prompt_id], verdicts[name].get(prompt_id)) for name, of in answers.items()]
        section.add(Sample(f"Prompt {i}", prompt[:PROMPT_CHARS], max(0, len(prompt) - PROMPT_CHARS), texts))


def _verdicts(one: AnswerSet, judged: Sequence[JudgedRun]) -> dict[str, str]:
    """Prompt -> the preference of the first judge of these answers, both orders averaged."""
    for run in judged:
        if run.run.system.sha256 == one.sha256:
            preferences: dict[str, list[float]] = {}
            for row in run.run.rows:
                if row.preference is not None:
                    preferences.setdefault(row.prompt_id, []).append(row.preference)
            return {p: f"preference {np.mean(v):.2g} by {run.row['judge']}" for p, v in preferences.items()}
    return {}


def _shown(name: str, answer: Any, verdict: str | None) -> Shown:
    parts = [f"{answer.chars:,} characters"]
    parts += [f"{answer.tokens:,} tokens"] if answer.tokens is not None else []
    parts += ["cut off"] if answer.stop == "length" else []
    parts += [verdict] if verdict else []
    return Shown(name, answer.answer[:ANSWER_CHARS], ", ".join(parts), max(0, answer.chars - ANSWER_CHARS))

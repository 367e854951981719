"""What a sweep decides, in sentences: a difference is named only where its interval or adjusted p-value shows it."""

from collections.abc import Iterator, Sequence

from ..audit.report import sign_of_effect
from ..report.conclusion import SURE
from ..report.numbers import count_runs, number
from .frontier import at_kl, matched_kl, paths_of, quality_of
from .lines import Lines, ResultLine

NAMED_AT_MOST = 5  # comparisons that a sentence names
DIRECTION = {1: "longer", -1: "shorter"}


def conclude(lines: Lines) -> list[str]:
    """All sentences, those on what was compared first."""
    return [*_about_budget(lines), *_about_lengths(lines), *_about_duels(lines), *_about_kl(lines), *_limits(lines)]


def _about_budget(lines: Lines) -> Iterator[str]:
    steps = sorted({line.get("steps").value or 0 for line in lines.finished})
    about = lines.about
    if len(lines.finished) == 1:
        yield f"One run is finished, of {steps[0]:,.0f} optimiser steps from {about['model']}."
    elif len(steps) == 1:
        yield (
            f"{count_runs(len(lines.finished))} with equal budget: {steps[0]:,.0f} optimiser steps each, on the same "
            f"split of the data (split_seed {about['split_seed']}), from the same start, {about['model']}."
        )
    elif steps:
        counts = ", ".join(f"{one:,.0f}" for one in steps)
        yield f"The runs do not have the same budget: they took {counts} optimiser steps. Do not compare them."
    for line in lines.failed:
        yield f"`{line.config['run']}` has failed and is in no number below: {line.config['error']}"


def _about_lengths(lines: Lines) -> Iterator[str]:
    undecided = []
    forecasts = []
    for line in lines.methods:
        ratio = line.get("tokens_ratio")
        sign = sign_of_effect(ratio, 1.0)
        own = [one.get("tokens_ratio").value for one in _runs_of(lines, line)]
        agree = sum(value is not None and (value > 1) == (sign > 0) for value in own)
        pressure = sign_of_effect(line.get("pressure"), 0.0)
        if pressure and sign:
            forecasts.append(-pressure == sign)
        if not sign or agree < len(own):
            undecided.append(f"{lines.name(line)} {number(ratio, 2)}")
            continue
        yield (
            f"{lines.name(line)} answers are {DIRECTION[sign]} than the start's: {number(ratio, 2)} times as long, "
            f"in {agree} of {len(own)} {'seed' if len(own) == 1 else 'seeds'}."
        )
    if undecided:
        yield (
            f"Not decided, whether the answers are longer or shorter than the start's: {'; '.join(undecided)} "
            "(the interval holds 1, or the seeds disagree)."
        )
    if forecasts:
        yield (
            f"The pressure before training named the direction of {sum(forecasts)} of {len(forecasts)} methods whose "
            "pressure and length both have a sure sign."
        )


def _runs_of(lines: Lines, method: ResultLine) -> list[ResultLine]:
    same = ("method", "learning_rate", "beta")
    return [one for one in lines.finished if all(one.config[name] == method.config[name] for name in same)]


def _about_duels(lines: Lines) -> Iterator[str]:
    """Two methods prompt by prompt: decided by the adjusted p-value, if all seeds agree."""
    for quality in dict.fromkeys(line.config["quality"] for line in lines.duels):
        duels = [line for line in lines.duels if line.config["quality"] == quality]
        open_ones = []
        for line in duels:
            p, difference, seeds = line.get("p_holm").value, line.get("difference"), line.seeds
            first, second = (f"`{name}`" for name in lines.duel_names(line))
            if p is None or p >= SURE or line.config["seeds_agree"] < seeds or not difference.value:
                open_ones.append((f"{first} and {second}", p))
                continue
            better, worse = (first, second) if difference.value > 0 else (second, first)
            points = number(difference, "%", sign=True).replace(" %", " points")
            yield (
                f"{better} has the higher {quality} than {worse}: {first} − {second} is {points} prompt by prompt, "
                f"p = {p:.2g} (sign test, Holm for {len(duels)}), in {line.config['seeds_agree']} of {seeds} "
                f"{'seed' if seeds == 1 else 'seeds'}."
            )
        if open_ones:
            yield f"Not decided by {quality}: {_describe_open(open_ones, len(duels))}."


def _describe_open(open_ones: Sequence[tuple[str, float | None]], n: int) -> str:
    """Name the comparisons, or count them where they are many."""
    known = [p for _, p in open_ones if p is not None]
    if len(open_ones) <= NAMED_AT_MOST:
        return "; ".join(names + ("" if p is None else f" (p = {p:.2g})") for names, p in open_ones)
    values = f", with p from {min(known):.2g} to {max(known):.2g}" if known else ""
    return f"{len(open_ones)} of {n} comparisons{values}"


def _about_kl(lines: Lines) -> Iterator[str]:
    if len(lines.methods) < 2:
        return
    kl, quality = matched_kl(lines), quality_of(lines)
    if kl is None:
        yield (
            "The methods are not compared at the same KL: no KL lies between measured grid values of every method. "
            "Add values of `learning_rate`."
        )
        return
    parts = [
        f"`{method}` {at_kl(path, 'tokens_ratio', kl):.2f} times the start's length, {quality.replace('_', ' ')} "
        f"{100 * at_kl(path, quality, kl):.1f} %"
        for method, path in paths_of(lines).items()
    ]
    yield f"At a KL of {kl:.2f}, interpolated between grid values and without a test: {'; '.join(parts)}."


def _limits(lines: Lines) -> Iterator[str]:
    about = lines.about
    own = {line.config["method"]: line.config for line in lines.methods if line.config.get("own_beta")}
    if own:
        betas = ", ".join(f"`{name}` {one['beta']:g}" for name, one in own.items())
        yield f"Methods with a beta of their own: {betas}."
    if any("trainer" in one["options"] for one in own.values()):
        yield (
            "In the methods of TRL's other trainers beta is another quantity. Their accuracy, too, is that of DPO's "
            "implicit reward, which is not the reward of SimPO, CPO and ORPO."
        )
    estimate = (
        f"mean of log π − log π_ref over answers sampled from each run at temperature 1, cut at {about['max_tokens']} "
        "tokens: an unbiased estimate of the KL of that distribution from the start"
        if about["temperature"] == 1
        else f"mean of log π − log π_ref over answers at temperature {about['temperature']:g}, which is not the KL of "
        "the policy itself"
    )
    yield f"KL: {estimate}, up to the answers being tokenised again."
    if not about["judge"]:
        yield "No judge: quality is the held-out accuracy of the implicit reward, which says nothing about answers."
    elif about["judge"] == "longer":
        yield "This judge takes the longer answer: a control, which shows nothing about quality."
    single = [lines.name(line) for line in lines.methods if line.seeds < 2]
    if single:
        whose = "" if len(single) == len(lines.methods) else f" of {', '.join(single)}"
        yield f"One seed{whose}: the intervals are over prompts alone, and another seed may give another sign."

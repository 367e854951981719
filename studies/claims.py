"""Verdicts of the records of a study on claims, one by one, by rules that are printed with the verdict.

A rule is applied to the spread over seeds: `holds` or `does not hold` where the 95 % interval says so, and `open`
where it does not, or where there are fewer than three seeds.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from sampo.lab.methods import STUDY_METHODS
from sampo.lab.settings import GROUPS

from .analysis import (
    FEW_SEEDS,
    HEADLINE,
    KL_LEVELS,
    WIN_RATES,
    Cell,
    Spread,
    Study,
    first_reaching,
    interpolate_grid,
    paired,
    prediction,
    tuned,
)
from .plan import BIASES

PAPER = "arXiv 2406.10957"
HOLDS, FAILS, OPEN = "holds", "does not hold", "open"
COLLAPSED = 0.45  # win rate against the start, below which a policy has collapsed
HALF_STOPS = 0.5  # or share of answers that end
MARGIN = 0.02  # of win rate: a loss that is worth less is none
OURS, BALANCED = "sampo_rejected_learned", "rejected_learned_balanced"
DATASET = "rejected_learned_dataset_balanced"
_AT_THE_SAME = (  # KL, or win rate
    *(("sampo", "dpo"), (OURS, "dpo"), (OURS, "dpo_learned"), (BALANCED, "dpo")),
    *((DATASET, other) for other in ("dpo", "rdpo_02", BALANCED)),
)
NEUTRAL = 0.2  # share of the start's length: a smaller change is none
UNCORRELATED = 0.1  # correlation of margin and length difference that counts as none


class Finding(NamedTuple):
    """A condition, what came out under it, and the numbers."""

    condition: str
    verdict: str
    evidence: str


class Claim(NamedTuple):
    """A claim, whose it is, the rule, and the findings under each condition."""

    text: str
    source: str
    rule: str
    findings: list[Finding]

    @property
    def verdict(self) -> str:
        """`holds`, `does not hold` or `open`; with the conditions where they differ, or where some are open."""
        conditions = {
            verdict: [f.condition for f in self.findings if f.verdict == verdict] for verdict in (HOLDS, FAILS, OPEN)
        }
        if conditions[HOLDS] and conditions[FAILS]:
            return f"{HOLDS} when: {', '.join(conditions[HOLDS])}"
        decided = HOLDS if conditions[HOLDS] else FAILS
        if not conditions[decided]:
            return OPEN
        return f"{decided} where decided: {', '.join(conditions[decided])}" if conditions[OPEN] else decided

    @property
    def details(self) -> str:
        """Verdict, rule, and the numbers of every finding."""
        lines = [f"**{self.text}** {self.verdict}. Rule: {self.rule}", ""]
        return "\n".join([*lines, *(f"- {f.condition}: {f.verdict} ({f.evidence})" for f in self.findings)])


def above(spread: Spread | None, bound: float = 0.0) -> str:
    """Whether a spread lies above a bound."""
    if spread is None or spread.low is None or spread.high is None or spread.n < FEW_SEEDS:
        return OPEN
    return HOLDS if spread.low > bound else FAILS if spread.high <= bound else OPEN


def below(spread: Spread | None, bound: float = 0.0) -> str:
    """Whether it lies below."""
    if spread is None or spread.low is None or spread.high is None or spread.n < FEW_SEEDS:
        return OPEN
    return HOLDS if spread.high < bound else FAILS if spread.low >= bound else OPEN


def within(spread: Spread | None, bound: float) -> str:
    """Whether it lies between -bound and bound."""
    if spread is None or spread.low is None or spread.high is None or spread.n < FEW_SEEDS:
        return OPEN
    if -bound <= spread.low and spread.high <= bound:
        return HOLDS
    return FAILS if spread.low > bound or spread.high < -bound else OPEN


def combine(*verdicts: str) -> str:
    """All of them."""
    return FAILS if FAILS in verdicts else HOLDS if set(verdicts) == {HOLDS} else OPEN


def describe(spread: Spread | None, digits: int = 1) -> str:
    """Mean, interval and number of seeds."""
    if spread is None:
        return "not measured"
    text = f"{spread.mean:+.{digits}f}"
    if spread.low is not None:
        text += f" [{spread.low:+.{digits}f}, {spread.high:+.{digits}f}]"
    return f"{text}, {spread.n} seed{'s' if spread.n > 1 else ''}"


def claims(study: Study) -> list[Claim]:
    """All of them, the paper's first."""
    return [*_claims_of_the_paper(study), *_questions_of_ours(study)]


def _difference(study: Study, first: str, second: str, group: str, name: str) -> Spread | None:
    return paired(study.headline(first, group, name), study.headline(second, group, name))


def _of_groups(judge: Callable[[str], tuple[str, str]], groups: Mapping[str, str] = GROUPS) -> list[Finding]:
    return [Finding(f"`{group}`", *judge(group)) for group in groups]


def collapsed(numbers: Mapping[str, float]) -> bool:
    """Whether a policy is clearly worse than its start, or no longer ends its answers."""
    return numbers["win_rate"] < COLLAPSED or numbers["stops"] < HALF_STOPS


def _claims_of_the_paper(study: Study) -> list[Claim]:
    def lengthens(bias: float) -> tuple[str, str]:
        tokens = study.headline("dpo", "all", "tokens", bias=bias)
        spread = paired(tokens, study.start("tokens"))
        return above(spread), f"DPO minus start: {describe(spread)} tokens"

    def shorter(group: str) -> tuple[str, str]:
        tokens = _difference(study, "sampo", "dpo", group, "tokens")
        wins = _difference(study, "sampo", "dpo", group, "win_rate")
        return combine(below(tokens), above(wins, -MARGIN)), f"{describe(tokens)} tokens; win rate {describe(wins, 3)}"

    def better(group: str) -> tuple[str, str]:
        wins = _difference(study, "sampo", "dpo", group, "win_rate")
        return above(wins), f"win rate {describe(wins, 3)}"

    def uncorrelated(group: str) -> tuple[str, str]:
        spread = paired(study.headline("sampo", group, "correlation"), dict.fromkeys(study.starts, 0.0))
        return within(spread, UNCORRELATED), f"correlation {describe(spread, 2)}"

    def iterated(group: str) -> tuple[str, str]:
        wins = _difference(study, "sampo_iterative", "sampo", group, "win_rate")
        tokens = _difference(study, "sampo_iterative", "sampo", group, "tokens")
        return above(wins), f"win rate {describe(wins, 3)}; {describe(tokens)} tokens"

    source = PAPER
    return [
        Claim(
            "DPO makes answers longer.",
            source,
            "On mixed pairs, tokens of DPO minus those of the start lie above 0; for each bias of the annotators.",
            [Finding(f"bias {bias:g}", *lengthens(bias)) for bias in sorted({HEADLINE.bias, *BIASES})],
        ),
        Claim(
            "SamPO's answers are shorter than DPO's, at no loss of quality.",
            source,
            f"Tokens of SamPO minus DPO lie below 0, and the difference of win rates lies above -{MARGIN}.",
            _of_groups(shorter),
        ),
        Claim(
            "SamPO improves quality over DPO.", source, "Win rate of SamPO minus DPO lies above 0.", _of_groups(better)
        ),
        Claim(
            "SamPO takes length out of the implicit reward.",
            source,
            f"The correlation of margin and length difference on held-out pairs lies within ±{UNCORRELATED}.",
            _of_groups(uncorrelated),
        ),
        _collapse_claim(study, source),
        *_subset_claims(study, source),
        _beta_claim(study, source),
        Claim(
            "Iterative SamPO is better than SamPO.",
            source,
            "Win rate of three rounds on thirds of pairs and steps, minus one round, lies above 0.",
            _of_groups(iterated),
        ),
    ]


def _collapse_claim(study: Study, source: str) -> Claim:
    def count(method: str) -> tuple[int, int]:
        cells = [c for c in study.cells if c.is_headline and (c.method, c.group) == (method, "short")]
        return sum(collapsed(cell.numbers) for cell in cells), len(cells)

    (dpo, n_dpo), (sampo, n_sampo) = count("dpo"), count("sampo")
    verdict = OPEN
    if min(n_dpo, n_sampo) >= FEW_SEEDS:
        verdict = HOLDS if sampo == 0 and dpo == n_dpo else FAILS if sampo > 0 else OPEN
    evidence = f"collapsed: DPO {dpo} of {n_dpo} seeds, SamPO {sampo} of {n_sampo}"
    return Claim(
        "Trained on pairs whose chosen answer is shorter, DPO collapses and SamPO does not.",
        source,
        f"DPO collapses in all seeds and SamPO in none; collapsed is a win rate below {COLLAPSED} or fewer than "
        f"{HALF_STOPS:.0%} of the answers ending.",
        [Finding("`short`", verdict, evidence)],
    )


def _subset_claims(study: Study, source: str) -> list[Claim]:
    def against(other: str) -> Callable[[str], tuple[str, str]]:
        def judge(group: str) -> tuple[str, str]:
            wins = _difference(study, "sampo", other, group, "win_rate")
            tokens = _difference(study, "sampo", other, group, "tokens")
            return above(wins), f"SamPO minus the other: win rate {describe(wins, 3)}; {describe(tokens)} tokens"

        return judge

    others = {"the tokens with the largest log-ratios": "top_k", "averaging (DPO-SANorm)": "mean_rescaled"}
    return [
        Claim(
            f"Random subsets are better than {what}.",
            source,
            f"Win rate of SamPO minus `{name}` lies above 0.",
            _of_groups(against(name)),
        )
        for what, name in {**others, "their own mean (`expected`)": "expected"}.items()
    ]


def _beta_claim(study: Study, source: str) -> Claim:
    def judge(group: str) -> tuple[str, str]:
        def at(beta: float) -> dict[int, float]:
            return study.values(
                "tokens",
                lambda c: (c.method, c.group) == ("sampo", group) and c.is_at(HEADLINE.learning_rate, beta),
            )

        spread = paired(at(0.05), at(0.3))
        return below(spread), f"tokens at beta 0.05 minus 0.3: {describe(spread)}"

    return Claim(
        "SamPO's answers are shortest with a small beta.",
        f"{source}, Table 7",
        "Tokens at beta 0.05 minus those at 0.3, at the headline's learning rate, lie below 0.",
        _of_groups(judge),
    )


def _change_of_length(study: Study, method: str, group: str) -> dict[int, float]:
    tokens = study.headline(method, group, "tokens")
    return {seed: abs(value - study.starts[seed]["tokens"]) for seed, value in tokens.items()}


def _questions_of_ours(study: Study) -> list[Claim]:
    of_methods = [
        *_claims_of_the_combination(study),
        *_claims_of_the_end_token(study),
        *_claims_of_the_budget(study),
        *_claims_of_the_other_weightings(study),
        *_claims_of_tuned_methods(study),
    ]
    at_the_same = [*_claims_at_equal_kl(study), *_claims_at_equal_win_rate(study)]
    return [*of_methods, *at_the_same, *_claims_of_the_pressure(study)]


Numbers = Callable[[str, str, str], dict[int, float]]  # (method, group, name) -> by seed


def _at_least_as_good(numbers: Numbers, ours: str, other: str) -> list[Finding]:
    def judge(group: str) -> tuple[str, str]:
        wins, tokens, kl = (
            paired(numbers(ours, group, name), numbers(other, group, name)) for name in ("win_rate", "tokens", "kl")
        )
        return above(wins, -MARGIN), f"win rate {describe(wins, 3)}; {describe(tokens)} tokens; KL {describe(kl)}"

    return _of_groups(judge)


def _claims_of_the_combination(study: Study) -> list[Claim]:
    def accurate(group: str) -> tuple[str, str]:
        spread = _difference(study, OURS, "dpo", group, "accuracy")
        return above(spread), f"accuracy {describe(spread, 3)}"

    names = {"dpo": "DPO", "sampo": "SamPO", "rdpo_02": "R-DPO .02", "dpo_learned": "the penalty alone"}
    names |= {"sampo_rejected": "the sampling alone"}
    return [
        *(
            Claim(
                f"`rejected` + `learned` is at least as good as {title}.",
                "sampo",
                f"Win rate of {STUDY_METHODS[OURS].title} minus {title} lies above -{MARGIN}.",
                _at_least_as_good(study.headline, OURS, other),
            )
            for other, title in names.items()
        ),
        Claim(
            "The implicit reward of `rejected` + `learned` is right more often than DPO's.",
            "sampo",
            "Its accuracy on held-out pairs minus DPO's lies above 0.",
            _of_groups(accurate),
        ),
    ]


def _claims_of_the_end_token(study: Study) -> list[Claim]:
    def changes_length_less(changed: str, plain: str) -> Callable[[str], tuple[str, str]]:
        def judge(group: str) -> tuple[str, str]:
            tokens = _difference(study, changed, plain, group, "tokens")
            wins = _difference(study, changed, plain, group, "win_rate")
            spread = paired(*(_change_of_length(study, name, group) for name in (changed, plain)))
            evidence = f"change of length {describe(spread)}; {describe(tokens)} tokens; win rate {describe(wins, 3)}"
            return combine(below(spread), above(wins, -MARGIN)), evidence

        return judge

    changes = (
        ("`keep_end_token` changes length less than plain SamPO", "sampo_end", "sampo"),
        ("With `balance_end_token` DPO changes length less", "dpo_balanced", "dpo"),
        ("With `balance_end_token` SamPO changes length less", "sampo_balanced", "sampo"),
        ("With `balance_end_token` `rejected` + `learned` changes length less", BALANCED, OURS),
    )
    return [
        *(
            Claim(
                f"{what}, at no loss of quality.",
                "sampo",
                f"The absolute change of length against the start, of {STUDY_METHODS[changed].title} minus "
                f"{STUDY_METHODS[plain].title}, lies below 0, and the difference of win rates above -{MARGIN}.",
                _of_groups(changes_length_less(changed, plain)),
            )
            for what, changed, plain in changes
        ),
        *(
            Claim(
                f"`rejected` + `learned` + `balance_end_token` is at least as good as {STUDY_METHODS[other].title}.",
                "sampo",
                f"Difference of win rates above -{MARGIN}.",
                _at_least_as_good(study.headline, BALANCED, other),
            )
            for other in ("dpo", "sampo", OURS, "dpo_balanced", "dpo_learned_balanced")
        ),
    ]


def _claims_of_the_budget(study: Study) -> list[Claim]:
    def at_bias(other: str, bias: float) -> Finding:
        names = ("win_rate", "tokens")
        wins, tokens = (
            paired(*(study.headline(method, "all", name, bias=bias) for method in (DATASET, other))) for name in names
        )
        evidence = f"win rate {describe(wins, 3)}; {describe(tokens)} tokens"
        return Finding(f"bias {bias:g}", above(wins, -MARGIN), evidence)

    def length_neutral(group: str) -> tuple[str, str]:
        spread = paired(study.headline(DATASET, group, "tokens"), study.start("tokens"))
        bound = NEUTRAL * float(np.mean(list(study.start("tokens").values())))
        return within(spread, bound), f"{describe(spread)} tokens"

    title = STUDY_METHODS[DATASET].title
    return [
        *(
            Claim(
                f"{title} is at least as good as {STUDY_METHODS[other].title}.",
                "sampo",
                f"Difference of win rates above -{MARGIN}.",
                _at_least_as_good(study.headline, DATASET, other),
            )
            for other in ("dpo", "sampo", "rdpo_02", BALANCED, "dpo_learned_balanced")
        ),
        *(
            Claim(
                f"{title} is at least as good as {STUDY_METHODS[other].title}, whatever the annotators' length bias.",
                "sampo",
                f"On mixed pairs, difference of win rates above -{MARGIN}; for each bias of the annotators.",
                [at_bias(other, bias) for bias in sorted({HEADLINE.bias, *BIASES})],
            )
            for other in ("dpo", "sampo", BALANCED)
        ),
        Claim(
            f"{title} does not change length.",
            "sampo",
            f"Tokens minus those of the start lie within {NEUTRAL:.0%} of the start's.",
            _of_groups(length_neutral),
        ),
    ]


def _claims_of_the_other_weightings(study: Study) -> list[Claim]:
    compared = (
        *(("otpo", other, "arXiv 2505.18720") for other in ("dpo", "sampo")),
        *(("ld_dpo_balanced", other, "sampo") for other in ("ld_dpo", "dpo_balanced")),
    )
    return [
        Claim(
            f"{STUDY_METHODS[ours].title} is at least as good as {STUDY_METHODS[other].title}.",
            source,
            f"Difference of win rates above -{MARGIN}.",
            _at_least_as_good(study.headline, ours, other),
        )
        for ours, other, source in compared
    ]


def _claims_of_tuned_methods(study: Study) -> list[Claim]:
    def numbers(method: str, group: str, name: str) -> dict[int, float]:
        return {seed: cell.numbers[name] for seed, cell in tuned(study, method, group).items()}

    compared = (
        *(("sampo", "dpo"), *((OURS, other) for other in ("dpo", "sampo", "rdpo_02", "dpo_learned"))),
        *((BALANCED, "dpo"), (BALANCED, OURS)),
        *((DATASET, other) for other in ("dpo", "sampo", "rdpo_02", BALANCED)),
    )
    return [
        Claim(
            f"Both at their best cell of the grid, {STUDY_METHODS[ours].title} is at least as good as "
            f"{STUDY_METHODS[other].title}.",
            "sampo",
            f"Difference of win rates above -{MARGIN}; each seed's cell is the best one of the other seeds.",
            _at_least_as_good(numbers, ours, other),
        )
        for ours, other in compared
    ]


def _claims_at_equal_kl(study: Study) -> list[Claim]:
    def judge(ours: str, other: str, group: str, level: float) -> Finding | None:
        def difference(name: str) -> Spread | None:
            values = (interpolate_grid(study, method, group, name, level=level) for method in (ours, other))
            return paired(*values)

        wins, tokens = difference("win_rate"), difference("tokens")
        if wins is None:
            return None
        evidence = f"win rate {describe(wins, 3)}; {describe(tokens)} tokens"
        return Finding(f"`{group}` at KL {level:g}", above(wins, -MARGIN), evidence)

    def findings(ours: str, other: str) -> list[Finding]:
        found = (judge(ours, other, group, level) for group in GROUPS for level in KL_LEVELS)
        return [finding for finding in found if finding is not None]

    return [
        Claim(
            f"At the same KL, {STUDY_METHODS[ours].title} is at least as good as {STUDY_METHODS[other].title}.",
            "sampo",
            f"Difference of win rates above -{MARGIN}, both interpolated along the grid; where both reach that KL.",
            findings(ours, other),
        )
        for ours, other in _AT_THE_SAME
    ]


def _claims_at_equal_win_rate(study: Study) -> list[Claim]:
    def change(method: str, group: str) -> tuple[dict[int, float], dict[int, float]]:
        found = first_reaching(study, method, group, WIN_RATES[group])
        tokens = {seed: abs(there["tokens"] - study.starts[seed]["tokens"]) for seed, there in found.items()}
        return tokens, {seed: there["kl"] for seed, there in found.items()}

    def judge(ours: str, other: str) -> Callable[[str], tuple[str, str]]:
        def of_group(group: str) -> tuple[str, str]:
            (tokens, kl), (tokens_of_other, kl_of_other) = change(ours, group), change(other, group)
            spread = paired(tokens, tokens_of_other)
            return below(spread), f"change of length {describe(spread)}; KL {describe(paired(kl, kl_of_other))}"

        return of_group

    levels = ", ".join(f"{rate:g} on `{group}`" for group, rate in WIN_RATES.items())
    return [
        Claim(
            f"At the same win rate, {STUDY_METHODS[ours].title} changes length less than "
            f"{STUDY_METHODS[other].title}.",
            "sampo",
            "The absolute change of tokens against the start, of the first minus the other, lies below 0 where each "
            f"first reaches a win rate of {levels}.",
            _of_groups(judge(ours, other)),
        )
        for ours, other in _AT_THE_SAME
    ]


def _claims_of_the_pressure(study: Study) -> list[Claim]:
    def predicts(name: str, where: Callable[[Cell], bool]) -> tuple[str, str]:
        spread = prediction(study, name, where)
        return below(spread), f"rank correlation {describe(spread, 2)}"

    def of_group(group: str) -> Callable[[Cell], bool]:
        return lambda cell: cell.group == group

    conditions: dict[str, Callable[[Cell], bool]] = {"all runs": lambda cell: True}
    conditions |= {f"`{group}`": of_group(group) for group in GROUPS}
    whats = {
        "pressure": "The length pressure of the weights",
        "push": "The length pressure, pairs weighted as in the first gradient,",
    }
    return [
        Claim(
            f"{what} before training predicts the change of length after it.",
            "sampo",
            "Spearman's correlation with log(tokens / tokens of the start), of each seed over its runs, lies "
            "below 0 (negative pressure lengthens).",
            [Finding(condition, *predicts(name, where)) for condition, where in conditions.items()],
        )
        for name, what in whats.items()
    ]

"""On-policy rounds in the lab: does length enter by the choice of pairs, or by the weights of their tokens?

    python -m studies.onpolicy                 # about an hour on a core; resumes after an interruption
    python -m studies.onpolicy --report        # tables and verdicts of the existing records

Each round the policy answers training questions several times, a judge scores the answers, a rule of `sampo.pairs`
makes pairs of them, and a method trains on these pairs. The judge's score is the true quality, a known weight on
length, and noise. Records are appended to `onpolicy.jsonl` in the output folder; a finished run is not run again.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sampo.io import records as results
from sampo.io.records import Record
from sampo.lab.methods import STUDY_METHODS
from sampo.lab.settings import SFT, VERSION, Run, Settings
from sampo.pairs.choice import CHOICES, Candidates, ChoiceSettings, LengthLimit, fit_length_slope

from .analysis import Spread, paired
from .claims import MARGIN, Claim, Finding, above, below, combine, describe
from .page import table
from .plan import small_parser

RECORDS = "onpolicy.jsonl"
METHODS = ("dpo", "sampo", "rejected_learned_dataset_balanced")
RULES = {"best_worst": "", "length_matched": "20%", "capped": "5", "length_regressed": ""}  # rule -> limit of length
BIASES = (0.0, 1.0, 2.0)  # the judge's log-odds for ten tokens more, in the unit of the annotators' bias
SEEDS = 3
QUALITY_SLOPE = 1.5  # of the judge's score, as that of the annotators
LAST = "seconds"  # is written last


@dataclass(frozen=True)
class OnPolicySettings:
    """What all runs share."""

    rounds: int = 2
    steps: int = 50  # of each round, 32 pairs each
    questions: int = 1024  # of each round
    samples: int = 4  # answers to each
    noise: float = 1.0  # standard deviation of the judge's score


@dataclass(frozen=True)
class OnPolicyRun:
    """One run; without a method the start."""

    seed: int
    bias: float = 0.0
    rule: str = ""
    method: str = SFT

    def config(self, settings: OnPolicySettings, lab: Settings) -> dict[str, Any]:
        """Everything the numbers depend on."""
        config = {"experiment": "on-policy", "lab_version": VERSION, "seed": self.seed, "method": self.method}
        config |= lab.of_sampling
        if self.method == SFT:
            return config
        config |= {"bias": self.bias, "rule": self.rule, "limit": RULES[self.rule], **asdict(settings)}
        config |= {name: getattr(lab, name) for name in ("learning_rate", "beta", "batch_size")}
        return config | STUDY_METHODS[self.method].options


def onpolicy_plan(seeds: int = SEEDS) -> list[OnPolicyRun]:
    """All runs, a seed after the other."""
    cells = list(itertools.product(BIASES, RULES, METHODS))
    return [run for seed in range(seeds) for run in (OnPolicyRun(seed), *(OnPolicyRun(seed, *c) for c in cells))]


# --- running ---------------------------------------------------------------------------------------------------------


class OnPolicyBench:
    """What the runs of one seed share: the lab's bench, and the answers of the first round."""

    def __init__(self, seed: int, settings: OnPolicySettings, lab: Settings, folder: Path):
        from sampo.lab.experiment import Bench, no_progress

        self.seed, self.settings, self.lab = seed, settings, lab
        self.bench = Bench(seed, lab, folder, no_progress)
        self._first: tuple[list[Any], list[list[int]]] | None = None

    def measure(self, run: OnPolicyRun) -> Iterator[tuple[str, float | None, int, tuple[float, float] | None]]:
        """Train and measure; `(name, value, n, interval)`."""
        from sampo.lab.experiment import train_round

        began = time.perf_counter()
        policy = self.bench.load_start()
        if run.method != SFT:
            lab_run = Run(run.seed, "all", run.method, self.lab)
            for number in range(self.settings.rounds):
                pairs, slope = self._make_pairs(run, policy, number)
                longer = float(np.mean([pair.length_difference > 0 for pair in pairs]))
                yield f"pairs/{number + 1}", float(len(pairs)), self.settings.questions, None
                yield f"chosen_longer/{number + 1}", longer, len(pairs), None
                yield f"judge_slope/{number + 1}", slope, self.settings.questions, None
                train_round(self.bench, lab_run, policy, pairs, self.settings.steps, lambda step: None)
        for one in self.bench.measure_answers(policy.eval(), sampling_seed=3 if run.method != SFT else 2):
            yield one.name, one.value, one.n, one.interval
        yield LAST, time.perf_counter() - began, 1, None

    def _make_pairs(self, run: OnPolicyRun, policy: Any, number: int) -> tuple[list[Any], float | None]:
        """The pairs of a round, and the judge's slope on log length."""
        from sampo.lab.model import EOS
        from sampo.lab.world import WorldPair

        questions, answers = self._answer(policy, number)
        noise = self.bench.world.rng(f"judge of round {number}").normal(scale=self.settings.noise, size=len(answers))
        n, candidates, kept = self.settings.samples, [], []
        for i, question in enumerate(questions):
            ended = [j for j in range(i * n, (i + 1) * n) if answers[j][-1] == EOS]
            qualities = np.array([self.bench.world.quality(question, answers[j]) for j in ended], dtype=float)
            lengths = np.array([len(answers[j]) for j in ended])
            scores = QUALITY_SLOPE * qualities + run.bias * lengths / 10 + noise[ended]
            if len(ended) > 1:
                candidates.append(Candidates(str(i), scores, lengths))
                kept.append((question, ended))
        limit = RULES[run.rule]
        settings = ChoiceSettings(limit=LengthLimit(limit)) if limit else ChoiceSettings()
        pairs = [
            WorldPair(question, answers[ended[chosen]], answers[ended[rejected]])
            for (question, ended), picks in zip(kept, CHOICES[run.rule].choose(candidates, settings), strict=True)
            for chosen, rejected in picks
            if answers[ended[chosen]] != answers[ended[rejected]]
        ]
        return pairs, fit_length_slope(candidates).value

    def _answer(self, policy: Any, number: int) -> tuple[list[Any], list[list[int]]]:
        """Questions of a round, and `samples` answers to each, those of one question together."""
        if number == 0 and self._first is not None:  # the start's, the same for all runs
            return self._first
        from sampo.lab.model import sample_answers

        rng = self.bench.world.rng(f"questions of round {number}")
        questions = [self.bench.world.question(rng, held_out=False) for _ in range(self.settings.questions)]
        prompts = [question.prompt for question in questions for _ in range(self.settings.samples)]
        seed = 1000 + 10 * self.seed + number
        answers = sample_answers(policy.eval(), prompts, seed=seed, max_tokens=self.lab.max_tokens)
        if number == 0:
            self._first = questions, answers
        return questions, answers


def run_missing(folder: Path, seeds: int, settings: OnPolicySettings, lab: Settings) -> None:
    """Run what has no records yet."""
    path = folder / RECORDS
    done = {record.key for record in results.read(path) if record.name == LAST}
    bench: OnPolicyBench | None = None
    runs = onpolicy_plan(seeds)
    for number, run in enumerate(runs, 1):
        config = run.config(settings, lab)
        if results.config_key(config) in done:
            continue
        if bench is None or bench.seed != run.seed:
            bench = OnPolicyBench(run.seed, settings, lab, folder)
        about = {"config": config, "seed": run.seed, "command": "python -m studies.onpolicy", **results.provenance()}
        numbers = list(bench.measure(run))
        results.append(path, [Record(name=n, value=v, n=c, interval=i, **about) for n, v, c, i in numbers])
        shown = {name: value for name, value, _, _ in numbers}
        print(
            f"{number} of {len(runs)}: seed {run.seed}, bias {run.bias:g}, {run.rule or 'start'}, {run.method}: "
            f"{shown['tokens']:.1f} tokens, win rate {shown['win_rate']:.3f}, KL {shown['kl']:.1f}",
            flush=True,
        )


# --- analysis --------------------------------------------------------------------------------------------------------


class OnPolicyStudy:
    """The finished runs."""

    def __init__(self, records: Sequence[Record]):
        finished = {record.key for record in records if record.name == LAST}
        self._values: dict[tuple, dict[int, float]] = {}
        for record in records:
            if record.key in finished and record.value is not None:
                config = record.config
                cell = tuple(config.get(name) for name in ("bias", "rule", "method"))
                self._values.setdefault((record.name, *cell), {})[config["seed"]] = record.value

    def values(self, name: str, bias: float, rule: str, method: str) -> dict[int, float]:
        """A number of each seed."""
        return self._values.get((name, bias, rule, method), {})

    def start(self, name: str) -> dict[int, float]:
        """A number of each seed's start."""
        return self._values.get((name, None, None, SFT), {})

    def change(self, bias: float, rule: str, method: str) -> dict[int, float]:
        """Absolute change of tokens against the start."""
        start = self.start("tokens")
        found = self.values("tokens", bias, rule, method)
        return {seed: abs(value - start[seed]) for seed, value in found.items() if seed in start}


def onpolicy_claims(study: OnPolicyStudy) -> list[Claim]:
    """What was asked before the runs."""
    ours = METHODS[-1]
    title = STUDY_METHODS[ours].title

    def of_biases(judge: Callable[[float], tuple[str, str]]) -> list[Finding]:
        return [Finding(f"bias {bias:g}", *judge(bias)) for bias in BIASES]

    def less(first: tuple[str, str], second: tuple[str, str]) -> Callable[[float], tuple[str, str]]:
        """Whether one cell (rule, method) changes length less than another, at no loss of quality."""

        def judge(bias: float) -> tuple[str, str]:
            change = paired(study.change(bias, *first), study.change(bias, *second))
            wins = paired(*(study.values("win_rate", bias, *cell) for cell in (first, second)))
            evidence = f"change of length {describe(change)}; win rate {describe(wins, 3)}"
            return combine(below(change), above(wins, -MARGIN)), evidence

        return judge

    def lengthens(bias: float) -> tuple[str, str]:
        spread: Spread | None = paired(study.values("tokens", bias, "best_worst", "dpo"), study.start("tokens"))
        return above(spread), f"DPO minus start: {describe(spread)} tokens"

    rule = f"The absolute change of tokens against the start lies lower, and the win rate not by more than {MARGIN}."
    doors = (("length_matched", "dpo"), ("best_worst", ours))
    return [
        Claim(
            "On the policy's own answers, DPO with the best and the worst one makes answers longer.",
            "sampo",
            "Tokens of DPO minus those of the start lie above 0; for each length bias of the judge.",
            of_biases(lengthens),
        ),
        *(
            Claim(
                f"With DPO, `{name}` changes length less than `best_worst`, at no loss of quality.",
                "sampo",
                rule,
                of_biases(less((name, "dpo"), ("best_worst", "dpo"))),
            )
            for name in RULES
            if name != "best_worst"
        ),
        *(
            Claim(
                f"With `best_worst`, {STUDY_METHODS[method].title} changes length less than DPO, at no loss of "
                "quality.",
                "sampo",
                rule,
                of_biases(less(("best_worst", method), ("best_worst", "dpo"))),
            )
            for method in METHODS[1:]
        ),
        Claim(
            f"Choosing pairs of matched length changes length less than weighing tokens ({title}).",
            "sampo",
            rule,
            of_biases(less(*doors)),
        ),
    ]


def onpolicy_table(study: OnPolicyStudy) -> str:
    """Tokens / win rate / KL of each rule and method at each bias, means over seeds."""
    heads = ["choice of pairs", "method", *(f"bias {bias:g}" for bias in BIASES)]
    rows = []
    for rule, method in itertools.product(RULES, METHODS):
        cells = []
        for bias in BIASES:
            found = [list(study.values(name, bias, rule, method).values()) for name in ("tokens", "win_rate", "kl")]
            seeds = len(found[0])
            text = " / ".join(f"{np.mean(v):.{d}f}" for v, d in zip(found, (1, 3, 1), strict=True)) if seeds else "–"
            cells.append(f"{text} ({seeds})" if seeds else text)
        rows.append([f"`{rule}`", STUDY_METHODS[method].title, *cells])
    return table(heads, rows)


def onpolicy_verdicts(study: OnPolicyStudy) -> str:
    """Each claim with its verdict and numbers."""
    return "\n\n".join(claim.details for claim in onpolicy_claims(study))


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then report."""
    args = small_parser("onpolicy", __doc__ or "", SEEDS).parse_args(argv)
    if not args.report:
        from sampo.lab.experiment import work_quietly

        work_quietly()
        run_missing(args.out, args.seeds, OnPolicySettings(), Settings())
    study = OnPolicyStudy(results.read(args.out / RECORDS))
    print(f"{onpolicy_table(study)}\n\n{onpolicy_verdicts(study)}")


if __name__ == "__main__":
    main()

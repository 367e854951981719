"""A trial in the lab: is a learned length penalty better if it need not be linear in the length difference?

    python -m studies.piecewise                 # about ten minutes on a core; resumes after an interruption
    python -m studies.piecewise --report        # table and verdicts of the existing records

The penalty of sampo is θ·(T_w − T_l)/s, where s is the root mean square of T_w − T_l. Here it is continuous, linear on
each of four intervals with borders −s, 0 and s, and each slope is learned as θ is. With equal slopes it is the linear
one. FiMi-RM (arXiv 2505.12843) fits a reward model's length bias by a curve; this is the same idea in the loss. The
linear runs are those of `studies.run`, from the same folder or from here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sampo.io import records as results
from sampo.io.records import Record
from sampo.lab.experiment import RECORDS as LINEAR_RECORDS
from sampo.lab.experiment import Benches, no_progress, run_all, work_quietly
from sampo.lab.settings import GROUPS, SFT, Run, Settings
from sampo.training.length_penalty import LengthPenalty, Theta

from .analysis import Spread, Study, paired
from .claims import DATASET, MARGIN, Claim, Finding, above, below, combine, describe
from .page import table
from .plan import small_parser

RECORDS = "piecewise.jsonl"
SEEDS = 5
STRONG_BIAS = 4.0
LAST = "train_seconds"  # is written last
INTERVALS = ("below -s", "-s to 0", "0 to s", "above s")


def split(difference: Tensor, border: float) -> Tensor:
    """Parts of T_w − T_l in each of the four intervals; their sum is T_w − T_l.

    Args:
        difference: `(B,)` tokens.
        border: s, tokens.

    Returns:
        `(4, B)` tokens.
    """
    return torch.stack(
        [
            (difference + border).clamp(max=0),
            difference.clamp(-border, 0),
            difference.clamp(0, border),
            (difference - border).clamp(min=0),
        ]
    )


class PiecewisePenalty(LengthPenalty):
    """A penalty with a slope for each interval. A batch must be a step, as in the lab."""

    def __init__(self, args: Any, *rest: Any, **kwargs: Any):
        super().__init__(args, *rest, **kwargs)
        start = args.length_penalty_start * self.scale
        self.thetas = [Theta(args.length_penalty_lr, start) for _ in INTERVALS]

    def shift(self, lengths: Tensor) -> Tensor:
        """The `(B,)` shift of the chosen score."""
        for theta in self.thetas:
            theta.step()  # by the gradients of the last batch, if there was one
        shift = self._slopes() @ self._parts(lengths) / (self.scale * self._args.beta)
        return shift.requires_grad_(torch.is_grad_enabled())

    def learn(self, loss: Tensor, shift: Tensor | None, lengths: Tensor) -> None:
        """Add the gradients of a batch."""
        if shift is None or not shift.requires_grad:
            return
        (gradient,) = torch.autograd.grad(loss, shift, retain_graph=True)
        by_slope = self._parts(lengths) @ gradient.detach() / (self.scale * self._args.beta)
        for theta, value in zip(self.thetas, by_slope.tolist(), strict=True):
            theta.gradients.append(value)

    def metrics(self) -> dict[str, float]:
        """The slopes: what one more token adds to the logit, by interval."""
        return {f"slope/{name}": theta.value / self.scale for name, theta in zip(INTERVALS, self.thetas, strict=True)}

    def _slopes(self) -> Tensor:
        return torch.tensor([theta.value for theta in self.thetas])

    def _parts(self, lengths: Tensor) -> Tensor:
        chosen, rejected = lengths.float().chunk(2)
        return split(chosen - rejected, self.scale)


def piecewise_plan(settings: Settings, seeds: int = SEEDS) -> list[Run]:
    """The recommended method on every group of pairs, and on mixed pairs of annotators who like length."""
    cells = [*((group, settings.bias) for group in GROUPS), ("all", STRONG_BIAS)]
    return [Run(seed, group, DATASET, replace(settings, bias=bias)) for seed in range(seeds) for group, bias in cells]


def run_missing(folder: Path, runs: Sequence[Run], about: Mapping[str, Any]) -> None:
    """Run what has no records yet, linear and piecewise."""
    linear = [*dict.fromkeys(Run(run.seed, "", SFT, run.settings) for run in runs), *runs]
    for run, _ in run_all(linear, folder, command=about["command"], progress=no_progress):
        print(f"linear: {run.title}", flush=True)
    benches, path = Benches(folder, no_progress), folder / RECORDS
    done = {record.key for record in results.read(path) if record.name == LAST}
    for run in runs:
        config = {**run.config, "penalty": "piecewise"}
        if results.config_key(config) in done:
            continue
        found = [
            Record(name=name, value=value, n=n, interval=interval, config=config, seed=run.seed, **about)
            for name, value, n, interval in measure(benches, run)
        ]
        results.append(path, found)
        shown = {record.name: record.value for record in found}
        print(f"piecewise: {run.title}: {shown['tokens']:.1f} tokens, win rate {shown['win_rate']:.3f}", flush=True)


def measure(benches: Benches, run: Run) -> Iterator[tuple[str, float | None, int, tuple[float, float] | None]]:
    """Train with the piecewise penalty and measure; `(name, value, n, interval)`."""
    made: list[PiecewisePenalty] = []

    def make(*args: Any, **kwargs: Any) -> PiecewisePenalty:
        made.append(PiecewisePenalty(*args, **kwargs))
        return made[-1]

    with patch("sampo.trainer.LengthPenalty", make):
        numbers = benches.of(run).measure(run)
    for name, value in made[-1].metrics().items():
        yield name, value, run.settings.pairs, None
    yield from ((one.name, one.value, one.n, one.interval) for one in numbers)


# --- analysis --------------------------------------------------------------------------------------------------------


class Trial:
    """Piecewise and linear runs with the same seed and pairs."""

    def __init__(self, linear: Sequence[Record], piecewise: Sequence[Record]):
        starts = [record for record in linear if record.config["method"] == SFT]
        self.studies = {"linear": Study(linear), "piecewise": Study([*starts, *piecewise])}

    def values(self, penalty: str, name: str, group: str, bias: float) -> dict[int, float]:
        """A number of each seed."""
        return self.studies[penalty].headline(DATASET, group, name, bias=bias)

    def change(self, penalty: str, group: str, bias: float) -> dict[int, float]:
        """Absolute change of tokens against the start."""
        start = self.studies[penalty].start("tokens")
        return {
            seed: abs(tokens - start[seed]) for seed, tokens in self.values(penalty, "tokens", group, bias).items()
        }


def conditions() -> dict[str, tuple[str, float]]:
    """Group of pairs and annotators' bias of each condition."""
    mild = Settings().bias
    return {**{f"`{group}`": (group, mild) for group in GROUPS}, f"`all`, bias {STRONG_BIAS:g}": ("all", STRONG_BIAS)}


def piecewise_claims(trial: Trial) -> list[Claim]:
    """What was asked before the runs."""

    def more_wins(group: str, bias: float) -> Spread | None:
        return paired(*(trial.values(one, "win_rate", group, bias) for one in ("piecewise", "linear")))

    def more_change(group: str, bias: float) -> Spread | None:
        return paired(*(trial.change(one, group, bias) for one in ("piecewise", "linear")))

    better, less = [], []
    for name, where in conditions().items():
        wins, change = more_wins(*where), more_change(*where)
        better.append(Finding(name, above(wins), f"win rate {describe(wins, 3)}"))
        evidence = f"change of length {describe(change)}; win rate {describe(wins, 3)}"
        less.append(Finding(name, combine(below(change), above(wins, -MARGIN)), evidence))
    return [
        Claim(
            "A piecewise linear penalty has a higher win rate than a linear one.",
            "arXiv 2505.12843",
            "The difference in win rate lies above 0.",
            better,
        ),
        Claim(
            "A piecewise linear penalty changes length less than a linear one, at no loss of quality.",
            "arXiv 2505.12843",
            f"The absolute change of tokens against the start lies lower, and the win rate not by more than {MARGIN}.",
            less,
        ),
    ]


def piecewise_table(trial: Trial) -> str:
    """Tokens / win rate / KL of both, and the slopes, means over seeds."""

    def mean(penalty: str, name: str, where: tuple[str, float], form: str) -> str:
        values = trial.values(penalty, name, *where).values()
        return format(sum(values) / len(values), form) if values else "–"

    slopes = {"linear": ["penalty_per_token"] * 4, "piecewise": [f"slope/{name}" for name in INTERVALS]}
    rows = []
    for title, where in conditions().items():
        for penalty, names in slopes.items():
            shown = {"tokens": ".1f", "win_rate": ".3f", "kl": ".1f"}
            numbers = " / ".join(mean(penalty, name, where, form) for name, form in shown.items())
            seeds = len(trial.values(penalty, "tokens", *where))
            rows.append([title, penalty, str(seeds), numbers, *(mean(penalty, name, where, "+.3f") for name in names)])
    heads = ["pairs", "penalty", "seeds", "tokens / win rate / KL", *(f"slope {name}" for name in INTERVALS)]
    return table(heads, rows)


def piecewise_verdicts(trial: Trial) -> str:
    """Each claim with its verdict and numbers."""
    return "\n\n".join(claim.details for claim in piecewise_claims(trial))


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then report."""
    args = small_parser("piecewise", __doc__ or "", SEEDS).parse_args(argv)
    if not args.report:
        work_quietly()
        about = {"command": "python -m studies.piecewise", **results.provenance()}
        run_missing(args.out, piecewise_plan(Settings(), args.seeds), about)
    trial = Trial(results.read(args.out / LINEAR_RECORDS), results.read(args.out / RECORDS))
    print(f"{piecewise_table(trial)}\n\n{piecewise_verdicts(trial)}")


if __name__ == "__main__":
    main()

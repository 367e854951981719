"""A weighting tried and judged by the lab: the end token weighs what makes the length pressure of each response zero.

    python benchmarks/balanced_end.py --out balanced

A response's part of the length pressure is Σ_t w_t·(1[y_t = end] − p_end(t)). With the other tokens' w_t given, it is
zero if the end token weighs Σ_{t before} w_t·p_end(t) / (1 − p_end(T)), p_end being the reference's. The start of
`sampo lab` is the reference; each method below keeps its end token and is trained with that weight in place of 1, and
as it is for comparison, from the same start on the same pairs with the same subsets. A finished run is not run again.
`python docs/build.py` makes the table of docs/results.md from docs/study/balanced_end.jsonl.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from sampo import results
from sampo.lab import model as lm
from sampo.lab.analysis import over_seeds
from sampo.lab.experiment import Bench, unseen
from sampo.lab.settings import GROUPS, Run, Settings
from sampo.lab.study_page import NONE, spread_text
from sampo.lab.study_page import table as markdown
from sampo.trainer import SamPOTrainer

KEPT = (("keep_end_token", True),)
METHODS = {"sampo_end": (), "expected_end": (), "sampo_rejected_learned": KEPT}  # name in the lab, its changes
TITLES = {"sampo_end": "SamPO", "expected_end": "expected", "sampo_rejected_learned": "SamPO, rejected + learned"}
COLUMNS = {"tokens": 1, "win_rate": 3, "quality": 2, "kl": 1, "accuracy": 3}  # digits
LAST = "train_seconds"


def balanced(weights: Tensor, end: Tensor, end_probs: Tensor) -> Tensor:
    """The weights with the end token's so that Σ_t w_t·(1[y_t = end] − p_end(t)) is 0 in every row that has one.

    Args:
        weights: `(2B, N)`, 0 outside the completion.
        end: `(2B, N)` bool, the end token of each completion.
        end_probs: `(2B, N)`, the reference's probability of the end token.
    """
    before = (weights * ~end * end_probs).sum(dim=1, keepdim=True)
    return torch.where(end, before / (1 - end_probs).clamp(min=1e-3), weights)


class BalancedTrainer(SamPOTrainer):
    """`SamPOTrainer` with that weight; `start` is the reference."""

    start: torch.nn.Module

    def _weigh(self, pairs, draw, log_ratios=None):
        ids, real = pairs.inputs["input_ids"], pairs.inputs["attention_mask"]
        with torch.no_grad():
            logits = self.start(input_ids=ids, attention_mask=real).logits[:, :-1]
        policy, _ = super()._weigh(pairs, draw, log_ratios)
        weights = balanced(policy, pairs.end, logits.float().softmax(dim=-1)[..., lm.EOS])
        return weights, weights


def measure(bench: Bench, run: Run, *, balance: bool) -> list:
    """The lab's numbers of one run."""
    if not balance:
        return bench.measure(run)
    BalancedTrainer.start = bench.start
    with mock.patch("sampo.trainer.SamPOTrainer", BalancedTrainer):
        return [number for number in bench.measure(run) if number.name not in ("pressure", "push")]


def table(records: Sequence[results.Record]) -> str:
    """Balanced minus kept with weight 1, paired by seed, and the numbers of both."""
    found: dict[tuple, dict[int, float]] = {}
    for record in records:
        of = record.config
        found.setdefault((of["group"], of["method"], of["balanced"], record.name), {})[of["seed"]] = record.value
    rows = []
    for group in GROUPS:
        for method, title in TITLES.items():
            pairs = {name: [found.get((group, method, flag, name), {}) for flag in (False, True)] for name in COLUMNS}
            cells = [_change(*pairs[name], digits) for name, digits in COLUMNS.items()]
            rows.append([f"`{group}`", title, str(len(pairs["tokens"][1])), *cells])
    heads = ["trained on", "method, end kept", "seeds", "tokens", "win rate", "true quality", "KL", "accuracy"]
    return markdown(heads, rows)


def _change(kept: dict[int, float], other: dict[int, float], digits: int) -> str:
    seeds = sorted(kept.keys() & other.keys())
    if not seeds:
        return NONE
    means = " → ".join(f"{mean(numbers[seed] for seed in seeds):.{digits}f}" for numbers in (kept, other))
    difference = over_seeds([other[seed] - kept[seed] for seed in seeds])
    return f"{means} ({spread_text(difference, digits, sign=True)})"


def main(words: Sequence[str] | None = None) -> None:
    """Train, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("balanced"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=Settings().steps)
    args = parser.parse_args(words)
    command = shlex.join(["python", "benchmarks/balanced_end.py", *(sys.argv[1:] if words is None else words)])
    path, settings = args.out / "records.jsonl", Settings(steps=args.steps)
    known = {record.key for record in results.read(path) if record.name == LAST}
    plan = [
        (Run(seed, group, method, settings, changes), balance)
        for seed in range(args.seeds)
        for group in GROUPS
        for method, changes in METHODS.items()
        for balance in (False, True)
    ]
    bench = None
    torch.set_num_threads(1)
    for run, balance in tqdm(plan):
        config = {**run.config, "experiment": "balanced end", "balanced": balance}
        if results.config_key(config) in known:
            continue
        if bench is None or not bench.serves(run):
            bench = Bench(run.seed, settings, args.out, unseen)
        numbers = measure(bench, run, balance=balance)
        about = {"config": config, "seed": run.seed, "command": command, **results.provenance()}
        results.append(path, [results.Record(**number._asdict(), **about) for number in numbers])
    print(table(results.read(path)))


if __name__ == "__main__":
    main()

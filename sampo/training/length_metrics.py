"""The metrics of length, over a full logging window or evaluation set and all processes.

The length of a response is the number of its completion tokens after truncation (`sampo.data.lengths`).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .batch import PairBatch, Scored


class LengthSums:
    """Running sums over pairs, for metrics over a full logging window or evaluation set and all processes.

    Means of batches would depend on the batch size; sums do not.

    Attributes:
        columns: the sums, by name; a window of a checkpoint continues with them.
    """

    def __init__(self, columns: dict[str, float] | None = None):
        self.columns: dict[str, float] = dict(columns or {})

    def add(self, pairs: dict[str, np.ndarray]) -> None:
        """Add pairs.

        Args:
            pairs: `(B,)` columns: `chosen_tokens`, `rejected_tokens`, `selected_tokens` (of both responses), `margin`
                (of implicit rewards), and if known `dpo_margin` (over all tokens) and `pressure`.
        """
        difference = pairs["chosen_tokens"] - pairs["rejected_tokens"]
        longer, shorter = difference > 0, difference < 0
        columns = {**pairs, "n": np.ones_like(difference), "longer": longer, "shorter": shorter}
        columns |= {"d": difference, "dd": difference**2}
        for name in ("margin", "dpo_margin"):
            if name in pairs:
                right = pairs[name] > 0
                columns |= {f"{name}^2": pairs[name] ** 2, f"{name}*d": pairs[name] * difference}
                columns |= {f"{name}>0,longer": right & longer, f"{name}>0,shorter": right & shorter}
        for name, values in columns.items():
            self.columns[name] = self.columns.get(name, 0.0) + float(values.sum())

    def metrics(self, *, by_class: bool = False) -> dict[str, float]:
        """The metrics of docs/metrics.md, without those that are undefined (such as a correlation of one pair).

        Args:
            by_class: with the accuracy where the chosen response is longer, and where it is shorter, also without
                `dpo_margin`.
        """
        sums = self.columns
        if not sums:
            return {}
        n, tokens = sums["n"], sums["chosen_tokens"] + sums["rejected_tokens"]
        metrics = {
            "length/chosen": sums["chosen_tokens"] / n,
            "length/rejected": sums["rejected_tokens"] / n,
            "length/chosen_longer": sums["longer"] / n,
            "length/selected": sums["selected_tokens"] / tokens if tokens else 0.0,
        }
        metrics |= self._of_margin("margin", prefix="")
        if by_class or "dpo_margin" in sums:
            metrics |= self._accuracies("margin", prefix="")
        if "dpo_margin" in sums:
            metrics |= self._accuracies("dpo_margin", prefix="dpo/")
            metrics |= self._of_margin("dpo_margin", prefix="dpo/")
        if "pressure" in sums:
            metrics["length_gap/pressure"] = sums["pressure"] / n
        return metrics

    def _of_margin(self, name: str, prefix: str) -> dict[str, float]:
        sums, n = self.columns, self.columns["n"]
        var_d = sums["dd"] - sums["d"] ** 2 / n
        var_m = sums[f"{name}^2"] - sums[name] ** 2 / n
        cov = sums[f"{name}*d"] - sums[name] * sums["d"] / n
        # what cancels to rounding is no variance: at the first step all margins are 0
        known_d = var_d > 1e-9 * sums["dd"]
        known_m = var_m > 1e-9 * sums[f"{name}^2"]
        metrics = {}
        if known_d:
            metrics[f"{prefix}length_gap/slope"] = cov / var_d
        if known_d and known_m:
            metrics[f"{prefix}length_gap/correlation"] = cov / (var_d * var_m) ** 0.5
        return metrics

    def _accuracies(self, name: str, prefix: str) -> dict[str, float]:
        return {
            f"{prefix}accuracies/chosen_{side}": self.columns[f"{name}>0,{side}"] / self.columns[side]
            for side in ("longer", "shorter")
            if self.columns[side]
        }


class LengthRecorder:
    """Records the pairs of each step, and gives the metrics when something is logged.

    Args:
        beta: of the implicit reward.
        gather: a tensor of one row per pair, of all processes, without rows that were repeated to fill a batch.
    """

    def __init__(self, beta: float, gather: Callable[[Tensor], Tensor] = lambda rows: rows):
        self._beta, self._gather = beta, gather
        self.sums = {"train": LengthSums(), "eval": LengthSums()}

    def record(self, batch: PairBatch, scored: Scored, mode: str) -> None:
        """Add the pairs of a batch.

        Args:
            batch: of B pairs.
            scored: its log-probs.
            mode: `train` or `eval`; in evaluation all tokens were scored.
        """
        chosen, rejected = batch.lengths.chunk(2)
        selected = torch.stack([(draw.weights > 0).sum(dim=1).float() for draw in scored.draws]).mean(dim=0)  # (2B,)
        columns = {
            "chosen_tokens": chosen,
            "rejected_tokens": rejected,
            "selected_tokens": selected.view(2, -1).sum(dim=0),
            "margin": margins(self._beta, scored.mean_scores),
        }
        if mode == "eval":
            columns["dpo_margin"] = margins(self._beta, (scored.logps.detach() - scored.ref_logps).sum(dim=1))
        if scored.pressure is not None:
            columns["pressure"] = scored.pressure
        self.add(columns, mode)

    def add(self, columns: dict[str, Tensor], mode: str) -> None:
        """Add the pairs of a batch by their columns.

        Args:
            columns: `(B,)` each, as `LengthSums.add` takes them.
            mode: `train` or `eval`.
        """
        rows = self._gather(torch.stack([column.float() for column in columns.values()], dim=1))  # (B, columns)
        self.sums[mode].add(dict(zip(columns, rows.cpu().double().numpy().T, strict=True)))

    def take_metrics(self, mode: str) -> dict[str, float]:
        """The metrics since the last call."""
        sums, self.sums[mode] = self.sums[mode], LengthSums()
        return sums.metrics(by_class=mode == "eval")

    def state(self) -> dict[str, float]:
        """The sums of the training's open window, for a checkpoint."""
        return self.sums["train"].columns

    def restore(self, state: dict[str, float]) -> None:
        """Continue the window of a checkpoint."""
        self.sums["train"] = LengthSums(state)


def margins(beta: float, scores: Tensor) -> Tensor:
    """`(B,)` β·(S_w − S_l) of `(2B,)` scores."""
    chosen, rejected = (beta * scores).chunk(2)
    return chosen - rejected

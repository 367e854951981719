"""SimPO, CPO, ORPO and KTO by TRL's own trainers, with what a run of sampo has beside its loss.

Tokens, loss and gradients are TRL's, to the bit. Added are the checks before a step, complete checkpoints and exact
resume, the metrics of length, the stop at a loss that is not finite, and the card.

1. A pair whose prompt alone fills `max_length` is dropped and counted, as in DPO. `CPOTrainer` and `ORPOTrainer` would
   train on an empty response, whose mean log-prob is NaN.
2. KTO takes single responses. Each pair gives a desirable and an undesirable one, in one order drawn by the seed:
   `KTOTrainer` does not shuffle, and TRL's `unpair_preference_dataset` puts up to 1,000 desirable ones first. Batch
   sizes are numbers of pairs here too, so a batch has twice as many responses.

What we rely on in TRL 1.16, pinned by tests/training/test_baselines.py: `get_batch_loss_metrics(model, batch,
train_eval)` of CPO and ORPO calls `cpo_loss` or `odds_ratio_loss` once, which return losses and rewards, `(B,)` each;
`_stored_metrics[mode][name]` is a list that `log` averages; in the columns `chosen_labels` and `rejected_labels` the
prompt is -100, and a response that is not truncated ends with EOS.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from trl import KTOConfig, KTOTrainer
from trl.data_utils import unpair_preference_dataset
from trl.import_utils import TRLExperimentalWarning

from ..checkpointing.resume import ResumableTrainer
from ..data.lengths import TokenCounts, count_tokens
from ..data.tokenize import tokenize_pairs
from ..logs import get_logger
from .description import describe_reference
from .length_metrics import LengthRecorder
from .model_card import CardTrainer
from .preflight import check_data, check_tokens, refuse_another_engine, refuse_separate_processes

with warnings.catch_warnings():  # TRL is pinned to one minor version, within which they do not change
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

logger = get_logger(__name__)

SIMPO_PAPER = {
    "title": "SimPO: Simple Preference Optimization with a Reference-Free Reward",
    "id": "2405.14734",
    "citation": """\
@inproceedings{meng2024simpo,
    title        = {{SimPO: Simple Preference Optimization with a Reference-Free Reward}},
    author       = {Yu Meng and Mengzhou Xia and Danqi Chen},
    year         = 2024,
    booktitle    = {Advances in Neural Information Processing Systems},
}""",
}


@dataclass
class SimPOConfig(CPOConfig):
    """TRL's `CPOConfig` with the loss of SimPO and the defaults of its authors' `SimPOConfig`."""

    loss_type: str = field(default="simpo", metadata={"help": "That of SimPO.", "choices": ["simpo"]})
    beta: float = field(default=2.0, metadata={"help": "Factor of the mean log-prob of a response's tokens."})
    cpo_alpha: float = field(
        default=0.0, metadata={"help": "Weight of the negative log-likelihood of the chosen responses; 0 is SimPO."}
    )


@dataclass
class PairsKTOConfig(KTOConfig):
    """TRL's `KTOConfig` for pairs: batch sizes are numbers of pairs, and a batch has twice as many responses."""

    def __post_init__(self) -> None:
        self.per_device_train_batch_size *= 2
        self.per_device_eval_batch_size *= 2
        super().__post_init__()


class BaselineTrainer(CardTrainer, ResumableTrainer):
    """What is added to each of TRL's trainers; takes pairs, and the arguments of TRL's trainer by name.

    Attributes:
        id_columns: of the tokenised data, that of the prompts first.
        title: of the method, in words.

    Raises:
        PreferenceDataError: the data has missing columns or bad rows.
        ValueError: data or tokens that cannot be trained on.
        FloatingPointError: in training, a loss that is not finite.
    """

    id_columns: tuple[str, ...]
    title: str

    def __init__(self, *, args: Any, train_dataset: Any, eval_dataset: Any, processing_class: Any, **models: Any):
        refuse_separate_processes(args)
        check_data(args, train_dataset, eval_dataset, processing_class)
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.reference_is_start = models.get("ref_model") is None
        self.token_counts = {}
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(args=args, processing_class=processing_class, **self.lay_out(args, data), **models)
        self.keep_rows_with_tokens()
        check_tokens(self)
        for name, counts in self.token_counts.items():
            log = logger.warning if counts.dropped or counts.identical else logger.info
            log(f"{name} data: {counts.describe(args.max_length)}")
        self.length_recorder = LengthRecorder(args.beta, self.gather_pairs)
        self.make_resumable(carried=self.length_recorder)
        method, reference = self.describe_run()
        logger.info(f"method: {method}")
        logger.info(f"reference: {reference}")

    def lay_out(self, args: Any, data: dict[str, Dataset | None]) -> dict[str, Any]:
        """The pairs as TRL's trainer takes them."""
        return data

    def keep_rows_with_tokens(self) -> None:
        """Drop pairs without a token of a response after truncation."""

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers; another engine than the launch asks for is an error."""
        super().create_accelerator_and_postprocess()
        refuse_another_engine(self.accelerator)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *rest: Any, **kwargs: Any) -> Any:
        """TRL's loss, which must be finite."""
        found: Any = super().compute_loss(model, inputs, return_outputs, *rest, **kwargs)
        loss = found[0] if return_outputs else found
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss must be finite, got {loss.item()} at step {self.state.global_step + 1}. Lower "
                "`learning_rate`, or use bf16 or fp32 instead of fp16."
            )
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log with the metrics of length, and the number of tokens so far."""
        assert self.model is not None
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        logs.update({prefix + name: value for name, value in self.length_recorder.take_metrics(mode).items()})
        if "loss" in logs:
            logs["num_tokens"] = self._total_train_tokens
        super().log(logs, start_time)

    def describe_run(self) -> tuple[str, str]:
        """Method and reference, in words."""
        return f"{self.title}, by TRL's trainer", "none"


class _PairTrainer(BaselineTrainer):
    """For `CPOTrainer` and `ORPOTrainer`, which have the same batches and metrics."""

    id_columns = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
    _total_train_tokens = 0
    _rewards: list[Tensor]  # `(B,)` of the chosen and of the rejected responses of the last batch

    def __init__(self, *, args: Any, **rest: Any):
        args.remove_unused_columns = False  # TRL sets it, with a warning
        super().__init__(args=args, **rest)
        self._metrics = vars(self)["_stored_metrics"]

    def keep_rows_with_tokens(self) -> None:
        """Drop pairs without a token of a response after truncation, and count the others."""
        self.train_dataset, self.token_counts["train"] = self._count(self.train_dataset)
        if self.eval_dataset is not None:
            self.eval_dataset, self.token_counts["eval"] = self._count(self.eval_dataset)

    def _count(self, dataset: Dataset) -> tuple[Dataset, TokenCounts]:
        counts, kept = TokenCounts(), []
        labels = dataset.select_columns(["chosen_labels", "rejected_labels"])
        for number, row in enumerate(labels):
            chosen, rejected = ([label for label in row[name] if label != -100] for name in labels.column_names)
            if not chosen or not rejected:
                continue
            kept.append(number)
            cut = [ids[-1] != self._tokenizer.eos_token_id for ids in (chosen, rejected)]
            counts.cut_chosen, counts.cut_rejected = counts.cut_chosen + cut[0], counts.cut_rejected + cut[1]
            counts.chosen_tokens += len(chosen)
            counts.rejected_tokens += len(rejected)
            counts.identical += chosen == rejected
            counts.longest_row = max(counts.longest_row, *map(len, row.values()))
        counts.endless_chosen, counts.endless_rejected = counts.cut_chosen, counts.cut_rejected
        counts.pairs, counts.dropped = len(kept), len(dataset) - len(kept)
        return (dataset.select(kept) if counts.dropped else dataset), counts

    def get_batch_loss_metrics(self, model: Any, batch: dict[str, Any], train_eval: Any = "train") -> Any:
        """As in TRL; records the pairs."""
        if train_eval == "train":
            self.restore_dataloader()
            tokens = sum(batch[f"{side}_attention_mask"].sum() for side in ("chosen", "rejected"))
            self._total_train_tokens += int(self.accelerator.gather(tokens).sum())
        of_trl: Any = super()
        found = of_trl.get_batch_loss_metrics(model, batch, train_eval)
        chosen, rejected = ((batch[f"{side}_labels"] != -100).sum(dim=1) for side in ("chosen", "rejected"))
        margin = self._rewards[0] - self._rewards[1]
        columns = {"chosen_tokens": chosen, "rejected_tokens": rejected, "selected_tokens": chosen + rejected}
        self.length_recorder.add({**columns, "margin": margin}, train_eval)
        return found

    def _keep_rewards(self, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._rewards = [each.detach() for each in found[1:3]]
        return found


class PairsCPOTrainer(_PairTrainer, CPOTrainer):
    """CPO, arXiv 2401.08417, Eq. 3 and 5."""

    title = "CPO (`trainer: cpo`, arXiv 2401.08417)"

    def cpo_loss(self, *logps: Any) -> Any:
        """As in TRL; keeps the rewards."""
        return self._keep_rewards(super().cpo_loss(*logps))


class PairsSimPOTrainer(PairsCPOTrainer):
    """SimPO, arXiv 2405.14734, Eq. 6."""

    title = "SimPO (`trainer: simpo`, arXiv 2405.14734)"
    _name, _tag_names, _paper = "SimPO", ["trl", "simpo"], SIMPO_PAPER


class PairsORPOTrainer(_PairTrainer, ORPOTrainer):
    """ORPO, arXiv 2403.07691, Eq. 6 and 7."""

    title = "ORPO (`trainer: orpo`, arXiv 2403.07691)"

    def odds_ratio_loss(self, *logps: Any) -> Any:
        """As in TRL; keeps the rewards."""
        return self._keep_rewards(super().odds_ratio_loss(*logps))


class PairsKTOTrainer(BaselineTrainer, KTOTrainer):
    """KTO, arXiv 2402.01306, Eq. 8, on both responses of each pair."""

    id_columns = ("prompt_ids", "completion_ids")
    title = "KTO (`trainer: kto`, arXiv 2402.01306)"
    rows_per_pair = 2

    def lay_out(self, args: Any, data: dict[str, Dataset | None]) -> dict[str, Dataset | None]:
        """Single responses with a label, in an order drawn by the seed; their pairs are counted."""
        found: dict[str, Dataset | None] = {}
        for name, pairs in data.items():
            if pairs is None:
                found[name] = None
                continue
            part = name.removesuffix("_dataset")
            ids = tokenize_pairs(pairs, self._tokenizer, max_length=args.max_length, name=part)  # as `KTOTrainer` does
            self.token_counts[part] = count_tokens(ids, args.max_length)
            self.token_counts[part].dropped = len(pairs) - len(ids)
            read = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
            pairs = pairs.select_columns([column for column in read if column in pairs.column_names])
            found[name] = unpair_preference_dataset(pairs).shuffle(seed=args.seed)
        return found

    def describe_run(self) -> tuple[str, str]:
        """Method and reference, in words."""
        cached = "log-probs of the initial policy, one sum per response, from TRL's cache"
        return super().describe_run()[0], cached if self.precompute_ref_logps else describe_reference(self)


class Baseline(NamedTuple):
    """The config and the trainer of a value of `trainer`."""

    config: type
    trainer: type[BaselineTrainer]


BASELINES = {
    "cpo": Baseline(CPOConfig, PairsCPOTrainer),
    "simpo": Baseline(SimPOConfig, PairsSimPOTrainer),
    "orpo": Baseline(ORPOConfig, PairsORPOTrainer),
    "kto": Baseline(PairsKTOConfig, PairsKTOTrainer),
}

"""Sections of a model card added to TRL's draft: method, data, options, length, versions, command."""

import re
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer

from .. import __version__
from ..data.lengths import TokenCounts
from ..io.command_line import format_argv
from ..io.files import write_atomic
from ..io.versions import versions

_NO_BASE = "This model is a fine-tuned version of [None](https://huggingface.co/None)"
_OPTIONS = (
    *("beta", "loss_type", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "adam_beta1", "adam_beta2"),
    *("weight_decay", "max_grad_norm", "max_length", "truncation_mode", "seed", "bf16", "fp16"),
    *("simpo_gamma", "cpo_alpha", "desirable_weight", "undesirable_weight"),  # of other trainers
)
_ADAPTER = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora")
_LENGTH = re.compile(r"^(eval_)?(\w+_)?(length/|length_gap/|length_penalty/|accuracies/|dpo/)|rewards/accuracies$")


class CardTrainer(Trainer):
    """For trainers of TRL: a card with every saved model, in checkpoints too.

    Attributes:
        dataset_name: a hub id or a file, where the caller knows it.
        rows_per_pair: rows of the data that a pair is trained as.
        token_counts: of each data set.
        reference_is_start: whether the reference is what the training starts from.
    """

    args: Any
    dataset_name: str | None = None
    rows_per_pair = 1
    reference_is_start = True
    token_counts: dict[str, TokenCounts]

    @property
    def reference_is_base(self) -> bool:
        """Whether the reference is the policy with its adapter disabled."""
        adapters = getattr(self.accelerator.unwrap_model(self.model), "peft_config", {})
        return self.reference_is_start and bool(adapters) and "ref" not in adapters

    @abstractmethod
    def describe_run(self) -> tuple[str, str]:
        """Method and reference, in words."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, with the model card: checkpoints have it too."""
        super().save_model(output_dir, _internal_call)
        if self.is_world_process_zero():
            folder = Path(output_dir or str(self.args.output_dir))
            self._write_card(folder, model_name=(self.hub_model_id or Path(str(self.args.output_dir)).name))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card, with method, data, options, length metrics, versions and the command."""
        if self.is_world_process_zero():
            self._write_card(Path(str(self.args.output_dir)), *args, **kwargs)

    def _write_card(self, folder: Path, model_name: Any = None, dataset_name: Any = None, tags: Any = None) -> None:
        draft: Any = partial(super().create_model_card, model_name, tags=tags)
        write_card(self, folder, draft, dataset_name or self.dataset_name)


def write_card(trainer: Any, folder: Path, write_draft: Callable[..., None], dataset_name: str | None) -> None:
    """Write `README.md` into a folder: TRL's draft with method, data, options, lengths, versions and the command.

    Args:
        trainer: Has trained, or is about to.
        folder: Where to.
        write_draft: TRL's `create_model_card`, which takes the name of the data and writes into `args.output_dir`.
        dataset_name: A hub id or a file, if it is known.
    """
    args = trainer.args
    on_hub = dataset_name if dataset_name and not Path(dataset_name).exists() else None
    before, args.output_dir = args.output_dir, str(folder)
    try:
        write_draft(dataset_name=on_hub)
    finally:
        args.output_dir = before
    about, reference = trainer.describe_run()
    loss = f", loss {args.loss_type}" if hasattr(args, "loss_type") else ""
    method = f"Trained with sampo. Method: {about}.\nReference: {reference}. Beta {trainer.beta}{loss}."
    counts = trainer.token_counts.get("train")
    data = "" if dataset_name is None else f"`{dataset_name if on_hub else Path(dataset_name).name}`: "
    data += "streamed." if counts is None else counts.describe(args.max_length)
    path = folder / "README.md"
    card = finish_card(path.read_text(encoding="utf-8"), trainer, {"Method": method, "Data": data}, sys.argv)
    write_atomic(path, card)


def finish_card(draft: str, trainer: Any, sections: dict[str, str], argv: Sequence[str] = ()) -> str:
    """TRL's draft with the base model's name instead of `None`, and further sections at the end.

    Args:
        draft: The card as TRL writes it.
        trainer: The trainer, before or after training.
        sections: Heading -> text, which come first.
        argv: Command line of this process.
    """
    name = Path(str(trainer.model.config._name_or_path or "")).name
    base = f"a fine-tuned version of `{name}`" if name else "fine-tuned from a model that was made in memory"
    text = draft.replace(_NO_BASE, f"This model is {base}")
    text = text.replace('model="None"', f'model="{trainer.hub_model_id or Path(str(trainer.args.output_dir)).name}"')
    lines = f"\n- sampo: {__version__}\n- PEFT: {versions()['peft']}\n- Accelerate: {versions()['accelerate']}"
    text = re.sub(r"(\n- Tokenizers: [^\n]*)", lambda found: found[0] + lines, text, count=1)
    if hasattr(trainer.model, "peft_config"):
        text = text.replace("library_name: transformers", "library_name: peft", 1)
    sections = {
        **sections,
        "Options": describe_options(trainer),
        "Length": describe_length(trainer.state.log_history),
        "Command": f"```bash\n{command}\n```" if (command := format_argv(argv)) else "",
    }
    return text.rstrip() + "\n" + "".join(f"\n## {title}\n\n{body}\n" for title, body in sections.items() if body)


def describe_options(trainer: Any) -> str:
    """A table of the options that determine the result of the training."""
    args = trainer.args
    values = {name: getattr(args, name) for name in _OPTIONS if hasattr(args, name)}
    length = {"max_steps": args.max_steps} if args.max_steps > 0 else {"num_train_epochs": args.num_train_epochs}
    rows = trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
    adapter = getattr(trainer.model, "peft_config", {}).get("default")
    if adapter is not None:
        values["adapter"] = adapter.peft_type
        values |= {name: getattr(adapter, name) for name in _ADAPTER if getattr(adapter, name, None)}
    rows = {**values, **length, "pairs per step": rows // trainer.rows_per_pair, "processes": args.world_size}
    return _format_table(
        ("option", "value"), {f"`{name}`" if " " not in name else name: v for name, v in rows.items()}
    )


def describe_length(log: Sequence[dict[str, Any]]) -> str:
    """The last value of each length-related metric, of training and of evaluation."""
    last = {name: value for entry in log for name, value in entry.items() if _LENGTH.search(name)}
    rows = {f"`{name}`": f"{value:.4g}" for name, value in last.items() if isinstance(value, int | float)}
    return _format_table(("metric", "last value"), rows) if rows else ""


def _format_table(head: tuple[str, str], rows: dict[str, Any]) -> str:
    def cell(value: Any) -> str:
        value = getattr(value, "value", value)  # of an enum
        if isinstance(value, set | frozenset):
            value = sorted(value)
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    body = "".join(f"\n| {name} | {cell(value)} |" for name, value in rows.items())
    return f"| {head[0]} | {head[1]} |\n| --- | --- |{body}"

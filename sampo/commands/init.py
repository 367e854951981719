"""`sampo init`: a first recipe for a model and preference pairs, with the reasons for its method in comments."""

import argparse
import math
import shlex
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..audit.report import issue_lines
from ..io.files import write_atomic
from ..io.tables import clean
from .pair_options import add_treatment, treatment_of
from .recipe_choices import (
    RecipeLine,
    Sizes,
    choose_learning_rate,
    choose_max_length,
    choose_method,
    choose_sizes,
    choose_splits,
    evaluation_lines,
    held_out_lines,
    model_lines,
    write_recipe,
)
from .recipes import refuse_existing
from .shown import say

if TYPE_CHECKING:
    from ..audit.audit import Audit
    from ..training.memory import Shape

TRAININGS = {"lora": "LoRA", "full": "all parameters"}
ASSUMED_GB = 80.0  # of a GPU that is not in this machine
REQUIRED = {"model": "Model, a folder or a hub id", "data": "Preference pairs, a file, a folder or a hub id"}


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo init",
        allow_abbrev=False,
        description="Audit preference pairs and write a recipe for them: method, lengths and batch sizes, each with "
        "its reason. Asks on a terminal for what is not given. No weights are read, and nothing is trained.",
    )
    parser.add_argument("--model", help="folder or hub id of the model to train")
    parser.add_argument("--data", help="file, folder or hub id of preference pairs")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs to train on, 0 for the CPU; default: those here")
    parser.add_argument(
        "--gpu_memory", type=float, metavar="GB", help=f"memory of a GPU; default: as here, else {ASSUMED_GB:.0f}"
    )
    parser.add_argument("--method", choices=list(TRAININGS), help="train an adapter (default), or all weights")
    parser.add_argument("--out", type=Path, metavar="FILE", help="recipe to write; default: MODEL-DATA.yaml")
    parser.add_argument("--name", help="configuration of a hub data set, or sub-folder")
    add_treatment(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask; take the defaults for what is not given")
    return parser


def main(args: argparse.Namespace) -> None:
    """Ask, audit, write, and print the next command."""
    try:
        _complete(args, ask=sys.stdin.isatty() and not args.yes)
        refuse_existing(args.out, "out")
        _write(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"sampo init: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _complete(args: argparse.Namespace, *, ask: bool) -> None:
    """Fill what is not given by answers or defaults.

    Raises:
        ValueError: a required option is missing, or a value cannot be used.
    """
    here, gigabytes = _gpus_here()
    if ask:
        for name, question in REQUIRED.items():
            setattr(args, name, getattr(args, name) or _ask(question))
    if missing := [f"`{name}`" for name in REQUIRED if not getattr(args, name)]:
        raise ValueError(f"{' and '.join(missing)} must be given. Set `--model` and `--data`.")
    data = Path(args.data)
    stem = f"{Path(args.model).name}-{data.name.split('.')[0] if data.is_file() else data.name}"
    defaults: dict[str, tuple[str, Any, Callable[[str], Any]]] = {
        "gpus": ("GPUs to train on, 0 for the CPU", here, int),
        "method": (f"Train an adapter or all weights, {' or '.join(TRAININGS)}", "lora", str),
        "out": ("Recipe to write", Path(f"{stem}.yaml"), Path),
    }
    for name, (question, default, convert) in defaults.items():
        if getattr(args, name) is None:
            answer = _ask(question, default) if ask else ""
            try:
                setattr(args, name, convert(answer) if answer else default)
            except ValueError:
                raise ValueError(f"`{name}` must be a whole number, got {answer!r}.") from None
    args.memory_is_assumed = args.gpu_memory is None and gigabytes is None
    args.gpu_memory = (gigabytes or ASSUMED_GB) if args.gpu_memory is None else args.gpu_memory
    if args.gpus < 0:
        raise ValueError(f"`gpus` must be at least 0, got {args.gpus}.")
    if not 0 < args.gpu_memory < math.inf:
        raise ValueError(f"`gpu_memory` must be a positive number of GB, got {args.gpu_memory}.")
    if args.method not in TRAININGS:
        raise ValueError(f"`method` must be one of {list(TRAININGS)}, got {args.method!r}.")


def _ask(question: str, default: Any = None) -> str:
    """The answer of the user; empty for the default."""
    try:
        return input(f"{question}{'' if default is None else f' [{default}]'}: ").strip()
    except EOFError:
        return ""


def _gpus_here() -> tuple[int, float | None]:
    """Number of GPUs of this machine, and the memory of the first one in GB."""
    import torch

    count = torch.cuda.device_count()
    return count, torch.cuda.get_device_properties(0).total_memory / 1e9 if count else None


@dataclass(frozen=True)
class _Found:
    """What was read of the data and the model; None for what cannot be read, with a sentence in `notes`."""

    audit: "Audit"
    train_split: str
    test_split: str | None
    shape: "Shape | None"
    positions: int | None
    notes: list[str]

    @property
    def pairs(self) -> int:
        return self.audit.overall.pairs


def _write(args: argparse.Namespace) -> None:
    from ..models.load import check_model

    check_model(args.model, tokenizer=True)
    found = _read(args)
    method, reasons = choose_method(found.audit.overall, unit=found.audit.unit)
    max_length = RecipeLine("max_length", 1024, "TRL's default: the lengths in tokens are not known")
    if found.audit.unit == "tokens":
        pairs = found.audit.scans[0].pairs
        length, longer = choose_max_length(pairs.prompt + np.maximum(pairs.chosen, pairs.rejected), found.positions)
        cut = f"{longer:,} of {found.pairs:,} pairs are longer, and are truncated" if longer else "no pair is longer"
        max_length = RecipeLine("max_length", length, cut)
    sizes = choose_sizes(
        found.shape,
        args.method,
        gpus=args.gpus,
        gpu_memory=args.gpu_memory * 1e9 if args.gpus else None,
        max_length=max_length.value,
        pairs=found.pairs,
    )
    notes = [*_size_notes(args, sizes, max_length.value), *found.notes]
    command = _next_command(args, sizes.engine)
    remarks = {"Command": [command], "Method": reasons, "Notes": notes}
    groups = _groups(args, found, [*method, RecipeLine("beta", 0.1)], max_length, sizes)
    title = f"{Path(args.model).name} on {found.audit.label}, {TRAININGS[args.method]}; written by `sampo init`"
    text = write_recipe(title, remarks, groups)
    _check(text, args.out.name)
    say(*issue_lines(found.audit), "", *(clean(reason) for reason in reasons), "", *notes)
    write_atomic(args.out, text)
    say("", f"Written: {args.out}. Read it, then train:", "", f"  {command}")


def _read(args: argparse.Namespace) -> _Found:
    """Audit the pairs to train on, in the tokens of the model if possible, and read the model's configuration."""
    import transformers

    from ..audit.audit import audit_preferences
    from ..data.issues import PreferenceDataError
    from ..data.sources import open_source
    from ..models.load import ModelError, load_tokenizer
    from ..training.memory import read_shape
    from .progress import progress

    train_split, test_split = choose_splits(list(open_source(args.data, args.name)[1]))
    transformers.utils.logging.disable_progress_bar()
    tokenizer, shape, positions, notes = None, None, None, []
    try:
        tokenizer = load_tokenizer(args.model)
    except ModelError as error:
        notes.append(f"The tokenizer could not be loaded, so that lengths are in words: {_short(error)}")
    try:
        shape = read_shape(args.model)
        config = transformers.AutoConfig.from_pretrained(args.model).get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
    except (ValueError, OSError) as error:
        notes.append(f"The shape of the model could not be read, so that the batch sizes are guesses: {_short(error)}")

    def audit_pairs() -> "Audit":
        split = {"name": args.name, "splits": [train_split], **treatment_of(args)}
        with progress("pairs") as advance:
            return audit_preferences(args.data, tokenizer=tokenizer, progress=advance, **split)

    audit = audit_pairs()
    is_chat_model = bool(getattr(tokenizer, "chat_template", None))
    if is_chat_model and audit.scans[0].layout == "text" and not args.text_as_messages:
        args.text_as_messages = True
        try:
            audit = audit_pairs()
            notes.append(
                "The pairs are text, and the model has a chat template: `text_as_messages` trains it in the form in "
                "which `sampo generate` and `sampo chat` prompt it."
            )
        except PreferenceDataError:  # the text holds a template already
            args.text_as_messages = False
    return _Found(audit, train_split, test_split, shape, positions, notes)


def _short(error: Exception) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" …")


def _size_notes(args: argparse.Namespace, sizes: Sizes, max_length: int) -> list[str]:
    if not args.gpus:
        return ["The memory on the CPU was not computed: the micro-batch is small."]
    if sizes.gigabytes is None:
        return []
    pairs = f"{sizes.batch} pair{'s' if sizes.batch > 1 else ''} of {max_length:,} tokens"
    note = (
        f"{pairs} on each GPU with `{sizes.engine}`: {sizes.gigabytes:.1f} GB, computed and not measured, of "
        f"{args.gpu_memory:.0f} GB{' (assumed)' if args.memory_is_assumed else ''}."
    )
    if sizes.fits:
        return [note]
    return [note, "That is too much to train. Use more GPUs, `--method lora` or a smaller model."]


def _next_command(args: argparse.Namespace, engine: str) -> str:
    words = ["sampo", "train", "--config", str(args.out)]
    if args.gpus > 1:
        words += ["--accelerate_config", engine, "--num_processes", str(args.gpus)]
    elif args.gpus < _gpus_here()[0]:  # else every GPU of this machine would be used
        words += ["--accelerate_config", "single_gpu"] if args.gpus else []
    return shlex.join(words)


def _groups(
    args: argparse.Namespace, found: _Found, method: list[RecipeLine], max_length: RecipeLine, sizes: Sizes
) -> list[list[RecipeLine]]:
    """The options of the recipe, in the order of the packaged ones."""
    treatment = {name: value for name, value in treatment_of(args).items() if value not in (False, "error", {}, None)}
    data = [
        RecipeLine("dataset_name", args.data, f"{found.pairs:,} pairs to train on"),
        *([RecipeLine("dataset_config", args.name)] if args.name else []),
        *held_out_lines(found.train_split, found.test_split, found.pairs),
        *(RecipeLine(name, value) for name, value in treatment.items()),
    ]
    if found.audit.has_issues:
        data.append(RecipeLine("on_bad_rows", "drop", "bad rows are dropped; the log reports how many"))
    step = sizes.batch * sizes.accumulation * max(args.gpus, 1)
    devices = f"{args.gpus} GPU{'s' if args.gpus > 1 else ''}" if args.gpus else "the CPU"
    rate = choose_learning_rate(found.shape, args.method)
    training = [
        max_length,
        RecipeLine("learning_rate", rate, "common for a model of this size, not tuned"),
        RecipeLine("lr_scheduler_type", "linear"),
        RecipeLine("warmup_steps", 0.1, "fraction of all steps"),
        RecipeLine("num_train_epochs", 1, "TRL's default is 3"),
        RecipeLine(
            "per_device_train_batch_size", sizes.batch, "if it does not fit, halve it and double the next value"
        ),
        RecipeLine("gradient_accumulation_steps", sizes.accumulation, f"{step} pairs per step on {devices}"),
        *([] if args.gpus else [RecipeLine("use_cpu", True), RecipeLine("bf16", False)]),
    ]
    saving = [
        *evaluation_lines(found.test_split, found.pairs, sizes.batch),
        RecipeLine("output_dir", f"runs/{args.out.stem}", "model, log and checkpoints"),
    ]
    return [model_lines(args.model, args.method, sizes.engine, gpus=args.gpus), data, method, training, saving]


def _check(text: str, name: str) -> None:
    """Read the recipe as `sampo train` does; exits with its error. This machine need not have the GPUs of the run."""
    from .options import make_parser as make_train_parser

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL sets an option by a name that transformers has deprecated
        path = Path(folder) / name
        path.write_text(text, encoding="utf-8")
        make_train_parser(prog="sampo init").parse_args_and_config(
            ["--config", str(path), "--use_cpu", "--bf16", "false"]
        )

"""`sampo train`: preference optimisation on a pretrained model, from a YAML file and options.

In the shape of TRL's `dpo.py`, with the same options and three differences:

1. An unknown option is an error that names the nearest option. TRL's script ignores it.
2. All issues of the options are in one error; then the data is checked; only then a model is loaded.
3. `dataset_name` may also be a file, and the data may be raw transcripts (see `sampo.data.load`).
"""

import contextlib
import logging
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .. import plugins
from ..checkpointing.files import CheckpointNotSavedError, find_output_folder_issue
from ..data.columns import pairs_of_stream, read_columns
from ..data.issues import PreferenceDataError
from ..io.locks import LAUNCHER, FolderInUseError, alone_in, end_with_launcher
from ..models.load import ModelError, check_model, code_refused
from .launched import STOPPED_AT_ONCE, become_launcher, end_process_group, print_error
from .models import RefusedRun, check_adapter, check_vocabulary, load_models, load_processor
from .next_steps import after_training, show_next
from .option_checks import find_option_issues, find_other_checkpoints_issue, read_shard
from .options import DRY_RUN, RecipeParser, make_parser, short_help

logger = logging.getLogger(__name__)


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Check the options, load the data, train, save.

    Raises:
        RefusedRun: the options cannot be run.
        PreferenceDataError: the data cannot be trained on.
        RefCacheError: the reference cache cannot be used.
        ResumeRefusedError: there is no complete checkpoint to resume from, or it is of another run.
        FolderInUseError: another run works in `output_dir`.
        CheckpointNotSavedError: a checkpoint could not be written.
        Preempted: SIGTERM or Ctrl-C came, and a checkpoint was saved.
        FloatingPointError: the loss or the weights are not finite.
    """
    resume = _resume(script_args.resume or training_args.resume_from_checkpoint)
    with _output_folder(training_args, resume):
        _train(script_args, training_args, model_args, dataset_args, resume)


def _train(
    script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, resume: str | bool | None
) -> None:
    trainer = make_trainer(script_args, training_args, model_args, dataset_args)
    if script_args.ignore_bias_buffers:  # as in TRL's script: DDP cannot broadcast boolean buffers
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if str(buffer.dtype) == "torch.bool"
        ]
    from .log_line import beside_bar, show_one_line  # loads transformers' trainer, which refused options do without

    if script_args.log_line == "compact":
        show_one_line(trainer)
    with beside_bar(trainer):
        trainer.train(resume_from_checkpoint=resume)
    _finish(trainer, script_args, model=model_args.model_name_or_path)


def make_trainer(
    script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, kind: type | None = None
) -> Any:
    """The trainer of a run, ready to train; raises what `main` raises.

    Args:
        script_args: how the data is read.
        training_args: a `SamPOConfig`, or the config of another trainer.
        model_args: TRL's `ModelConfig`.
        dataset_args: TRL's `DatasetMixtureConfig`.
        kind: a subclass of `SamPOTrainer` to make.
    """
    together = (vars(part) for part in (dataset_args, model_args, training_args, script_args))
    if issues := find_option_issues(
        SimpleNamespace(**{name: value for part in together for name, value in part.items()})
    ):
        raise RefusedRun(" ".join(issues))
    warn_of_lost_updates(training_args, model_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trusts = training_args.trust_remote_code
    policy = model_args.model_name_or_path
    check_model(policy, option="model_name_or_path", trust_remote_code=trusts, tokenizer=True)
    check_adapter(model_args)
    processor = load_processor(script_args, training_args, model_args)
    with training_args.main_process_first(desc="loading the data"), _errors_in_one_line():
        check_vocabulary(script_args, training_args, model_args, processor)
        if script_args.ref_model_name_or_path:
            check_model(script_args.ref_model_name_or_path, option="ref_model_name_or_path", trust_remote_code=trusts)
        data = load_data(script_args, training_args, dataset_args, processor)

    with _errors_in_one_line():
        trainer = (kind or _trainer_of(script_args.trainer))(
            args=training_args,
            train_dataset=data["train"],
            eval_dataset=data.get("test"),
            processing_class=processor,
            **load_models(script_args, training_args, model_args),
        )
    trainer.dataset_name = script_args.dataset_name
    return trainer


def _trainer_of(name: str) -> type:
    """The class of a trainer; loaded after the data, which is checked faster."""
    if name == "dpo":
        from ..trainer import SamPOTrainer

        return SamPOTrainer
    from ..training.baselines import BASELINES

    return BASELINES[name].trainer


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Turn errors of any library before the first step into one sentence for the user.

    Raises:
        RefusedRun: replaces other errors of values and of files.
    """
    try:
        yield
    except (RefusedRun, PreferenceDataError, ModelError):
        raise
    except pickle.UnpicklingError as error:
        raise code_refused("one") from error
    except PermissionError as error:
        raise RefusedRun(
            f"{error.filename} must be open to the user of this process, got: {error.strerror}. Change who may use it."
        ) from error
    except (OSError, ValueError) as error:
        raise RefusedRun(str(error)) from error


@contextlib.contextmanager
def _output_folder(training_args: Any, resume: str | bool | None) -> Iterator[None]:
    """Check and lock the output folder, before data and model are loaded."""
    folder = str(training_args.output_dir)
    if issue := find_output_folder_issue(folder):
        raise RefusedRun(issue)
    first = training_args.process_index == 0
    with alone_in(Path(folder)) if first else contextlib.nullcontext():
        if issue := find_other_checkpoints_issue(training_args, resume):
            raise RefusedRun(issue)
        yield


def _finish(trainer: Any, script_args: Any, *, model: str) -> None:
    """Save, push if requested, and exit together: a rank that exits early can end the others."""
    folder = trainer.args.output_dir
    trainer.refuse_weights_not_finite("the model")
    trainer.save_model(folder)
    trainer.save_state()
    trainer.accelerator.print(f"Model saved to {folder}.")
    state = getattr(trainer, "run_state", None)  # of sampo's own trainer
    if state is not None and state.stop_reason is not None:
        trainer.accelerator.print(state.stop_reason)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
    evaluates = trainer.args.eval_strategy != "no"
    show_next(*after_training(str(folder), model, script_args, evaluates=evaluates), show=trainer.accelerator.print)
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def warn_of_lost_updates(training_args: Any, model_args: Any) -> None:
    """Steps of 1e-6 on weights that are held in bfloat16 alone are mostly rounded away."""
    shards = training_args.deepspeed or training_args.fsdp or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    shards = shards or os.environ.get("ACCELERATE_USE_FSDP") == "true"  # both keep a copy of the weights in float32
    if model_args.dtype in ("bfloat16", "float16") and not model_args.use_peft and not shards:
        logger.warning(
            "All weights are trained in %s: an update below about 0.2 %% of a weight is rounded away, and at a "
            "learning rate of %g most are. Set `dtype: float32` (the forward pass stays in bf16 with `bf16: true`), "
            "or launch with DeepSpeed or FSDP, which keep a copy in float32.",
            *(model_args.dtype, training_args.learning_rate),
        )


def load_data(script_args: Any, training_args: Any, dataset_args: Any, processor: Any) -> dict:
    """`train`, and `test` if there is an evaluation: checked, and with columns `prompt`, `chosen`, `rejected`.

    Raises:
        PreferenceDataError: rows that cannot be trained on.
        RefusedRun: no data to evaluate on, or messages without a chat template.
    """
    evaluates = training_args.eval_strategy != "no"
    from ..data.subsets import shard_by_prompt

    if script_args.dataset_streaming or dataset_args.streaming:
        data = _open_streams(script_args, dataset_args, evaluates)
    else:
        data = _load_rows(script_args, training_args, dataset_args, processor, evaluates)
    if evaluates and "test" not in data:
        raise RefusedRun(
            f"`eval_strategy: {training_args.eval_strategy.value}` needs pairs to evaluate on, got none. Set "
            "`eval_fraction` to hold some out, or `dataset_test_split` to a split that the data has."
        )
    if script_args.prompt_shard is not None:
        total, seed = len(data["train"]), _split_seed(script_args, training_args)
        data["train"] = shard_by_prompt(data["train"], *read_shard(script_args.prompt_shard), seed)
        logger.info("prompt_shard %s: %s of %s pairs", script_args.prompt_shard, len(data["train"]), total)
    first = next(iter(data["train"]))
    if isinstance(first.get("chosen"), list) and getattr(processor, "chat_template", None) is None:
        raise RefusedRun(
            "The pairs are messages, and the tokenizer has no chat template to make text of them. Set `chat_template`."
        )
    return data


def _load_rows(script_args: Any, training_args: Any, dataset_args: Any, processor: Any, evaluates: bool) -> dict:
    from trl import get_dataset

    from ..data.load import load_preference_splits

    mixture = bool(dataset_args.datasets)
    test_split = "test" if mixture else script_args.dataset_test_split
    return load_preference_splits(
        get_dataset(dataset_args) if mixture else script_args.dataset_name,
        name=None if mixture else script_args.dataset_config,
        train_split="train" if mixture else script_args.dataset_train_split,
        # With `eval_fraction`, held-out pairs come from the training split, even if there are other splits.
        test_split=test_split if evaluates and not script_args.eval_fraction else None,
        eval_fraction=script_args.eval_fraction,
        on_bad_rows=script_args.on_bad_rows,
        length_split=script_args.length_split,
        tokenizer=getattr(processor, "tokenizer", processor),
        seed=_split_seed(script_args, training_args),
        columns=read_columns(script_args.columns or ()),
        repeated_prompt=script_args.repeated_prompt,
        text_as_messages=script_args.text_as_messages,
        chat_template_of=processor,
    )


def _split_seed(script_args: Any, training_args: Any) -> int:
    return training_args.seed if script_args.split_seed is None else script_args.split_seed


def _open_streams(script_args: Any, dataset_args: Any, evaluates: bool) -> dict:
    """Follows TRL's script. The rows of a stream are not checked in advance, only its columns."""
    from datasets import load_dataset
    from trl import get_dataset

    from ..data.validate import check_preferences

    if dataset_args.datasets:
        splits, names = get_dataset(dataset_args), {"train": "train", "test": "test"}
    else:
        splits = load_dataset(script_args.dataset_name, name=script_args.dataset_config, streaming=True)
        names = {"train": script_args.dataset_train_split, "test": script_args.dataset_test_split}
    missing = [split for part, split in names.items() if split not in splits and (part == "train" or evaluates)]
    if missing:
        raise RefusedRun(f"The data has no split {missing}, it has {list(splits)}.")
    columns = read_columns(script_args.columns or ())
    streams = {part: splits[split] for part, split in names.items() if part == "train" or evaluates}
    data = {part: pairs_of_stream(stream, columns) for part, stream in streams.items()}
    for stream in data.values():
        check_preferences(stream)
    logger.warning("The pairs are streamed: only their columns are checked, not the rows.")
    return data


def _resume(checkpoint: str | bool | None) -> str | bool | None:
    """`true` means the last complete checkpoint in `output_dir`; from the command line it is a string."""
    words = {"true": True, "false": None, "auto": "auto"}
    if isinstance(checkpoint, str) and not os.path.isdir(checkpoint):
        return words.get(checkpoint.lower(), checkpoint)
    return checkpoint


def start(argv: list[str] | None = None) -> int:
    """Train in this process, one of several under a launcher.

    Returns:
        The exit status: 0 done, 1 a checkpoint could not be written or the training has diverged, 2 refused before
        the first step, 130 and 143 stopped by Ctrl-C and SIGTERM with a checkpoint saved.
    """
    try:
        argv = plugins.take_options(sys.argv[1:] if argv is None else argv)
    except plugins.PluginError as error:
        print(f"sampo train: error: {error}", file=sys.stderr)
        return 2
    parser = make_parser()
    if not set(DRY_RUN) & set(argv):
        return start_with(parser, main, argv)
    from . import dry_run  # no other run needs it

    if LAUNCHER not in os.environ:  # which has checked them
        dry_run.refuse_issues(parser, argv)
    return start_with(parser, dry_run.main, argv)


def start_with(parser: RecipeParser, work: Callable[..., None], argv: list[str] | None) -> int:
    """Parse the options and do the work; an expected error is printed in one line."""
    end_with_launcher()
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has deprecated, in each step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    parsed = parser.parse_args_and_config(argv)
    _set_up_logs(parsed[1])
    status = _work(parser, lambda: work(*parsed), first=parsed[1].process_index == 0)
    end_process_group(wait=status != STOPPED_AT_ONCE)
    return status


def _work(parser: RecipeParser, work: Callable[[], None], *, first: bool) -> int:
    """Do the work, and return the exit status."""
    from ..checkpointing.resume import ResumeRefusedError
    from ..checkpointing.signals import Preempted
    from ..reference_cache.store import RefCacheError

    try:
        work()
    except (RefusedRun, PreferenceDataError, ModelError, RefCacheError, ResumeRefusedError, FolderInUseError) as error:
        print_error(parser.prog, error)
        return 2
    except (CheckpointNotSavedError, FloatingPointError) as error:
        print_error(parser.prog, error)
        return 1
    except Preempted as stop:
        if first:
            print(f"{parser.prog}: {stop.checkpoint.name} is saved. The same command with `--resume auto` continues.")
        return stop.status
    except KeyboardInterrupt:
        if first:
            print(f"{parser.prog}: stopped. Checkpoints saved before are complete.", file=sys.stderr)
        return STOPPED_AT_ONCE
    return 0


def _set_up_logs(training_args: Any) -> None:
    """Show the messages of `sampo` on the first process; the others show warnings only."""
    import datasets
    import transformers

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sampo").setLevel(logging.INFO if training_args.process_index == 0 else logging.WARNING)
    if training_args.disable_tqdm:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def run(argv: list[str]) -> int:
    """`sampo train`: in this process, or through `accelerate launch` for several processes."""
    if {"-h", "--help"} & set(argv):  # before the parser, which imports torch
        print(short_help(), end="")
        return 0
    rest = launch_or_stay(argv, make_parser(), __name__)
    return start(rest)


def launch_or_stay(argv: list[str], parser: RecipeParser, module: str, more: Sequence[str] = ()) -> list[str]:
    """Become the launcher of a module, or, where this process can do the work, return the options of the training.

    Args:
        argv: options of the launcher and of the training.
        parser: knows those of the training.
        module: that each process runs.
        more: options of the module itself.
    """
    from .launch import launch_command, refuse_engine_that_cannot_run, split_options

    options, rest = split_options(argv)
    launcher = launch_command(options, rest)
    if launcher is not None:
        if set(DRY_RUN) & set(rest):
            from . import dry_run  # no other run needs it

            dry_run.refuse_issues(parser, rest, options)
        else:
            refuse_engine_that_cannot_run(options, rest)
            _check_model(parser.read(rest)[1])  # once here rather than once per process
        become_launcher(launcher, module, [*more, *rest])
    return rest


def _check_model(options: Any) -> None:
    """Check a local model before processes are started."""
    try:
        check_model(
            options.model_name_or_path,
            option="model_name_or_path",
            trust_remote_code=bool(options.trust_remote_code),
            tokenizer=True,
        )
    except ModelError as error:
        print(f"sampo train: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    sys.exit(start())

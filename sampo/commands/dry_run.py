"""`sampo train --dry_run`: all issues of a run at once, and what it will do, without an output folder.

Options, model, tokenizer and data are checked one after the other, and all issues are printed together. If there are
none, the run starts in a temporary folder: the trainer, the engine and the first steps are real. It ends after
`MEASURED_STEPS` steps, counted from when `pair_stream: auto` has settled.
"""

import argparse
import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..checkpointing.files import find_output_folder_issue
from ..data.issues import PreferenceDataError
from ..io.tables import Table
from ..models.load import ModelError, check_model
from ..training.memory import gpu_bytes, read_shape
from .launch import refuse_engine_that_cannot_run
from .log_line import duration
from .models import RefusedRun, check_adapter, check_vocabulary, load_processor
from .option_checks import find_other_checkpoints_issue
from .options import RecipeParser, listed
from .shown import say, show

MEASURED_STEPS = 2
MOST_WARM_UP_STEPS = 6  # what `pair_stream: auto` takes at most to settle, and a spare one
SHOWN_PAIRS = 2
SHOWN_CHARACTERS = 700  # of one text


# --- all issues ------------------------------------------------------------------------------------------------------


def refuse_issues(parser: RecipeParser, argv: list[str], launch: dict[str, str] | None = None) -> None:
    """Exit with status 2 if the run has issues, and list them.

    Args:
        parser: of the options.
        argv: options of the training.
        launch: options of the launcher.
    """
    issues = find_issues(parser, argv)
    try:
        refuse_engine_that_cannot_run(launch or {}, argv)
    except SystemExit as error:
        issues.append(str(error.code).removeprefix("sampo train: "))
    if issues:
        parser.error(listed(issues))


def find_issues(parser: RecipeParser, argv: list[str]) -> list[str]:
    """Find the issues of the options, the output folder, the model, its tokenizer and the data."""
    from .train import load_data  # which imports this module for a dry run alone

    issues, options, _ = parser.find_issues(argv)
    options.eval_strategy = IntervalStrategy(options.eval_strategy)
    if options.output_dir:
        resume = options.resume or options.resume_from_checkpoint
        found = find_output_folder_issue(str(options.output_dir), create=False)
        issues += [issue for issue in (found, find_other_checkpoints_issue(options, resume)) if issue]
    tokenizer = None
    if options.model_name_or_path:
        with _collect(issues):
            trusts = bool(options.trust_remote_code)
            check_model(
                options.model_name_or_path, option="model_name_or_path", trust_remote_code=trusts, tokenizer=True
            )
            check_adapter(options)
            tokenizer = load_processor(options, options, options)
            check_vocabulary(options, options, options, tokenizer)
    if options.ref_model_name_or_path:
        with _collect(issues):
            check_model(options.ref_model_name_or_path, option="ref_model_name_or_path")
    if options.dataset_name or options.datasets:
        with _collect(issues):
            load_data(options, options, _mixture(parser, options), tokenizer)
    return list(dict.fromkeys(issues))


def _mixture(parser: RecipeParser, options: argparse.Namespace) -> Any:
    """The options of the data, which TRL reads as an instance of its class."""
    kind = list(parser.dataclass_types)[-1]
    return kind(**{name: getattr(options, name) for name in kind.__dataclass_fields__})


@contextlib.contextmanager
def _collect(issues: list[str]) -> Iterator[None]:
    try:
        yield
    except (RefusedRun, PreferenceDataError, ModelError, OSError, ValueError) as error:
        issues.append(str(error))


# --- what the run will do --------------------------------------------------------------------------------------------


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Make the trainer, show what it trains on, and measure its first steps. Raises what `sampo train` does."""
    cached = getattr(training_args, "precompute_ref_log_probs", False)
    with tempfile.TemporaryDirectory(prefix="sampo-dry-run-") as folder:
        trainer, steps, first = measure_first_steps(folder, script_args, training_args, model_args, dataset_args)
    if trainer.is_world_process_zero():
        if first:
            _show_pairs(trainer, *first)
        _show_lengths(trainer)
        _show_run(trainer, steps, cached=cached)
        say("", "Nothing was written. The same command without `--dry_run` trains.")


def measure_first_steps(
    folder: str, script_args: Any, training_args: Any, model_args: Any, dataset_args: Any
) -> tuple[Any, "FirstSteps", list[Any]]:
    """Make the trainer and run its first steps; returns it, its steps, and the first batch with its weights.

    Args:
        folder: in place of `output_dir`.
        script_args: as for `make_trainer`, and so the others.
        training_args: are changed.
        model_args: of the model.
        dataset_args: of the data.
    """
    import torch

    from .train import make_trainer  # which imports this module for a dry run alone

    for name, value in {
        "output_dir": folder,
        "save_strategy": SaveStrategy.NO,
        "load_best_model_at_end": False,
        "report_to": [],
        "push_to_hub": False,
        "disable_tqdm": True,
        "eval_on_start": False,
        "precompute_ref_log_probs": False,  # a live reference, so that no cache is filled
    }.items():
        setattr(training_args, name, value)
    trainer = make_trainer(script_args, training_args, model_args, dataset_args)
    ours = script_args.trainer == "dpo"  # TRL's other trainers select no tokens, and try nothing out
    first = _keep_first_batch(trainer) if ours else []
    trainer.remove_callback(PrinterCallback)
    steps = FirstSteps(settled=lambda: not ours or trainer.run_state.way is not None)
    trainer.add_callback(steps)
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        raise RefusedRun(
            f"The first steps must fit into the memory of the GPU, got: {error} Set a smaller "
            "`per_device_train_batch_size`, `max_tokens_per_forward: auto`, or train an adapter (`use_peft`)."
        ) from None
    return trainer, steps, first


class FirstSteps(TrainerCallback):
    """Measures the first steps, and ends the run after them.

    Args:
        settled: whether later steps will run as the last one did.

    Attributes:
        seconds: of each measured step.
        max_steps: of the whole run.
    """

    def __init__(self, settled: Callable[[], bool]):
        self._settled, self._began = settled, 0.0
        self.seconds: list[float] = []
        self.max_steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the length of the run."""
        self.max_steps = state.max_steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock, and the run after enough steps."""
        _wait_for(args.device)
        if state.global_step > 1 and (self._settled() or state.global_step > MOST_WARM_UP_STEPS):
            self.seconds.append(time.perf_counter() - self._began)
        control.should_evaluate = control.should_save = control.should_log = False
        control.should_training_stop |= len(self.seconds) >= MEASURED_STEPS


def _wait_for(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _keep_first_batch(trainer: Any) -> list[Any]:
    """A list that gets the first batch and its weights, `(2B, N)`."""
    kept: list[Any] = []
    record = trainer.length_recorder.record

    def keep(batch: Any, scored: Any, mode: str) -> None:
        if not kept:
            kept.extend([batch, scored.draws[0].weights.detach()])
        record(batch, scored, mode)

    trainer.length_recorder.record = keep
    return kept


def _show_pairs(trainer: Any, batch: Any, weights: Any) -> None:
    """The first pairs of the first batch, with the selected tokens in brackets."""
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    say("", "The first pairs as the model sees them; the selected tokens are in ⟦ ⟧:")
    ids, real = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    for pair in range(min(SHOWN_PAIRS, batch.n_pairs)):
        completion = batch.inputs["completion_mask"][pair].bool()
        say(
            "",
            f"pair {pair + 1}",
            f"  prompt    {_shortened(tokenizer.decode(ids[pair][real[pair] & ~completion]))!r}",
        )
        for name, row in (("chosen", pair), ("rejected", pair + batch.n_pairs)):
            mask = batch.mask[row]
            text = mark_selected(tokenizer, batch.ids[row][mask].tolist(), weights[row][mask].tolist())
            n_selected = int((weights[row] > 0).sum())
            say(f"  {name:<9} {_shortened(text)!r}", f"            {n_selected} of {int(mask.sum())} tokens selected")


def mark_selected(tokenizer: Any, ids: list[int], weights: list[float]) -> str:
    """The text of a completion, with each run of selected tokens in brackets.

    Args:
        tokenizer: that of the ids.
        ids: tokens of the completion.
        weights: of each token; selected is what is above 0.
    """
    borders = [0, *(i for i in range(1, len(ids)) if (weights[i] > 0) != (weights[i - 1] > 0)), len(ids)]
    parts = []
    for start, stop in itertools.pairwise(borders):
        text = tokenizer.decode(ids[start:stop])
        parts.append(f"⟦{text}⟧" if start < stop and weights[start] > 0 else text)
    return "".join(parts)


def _shortened(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def _show_lengths(trainer: Any) -> None:
    """Token statistics of the training set, before truncation; the log has what truncation does."""
    columns = getattr(trainer.train_dataset, "column_names", None) or []
    if "chosen_ids" not in columns or not hasattr(trainer.train_dataset, "select_columns"):
        return
    table = Table("Tokens of the training pairs, before truncation", ["", "mean", "median", "95 %", "longest"])
    for name in ("prompt", "chosen", "rejected"):
        lengths = np.array([len(ids) for ids in trainer.train_dataset[f"{name}_ids"]])
        numbers = (lengths.mean(), *np.percentile(lengths, (50, 95)), lengths.max())
        table.add(name, *(f"{number:,.0f}" for number in numbers))
    show(table)


def _show_run(trainer: Any, steps: FirstSteps, *, cached: bool) -> None:
    args = trainer.args
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    pairs = rows // trainer.rows_per_pair
    parameters = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in trainer.model.parameters()]
    total, trained = sum(n for n, _ in parameters), sum(n for n, trains in parameters if trains)
    processes = f"{args.world_size} process{'es' if args.world_size > 1 else ''}"
    facts = {
        "steps": f"{steps.max_steps:,} of {pairs:,} pair{'s' if pairs > 1 else ''} each, on {processes}",
        "trained": f"{trained:,} of {total:,} parameters ({trained / total:.2%})",
        "memory": _describe_memory(trainer),
        "time": _describe_time(steps),
    }
    if cached:
        facts["reference"] = "live in these steps. The run fills its cache first, and its steps are then faster."
    say("", *(f"{name:<10} {text}" for name, text in facts.items()))


def _describe_time(steps: FirstSteps) -> str:
    if not steps.seconds:
        return f"not measured: the run has {steps.max_steps} step(s), and its first ones are slower than the others"
    mean = sum(steps.seconds) / len(steps.seconds)
    each = " and ".join(f"{seconds:.3g}" for seconds in steps.seconds)
    return (
        f"{duration(mean * steps.max_steps)} at {each} s a step (measured; evaluation, saving and loading are "
        "not counted)"
    )


def _describe_memory(trainer: Any) -> str:
    """The peak of these steps against what the device has, and what a batch of the longest rows takes on a GPU."""
    import psutil
    import torch

    device = trainer.args.device
    if device.type == "cuda":
        peak, there = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    else:
        import resource  # not on Windows, where there are no GPUs without CUDA

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        there = psutil.virtual_memory().total
    of = "GPU" if device.type == "cuda" else "machine"
    text = f"{peak / 2**30:.2f} GiB at the peak of these steps, and the {of} has {there / 2**30:.1f} GiB"
    longest = trainer.token_counts["train"].longest_row if "train" in trainer.token_counts else None
    computed = longest and _compute_memory(trainer, longest)
    if not computed:
        return text + "."
    return f"{text}. On a GPU: {computed / 2**30:.2f} GiB with rows of {longest:,} tokens, computed by `sampo memory`."


def _compute_memory(trainer: Any, longest: int) -> float | None:
    """Bytes on one GPU for a batch whose rows are all as long as the longest; None for a model without a formula."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    engine = {"FSDP": "fsdp2", "DEEPSPEED": f"zero{plugin.zero_stage if plugin else 0}"}.get(
        trainer.accelerator.distributed_type.value, "multi_gpu" if trainer.args.world_size > 1 else "single"
    )
    adapter = next(iter(getattr(trainer.model, "peft_config", {}).values()), None)
    try:
        parts = gpu_bytes(
            read_shape(trainer.model.config._name_or_path),
            engine,
            "lora" if adapter else "full",
            gpus=trainer.args.world_size,
            tokens=2 * trainer.args.per_device_train_batch_size // trainer.rows_per_pair * longest,
            lora_r=getattr(adapter, "r", 16),
        )
    except ValueError:
        return None
    return sum(parts.values())

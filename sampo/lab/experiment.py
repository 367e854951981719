"""Runs of the lab: each method through the real trainer from the same start, measured against the truth.

A run is (seed, group of pairs, method). Everything it depends on is in its `config`. A finished run is
written at once and not repeated. An interval covers one seed; the spread between seeds is wider.
"""

import copy
import multiprocessing
import os
import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cached_property
from multiprocessing import connection
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from transformers import LlamaForCausalLM, PreTrainedModel

from ..io import records as results
from ..io.progress import OpenProgress
from ..weighting import WEIGHTINGS
from . import model as lm
from .methods import SLOPE
from .pressure import logistic_slope, mean_pressures
from .settings import UNEQUAL_TOKENS, VERSION, Run, Settings
from .world import MAX_ANSWER_TOKENS, PROMPT_TOKENS, World, WorldPair, WorldQuestion, text

if TYPE_CHECKING:
    from ..config import SamPOConfig

RECORDS = "records.jsonl"


def run_all(
    runs: Sequence[Run], folder: Path, *, command: str, progress: OpenProgress, jobs: int = 1
) -> Iterator[tuple[Run, list[results.Record]]]:
    """Yield each run with its records: first the runs that are recorded, then the others as they finish.

    Only this process appends records to the folder's file, all those of a run at once and as soon as it finishes. With
    `jobs` > 1, that many processes measure, each with one thread.
    """
    path = folder / RECORDS
    known = _known(path)
    missing = unmeasured(runs, folder)
    for run in runs:
        if _is_complete(run, known):
            yield run, list(known[results.config_key(run.config)].values())
    for run, measured in _measure_all(missing, folder, progress, jobs):
        about = {"config": run.config, "seed": run.seed, "command": command, **results.provenance()}
        records = [results.Record(**number._asdict(), **about) for number in measured]
        results.append(path, records)
        yield run, records


def unmeasured(runs: Sequence[Run], folder: Path) -> list[Run]:
    """The runs whose records are not in the folder."""
    known = _known(folder / RECORDS)
    return [run for run in runs if not _is_complete(run, known)]


def _known(path: Path) -> dict[str, dict[str, results.Record]]:
    """Records by the key of their run and their name."""
    known: dict[str, dict[str, results.Record]] = {}
    for record in results.read(path):
        known.setdefault(record.key, {})[record.name] = record
    return known


def _is_complete(run: Run, known: dict[str, dict[str, results.Record]]) -> bool:
    # the record that is written last: after a kill, only the earlier ones may exist
    last = "train_seconds" if run.group else "kl"
    return last in known.get(results.config_key(run.config), {})


def _measure_all(
    runs: Sequence[Run], folder: Path, progress: OpenProgress, jobs: int
) -> Iterator[tuple[Run, list["Number"]]]:
    if jobs == 1 or not runs:
        benches = Benches(folder, progress)
        for run in runs:
            yield run, benches.of(run).measure(run)
        return
    workers = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin_work, (folder,))
    try:
        futures = {workers.submit(_measure_in_worker, run): run for run in runs}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    finally:
        workers.shutdown(wait=True, cancel_futures=True)


_worker: "Benches"  # of a worker process


def _begin_work(folder: Path) -> None:
    global _worker
    Thread(target=_end_with_parent, daemon=True).start()
    work_quietly()
    _worker = Benches(folder, no_progress)


def work_quietly() -> None:
    """Use one thread, and show no progress of the libraries."""
    import datasets
    import transformers

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _end_with_parent() -> None:
    """End this worker when its parent is killed; otherwise it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _measure_in_worker(run: Run) -> list["Number"]:
    return _worker.of(run).measure(run)


@contextmanager
def no_progress(title: str, steps: int) -> Iterator[Callable[[int], None]]:
    """Progress that is not shown."""
    yield lambda done: None


class Number(NamedTuple):
    """The measured part of a record."""

    name: str
    value: float | None
    n: int
    interval: tuple[float, float] | None = None


class Benches:
    """Keeps the bench of the last run, because most runs need the same bench as the previous one."""

    def __init__(self, folder: Path, progress: OpenProgress):
        self.folder, self.progress = folder, progress
        self._last: Bench | None = None

    def of(self, run: Run) -> "Bench":
        """The bench for a run."""
        if self._last is None or not self._last.serves(run):
            self._last = Bench(run.seed, run.settings, self.folder, self.progress)
        return self._last


class Bench:
    """State shared by the runs of one seed: the world, the start and its answers, the held-out pairs."""

    def __init__(self, seed: int, settings: Settings, folder: Path, progress: OpenProgress):
        self.seed, self.settings, self.folder, self.progress = seed, settings, folder, progress
        self.world = World(seed)
        self._pairs: dict[tuple[str, float, int], tuple[list[WorldPair], list[np.ndarray]]] = {}
        # folder for the reference log-probabilities of the runs
        self.reference_cache = tempfile.mkdtemp(prefix="sampo-lab-")
        weakref.finalize(self, shutil.rmtree, self.reference_cache, ignore_errors=True)

    def serves(self, run: Run) -> bool:
        """Whether a run can use this bench. Its method and its training pairs may differ."""
        mine, others = self.settings, run.settings
        same = mine.of_sampling == others.of_sampling and mine.judged_pairs == others.judged_pairs
        return self.seed == run.seed and same

    def measure(self, run: Run) -> list[Number]:
        """Train, unless the run is the start, and measure."""
        if not run.group:
            return self.measure_answers(self.start, sampling_seed=2)
        began = time.perf_counter()
        with self.progress(run.title, run.settings.steps) as advance:
            policy, log = train(self, run, advance)
        seconds = time.perf_counter() - began
        theta = log.get("length_penalty/per_token")
        return [
            *self.measure_answers(policy, sampling_seed=3),
            *self._measure_rewards(policy),
            *self._measure_pressure(run),
            *([Number("penalty_per_token", theta, run.settings.pairs)] if theta is not None else []),
            Number("train_seconds", seconds, run.settings.steps),
        ]

    # --- shared by all runs of a seed ----------------------------------------------------------------------------

    @cached_property
    def start_folder(self) -> Path:
        """Folder of the supervised start, which is trained if it does not exist."""
        key = results.config_key({"lab_version": VERSION, **self.settings.of_start, "seed": self.seed})
        folder = self.folder / f"sft-seed{self.seed}-{key}"
        if folder.exists():
            return folder
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if folder.exists():  # another process has trained it
                return folder
            rows = [(q.prompt, answer) for q, answer in self.world.demonstrations(self.settings.demonstrations)]
            with self.progress(f"seed {self.seed}, supervised start", self.settings.sft_steps) as advance:
                trained = lm.train_supervised(rows, steps=self.settings.sft_steps, seed=self.seed, progress=advance)
            lm.save(trained, folder)
        return folder

    @cached_property
    def start(self) -> LlamaForCausalLM:
        """The supervised start."""
        return self.load_start()

    def load_start(self) -> LlamaForCausalLM:
        """A fresh copy of the start."""
        return LlamaForCausalLM.from_pretrained(self.start_folder, dtype=torch.float32).eval()

    @cached_property
    def questions(self) -> list[WorldQuestion]:
        """The questions that every model answers."""
        return self.world.evaluation_questions(self.settings.questions)

    @cached_property
    def start_quality(self) -> np.ndarray:
        """True quality of the start's answers, with which every model is compared."""
        return self._qualities(self._answers(self.start, sampling_seed=1))

    @cached_property
    def judged(self) -> list[WorldPair]:
        """Held-out pairs, the truly better answer first."""
        return self.world.judged_pairs(self.settings.judged_pairs)

    @cached_property
    def start_judged_logps(self) -> np.ndarray:
        """Log-probabilities of the judged pairs' answers under the start, better answers first."""
        return lm.answer_logps(self.start, _rows(self.judged))

    def pairs(self, run: Run) -> list[WorldPair]:
        """The training pairs of a run."""
        return self._pairs_and_end_probs(run)[0]

    def _pairs_and_end_probs(self, run: Run) -> tuple[list[WorldPair], list[np.ndarray]]:
        """The pairs, and the start's end-token probability at each position of each answer, chosen answers first."""
        settings = run.settings
        key = (run.group, settings.bias, settings.pairs)
        if key not in self._pairs:
            pairs = self.world.annotated_pairs(settings.pairs, bias=settings.bias, group=run.group)
            self._pairs[key] = pairs, lm.end_probs(self.start, _rows(pairs))
        return self._pairs[key]

    # --- what is measured ----------------------------------------------------------------------------------------

    def _answers(self, model: PreTrainedModel, *, sampling_seed: int) -> list[list[int]]:
        prompts = [question.prompt for question in self.questions]
        seed = 10 * self.seed + sampling_seed
        return lm.sample_answers(model, prompts, seed=seed, max_tokens=self.settings.max_tokens)

    def _qualities(self, answers: list[list[int]]) -> np.ndarray:
        return np.array([self.world.quality(q, a) for q, a in zip(self.questions, answers, strict=True)])

    def measure_answers(self, model: PreTrainedModel, *, sampling_seed: int) -> list[Number]:
        """Length, quality and distance from the start of a model's answers."""
        answers = self._answers(model, sampling_seed=sampling_seed)
        quality = self._qualities(answers)
        rows = [(q.prompt, a) for q, a in zip(self.questions, answers, strict=True)]
        per_question = {
            "tokens": np.array([len(answer) for answer in answers]),
            "stops": np.array([answer[-1] == lm.EOS for answer in answers]),
            "quality": quality,
            "win_rate": (quality > self.start_quality) + 0.5 * (quality == self.start_quality),
            "kl": lm.divergence(model, self.start, rows),
        }
        clusters = [question.key for question in self.questions]
        return [mean_number(name, values, clusters) for name, values in per_question.items()]

    def _measure_rewards(self, policy: PreTrainedModel) -> list[Number]:
        """The implicit reward, the sum of log-ratios for every method alike, on held-out pairs judged by the truth."""
        log_ratios = lm.answer_logps(policy, _rows(self.judged)) - self.start_judged_logps
        better, worse = np.split(log_ratios, 2)
        margin, difference = better - worse, np.array([pair.length_difference for pair in self.judged])
        right = (margin > 0) + 0.5 * (margin == 0)
        clusters = np.array([pair.question.key for pair in self.judged])
        kinds = {
            "accuracy": np.ones_like(right, dtype=bool),
            "accuracy_better_longer": difference > UNEQUAL_TOKENS,
            "accuracy_better_shorter": difference < -UNEQUAL_TOKENS,
        }
        correlation = np.corrcoef(margin, difference)[0, 1] if margin.std() > 0 and difference.std() > 0 else None
        return [
            *(mean_number(name, right[kind], clusters[kind]) for name, kind in kinds.items()),
            Number("correlation", None if correlation is None else float(correlation), len(margin)),
        ]

    def _measure_pressure(self, run: Run) -> list[Number]:
        """Length pressure of the method's weights on its training pairs, at the start of training."""
        pairs, end_probs = self._pairs_and_end_probs(run)
        options = self.options(run)
        if WEIGHTINGS[options["token_weighting"]].needs_policy:
            return []  # before training all log-ratios are 0, and the tokens undecided; states are not at hand here
        pressures = mean_pressures([p.chosen for p in pairs], [p.rejected for p in pairs], end_probs, options)
        scale, clusters = self.beta_factor(run), [pair.question.key for pair in pairs]
        return [mean_number(name, scale * values, clusters) for name, values in pressures.items()]

    def beta_factor(self, run: Run) -> float:
        """The factor of a method's beta: the mean length of its training answers, or 1."""
        if not run.definition.beta_per_token:
            return 1.0
        return float(np.mean([len(answer) for _, answer in _rows(self.pairs(run))]))

    def options(self, run: Run) -> dict[str, Any]:
        """Options of `SamPOConfig`, with the values that depend on the pairs."""
        options = dict(run.definition.options)
        if options.get("length_penalty_start") == SLOPE:
            options["length_penalty_start"] = logistic_slope([pair.length_difference for pair in self.pairs(run)])
        return options


def _rows(pairs: Sequence[WorldPair]) -> list[lm.PromptWithAnswer]:
    """Chosen rows first."""
    return [(p.question.prompt, p.chosen) for p in pairs] + [(p.question.prompt, p.rejected) for p in pairs]


def mean_number(name: str, values: np.ndarray, clusters: Sequence[int]) -> Number:
    """Mean and its 95 % interval, from a standard error that allows answers to one question to be alike."""
    from scipy.stats import t

    n = len(values)
    if n == 0:
        return Number(name, None, 0)
    mean = float(np.mean(values))
    _, cluster = np.unique(clusters, return_inverse=True)
    n_clusters = int(cluster.max()) + 1
    if n_clusters < 2:
        return Number(name, mean, n)
    sums = np.bincount(cluster, weights=values - mean)  # of the residuals of each question
    error = np.sqrt((sums**2).sum() * n_clusters / (n_clusters - 1)) / n
    half_width = float(t.ppf(0.975, n_clusters - 1) * error)
    return Number(name, mean, n, (mean - half_width, mean + half_width))


def train(bench: Bench, run: Run, advance: Callable[[int], None]) -> tuple[PreTrainedModel, dict[str, float]]:
    """Run `SamPOTrainer` once per round; returns the trained policy and the last log of the trainer."""
    pairs, rounds = bench.pairs(run), run.definition.rounds
    policy, done = bench.load_start(), 0
    for i in range(rounds):
        begin, end = (len(pairs) * j // rounds for j in (i, i + 1))
        steps = run.settings.steps * (i + 1) // rounds - done

        def report(step: int, done: int = done) -> None:
            advance(done + step)

        log = train_round(bench, run, policy, pairs[begin:end], steps, report)
        done += steps
    return policy.eval(), log


def train_round(
    bench: Bench,
    run: Run,
    policy: PreTrainedModel,
    pairs: Sequence[WorldPair],
    steps: int,
    advance: Callable[[int], None],
) -> dict[str, float]:
    """Train a policy on pairs, with itself as it is now as the reference; returns the last log of the trainer."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    from ..trainer import SamPOTrainer

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            advance(state.global_step)

    data = [
        {"prompt": text(p.question.prompt), "chosen": f" {text(p.chosen)}", "rejected": f" {text(p.rejected)}"}
        for p in pairs
    ]
    output_dir = tempfile.mkdtemp(prefix="sampo-lab-")  # nothing is saved there
    try:
        with warnings.catch_warnings():
            # TRL 1.16 reads the name that transformers 5.23 has renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            trainer = SamPOTrainer(
                model=policy,
                ref_model=copy.deepcopy(policy).eval(),
                args=_arguments(bench, run, steps, output_dir),
                train_dataset=Dataset.from_list(data),
                processing_class=lm.build_tokenizer(),
                callbacks=[Steps()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    finally:
        shutil.rmtree(output_dir, ignore_errors=True)
    return trainer.state.log_history[-1]


def _arguments(bench: Bench, run: Run, steps: int, output_dir: str) -> "SamPOConfig":
    """Options of the trainer. Those that save time change results by rounding alone."""
    from ..config import SamPOConfig

    settings, options = run.settings, bench.options(run)
    return SamPOConfig(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        beta=settings.beta * bench.beta_factor(run),
        warmup_steps=max(steps // 10, 1),
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_length=PROMPT_TOKENS + MAX_ANSWER_TOKENS,
        seed=run.seed,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        pair_stream="true",
        ref_cache_dir=bench.reference_cache,
        ref_cache_check=0,
        log_token_statistics=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="warning",
        **{"precompute_ref_log_probs": True} | options,
    )

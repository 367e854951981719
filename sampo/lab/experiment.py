"""Runs of the lab: each method through the real trainer from the same start, measured against the truth.

A run is (seed, group of pairs, method). Everything it depends on is in its `config`; a finished run is written at once
and not repeated. Numbers differ from seed to seed by more than their intervals say, which know one seed only.
"""

import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from .. import results
from . import model as lm
from .settings import METHODS, UNEQUAL_TOKENS, VERSION, Run, Settings
from .world import MAX_ANSWER_TOKENS, PROMPT_TOKENS, Pair, Question, World, text

RECORDS = "records.jsonl"
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]  # (title, steps) -> sets steps done


def run_all(
    runs: Sequence[Run], folder: Path, *, command: str, progress: Progress
) -> Iterator[tuple[Run, list[results.Record]]]:
    """Yield each run with its records. New ones are appended to the folder's file as soon as they are there."""
    path = folder / RECORDS
    known: dict[str, dict[str, results.Record]] = {}
    for record in results.read(path):
        known.setdefault(record.key, {})[record.name] = record
    bench = None
    for run in runs:
        key = results.config_key(run.config)
        last = "train_seconds" if run.group else "kl"  # what is written last, for a killed run may have left the rest
        if last not in known.get(key, {}):
            if bench is None or bench.seed != run.seed:
                bench = Bench(run.seed, run.settings, folder, progress)
            about = {"config": run.config, "seed": run.seed, "command": command, **results.provenance()}
            records = [results.Record(**number._asdict(), **about) for number in bench.measure(run)]
            results.append(path, records)
            known[key] = {record.name: record for record in records}
        yield run, list(known[key].values())


class Number(NamedTuple):
    """The measured part of a record."""

    name: str
    value: float | None
    n: int
    interval: tuple[float, float] | None = None


class Bench:
    """What the runs of one seed share: the world, the start and its answers, the held-out pairs."""

    def __init__(self, seed: int, settings: Settings, folder: Path, progress: Progress):
        self.seed, self.settings, self.folder, self.progress = seed, settings, folder, progress
        self.world = World(seed)
        self._groups: dict[str, tuple[list[Pair], np.ndarray]] = {}

    def measure(self, run: Run) -> list[Number]:
        """Train if the run is not the start, and measure."""
        if not run.group:
            return self._measure_answers(self.start, sampling_seed=2)
        began = time.perf_counter()
        with self.progress(run.title, self.settings.steps) as advance:
            policy, log = train(self, run, advance)
        seconds = time.perf_counter() - began
        theta = log.get("length_penalty/per_token")
        return [
            *self._measure_answers(policy, sampling_seed=3),
            *self._measure_rewards(policy),
            self._measure_pressure(run),
            *([Number("penalty_per_token", theta, self.settings.pairs)] if theta is not None else []),
            Number("train_seconds", seconds, self.settings.steps),
        ]

    # --- shared by all runs of a seed ----------------------------------------------------------------------------

    @cached_property
    def start_folder(self) -> Path:
        """The supervised start on disk, trained if it is not there yet."""
        key = results.config_key({"lab_version": VERSION, **self.settings.of_start, "seed": self.seed})
        folder = self.folder / f"sft-seed{self.seed}-{key}"
        if not folder.exists():
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
    def questions(self) -> list[Question]:
        """What every model is asked."""
        return self.world.evaluation_questions(self.settings.questions)

    @cached_property
    def start_quality(self) -> np.ndarray:
        """True quality of the start's own answers, which every model is compared with."""
        return self._qualities(self._answers(self.start, sampling_seed=1))

    @cached_property
    def judged(self) -> list[Pair]:
        """Held-out pairs, the truly better answer first."""
        return self.world.judged_pairs(self.settings.judged_pairs)

    @cached_property
    def start_judged_logps(self) -> np.ndarray:
        """Log-probabilities of the judged pairs' answers under the start, better answers first."""
        return lm.answer_logps(self.start, _rows(self.judged))

    def pairs(self, group: str) -> tuple[list[Pair], np.ndarray]:
        """The training pairs of a group, and how a shift of the end token's logit moves each answer, chosen first."""
        if group not in self._groups:
            pairs = self.world.annotated_pairs(self.settings.pairs, bias=self.settings.bias, group=group)
            self._groups[group] = pairs, lm.end_token_push(self.start, _rows(pairs))
        return self._groups[group]

    # --- what is measured ----------------------------------------------------------------------------------------

    def _answers(self, model: PreTrainedModel, *, sampling_seed: int) -> list[list[int]]:
        prompts = [question.prompt for question in self.questions]
        seed = 10 * self.seed + sampling_seed
        return lm.generate(model, prompts, seed=seed, max_tokens=self.settings.max_tokens)

    def _qualities(self, answers: list[list[int]]) -> np.ndarray:
        return np.array([self.world.quality(q, a) for q, a in zip(self.questions, answers, strict=True)])

    def _measure_answers(self, model: PreTrainedModel, *, sampling_seed: int) -> list[Number]:
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

    def _measure_pressure(self, run: Run) -> Number:
        """Length pressure of the method's weights on its training pairs, at the start of training."""
        pairs, push = self.pairs(run.group)
        chosen, rejected = np.split(push * row_weights(pairs, METHODS[run.method].options), 2)
        return mean_number("pressure", chosen - rejected, [pair.question.key for pair in pairs])


def _rows(pairs: Sequence[Pair]) -> list[lm.Row]:
    """Chosen rows first."""
    return [(p.question.prompt, p.chosen) for p in pairs] + [(p.question.prompt, p.rejected) for p in pairs]


def row_weights(pairs: Sequence[Pair], options: dict[str, Any]) -> np.ndarray:
    """Expected weight of a token of each row, chosen rows first: that of a random subset is its size over T."""
    from ..weighting import token_weights

    lengths = torch.tensor([len(answer) for _, answer in _rows(pairs)])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (2B, T)
    name = {"sampo": "expected"}.get(options["token_weighting"], options["token_weighting"])
    weights = token_weights(name, mask, sampled_sides=options.get("sampled_sides", "both"))
    return weights.amax(dim=1).double().numpy()


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
    half = float(t.ppf(0.975, n_clusters - 1) * error)
    return Number(name, mean, n, (mean - half, mean + half))


def train(bench: Bench, run: Run, advance: Callable[[int], None]) -> tuple[PreTrainedModel, dict[str, float]]:
    """One run of `SamPOTrainer`: the trained policy, and the trainer's last log."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    from ..config import SamPOConfig
    from ..trainer import SamPOTrainer

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            advance(state.global_step)

    settings = run.settings
    data = [
        {"prompt": text(p.question.prompt), "chosen": f" {text(p.chosen)}", "rejected": f" {text(p.rejected)}"}
        for p in bench.pairs(run.group)[0]
    ]
    output_dir = tempfile.mkdtemp(prefix="sampo-lab-")  # nothing is saved there
    try:
        arguments = SamPOConfig(
            output_dir=output_dir,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            beta=settings.beta,
            warmup_steps=max(settings.steps // 10, 1),
            lr_scheduler_type="linear",
            weight_decay=0.0,
            max_length=PROMPT_TOKENS + MAX_ANSWER_TOKENS,
            seed=run.seed,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **METHODS[run.method].options,
        )
        policy = bench.load_start()
        trainer = SamPOTrainer(
            model=policy,
            ref_model=bench.load_start(),
            args=arguments,
            train_dataset=Dataset.from_list(data),
            processing_class=lm.build_tokenizer(),
            callbacks=[Steps()],
        )
        trainer.remove_callback(PrinterCallback)
        with warnings.catch_warnings():
            # TRL 1.16 reads the name that transformers 5.23 has renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            trainer.train()
    finally:
        shutil.rmtree(output_dir, ignore_errors=True)
    return policy.eval(), trainer.state.log_history[-1]

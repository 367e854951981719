"""The five benchmarks of the SamPO paper (arXiv 2406.10957, Table 2), run by lm-evaluation-harness.

The harness decides how many examples ("shots") a prompt gets: a task whose definition has 0 stays at 0 whatever is
requested, and only its log reports it. So the paper's "3-shot" IFEval and TruthfulQA cannot be run with the unchanged
harness; the number used is read from its results and recorded beside the number requested.

Data come from the hub, or from a folder with one folder per benchmark and one JSONL file per split in it, in the
fields of the harness's own data sets: `piqa/train.jsonl`, `piqa/validation.jsonl`, `mmlu/anatomy/test.jsonl`, …
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..io.hashing import hash_files
from ..io.records import Record, provenance
from ..stats.bootstrap import bootstrap
from ..stats.intervals import Estimate, rate_interval, undefined

RESAMPLES = 2000  # of the interval of a rate over instructions, several to a prompt


@dataclass(frozen=True)
class Benchmark:
    """A task of the harness as the paper used it.

    Attributes:
        task: name in the harness; for a group, that of the group.
        shots: examples in the prompt, as in the paper.
        metric: what the paper reports, and the filter of the answers that it is computed from.
        definition: file of the task below the harness's `tasks`; for a group, with `{}` for each part.
        title: metric for people.
    """

    task: str
    shots: int
    metric: tuple[str, str]
    definition: str
    title: str


BENCHMARKS = {
    "gsm8k": Benchmark("gsm8k", 8, ("exact_match", "strict-match"), "gsm8k/gsm8k.yaml", "exact match, strict"),
    "ifeval": Benchmark(
        "ifeval", 3, ("inst_level_strict_acc", "none"), "ifeval/ifeval.yaml", "instructions followed, strict"
    ),
    "piqa": Benchmark("piqa", 3, ("acc", "none"), "piqa/piqa.yaml", "accuracy"),
    "mmlu": Benchmark("mmlu", 0, ("acc", "none"), "mmlu/default/mmlu_{}.yaml", "accuracy"),
    "truthfulqa": Benchmark("truthfulqa_mc1", 3, ("acc", "none"), "truthfulqa/truthfulqa_mc1.yaml", "accuracy, MC1"),
}
# instructions of IFEval whose check splits text with NLTK's data, which is no part of the package
NEED_NLTK = ("change_case:capital_word_frequency", "length_constraints:number_sentences")
DOCUMENT, SCORED = "doc_id", "filter"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of a benchmark.

    Attributes:
        benchmark: name in `BENCHMARKS`.
        score: the paper's metric, with an interval over prompts.
        shots_asked: examples that were requested.
        shots_used: examples that the harness put into its prompts.
        others: further metrics of the harness, by name; without interval.
        version: of the task, by the harness.
    """

    benchmark: str
    score: Estimate
    shots_asked: int
    shots_used: int
    others: Mapping[str, float]
    version: str

    @property
    def note(self) -> str:
        """What a reader has to know, or ""."""
        if self.shots_used == self.shots_asked:
            return ""
        return (
            f"{self.benchmark} was run with {self.shots_used} shots, not with {self.shots_asked}: the harness fixes "
            "the number for this task."
        )


def require() -> None:
    """Raise an ImportError that names what to install, if the harness is missing."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ImportError("`sampo bench` needs lm-evaluation-harness: pip install 'sampo-dpo[harness]'.") from None


def settings(
    name: str, *, model: Mapping[str, Any], shots: int | None, limit: int | None, data: Path | None, chat: str | None
) -> dict[str, Any]:
    """Everything that a benchmark's numbers depend on and that is known before it runs.

    Args:
        name: of the benchmark.
        model: name, weights and type of the weights.
        shots: instead of the paper's.
        limit: prompts of each task, from the first; None for all.
        data: folder of local data; None for the hub.
        chat: hash of the chat template, None where none is used.
    """
    return {
        "benchmark": name,
        "task": BENCHMARKS[name].task,
        "shots_asked": BENCHMARKS[name].shots if shots is None else shots,
        "limit": limit,
        "data": None if data is None else _hash_data(_local_files(data, name)),
        "template": chat,
        "harness": metadata.version("lm_eval"),
        **model,
    }


def run(
    name: str,
    lm: Any,
    *,
    shots: int | None = None,
    limit: int | None = None,
    data: Path | None = None,
    chat: bool = False,
    seed: int = 1234,
) -> Outcome:
    """Run one benchmark.

    Args:
        name: in `BENCHMARKS`.
        lm: a model of the harness, such as `lm_eval.models.huggingface.HFLM`.
        shots: examples in the prompt; by default the paper's.
        limit: prompts of each task, from the first.
        data: folder of local data; None for the hub.
        chat: put prompts into the chat template.
        seed: of the draw of the examples, and of all else.

    Raises:
        ValueError: data are missing, or IFEval would need NLTK's data, which are not there.
    """
    import lm_eval.tasks
    from lm_eval import simple_evaluate

    benchmark = BENCHMARKS[name]
    if name == "ifeval":
        check_nltk(data)
    asked = benchmark.shots if shots is None else shots
    with tempfile.TemporaryDirectory() as folder:
        task, task_folder = benchmark.task, (Path(lm_eval.tasks.__file__).parent / benchmark.definition).parent
        if data is not None:
            task, task_folder = write_local_task(name, data, Path(folder)), Path(folder)
        found: Any = simple_evaluate(
            model=lm,
            tasks=[task],
            num_fewshot=asked,
            limit=limit,
            # the folder of this task alone: to read all definitions takes ten seconds
            task_manager=lm_eval.tasks.TaskManager(include_path=str(task_folder), include_defaults=False),
            apply_chat_template=chat,
            bootstrap_iters=0,  # intervals are made here
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return _outcome(name, task, asked, found, seed)


def _outcome(name: str, task: str, asked: int, found: Mapping[str, Any], seed: int) -> Outcome:
    """What is kept of the harness's results on a task."""
    benchmark = BENCHMARKS[name]
    used = {int(found["n-shot"][part]) for part in found["samples"]}
    if len(used) != 1:
        raise RuntimeError(f"All parts of {name} must have as many shots, got {sorted(used)}.")
    metric = ",".join(benchmark.metric)
    own, score = float(found["results"][task][metric]), _score(found["samples"].values(), benchmark.metric, seed)
    if score.value is None or abs(own - score.value) > 1e-9:
        raise RuntimeError(f"{name}: {metric} must be the mean over its samples, got {own} and {score.value}.")
    others = {
        key.removesuffix(",none").replace(",", "/"): float(value)
        for key, value in found["results"][task].items()
        if key != metric and "_stderr" not in key and "," in key and isinstance(value, int | float)
    }
    version = str(found["versions"].get(task, found["versions"].get(next(iter(found["samples"])))))
    return Outcome(
        benchmark=name, score=score, shots_asked=asked, shots_used=used.pop(), others=others, version=version
    )


def _score(tasks: Iterable[list[dict[str, Any]]], metric: tuple[str, str], seed: int) -> Estimate:
    """Mean over prompts, or over all instructions where a prompt has several."""
    values = [sample[metric[0]] for samples in tasks for sample in samples if sample[SCORED] == metric[1]]
    if not values:
        return undefined(0)
    if not isinstance(values[0], list):
        return rate_interval(np.array(values, dtype=float))
    hits, totals = (np.array([count(value) for value in values], dtype=float) for count in (sum, len))
    [share] = bootstrap(
        [lambda counts: counts @ hits / (counts @ totals)], len(values), resamples=RESAMPLES, seed=seed
    )
    return replace(share, value=float(hits.sum() / totals.sum()))


# --- local data ----------------------------------------------------------------------------------------------------


def _local_files(data: Path, name: str) -> dict[str, dict[str, Path]]:
    """Part (subject of MMLU, else "") → split → file."""
    folder = data / name
    parts = {"": folder}
    if "{}" in BENCHMARKS[name].definition:
        parts = {path.name: path for path in sorted(folder.glob("*/"))}
    found = {
        part: {path.stem: path.resolve() for path in sorted(directory.glob("*.jsonl"))}
        for part, directory in parts.items()
    }
    if not found or not all(found.values()):
        empty = next((str(parts[part]) for part, files in found.items() if not files), str(folder))
        raise ValueError(
            f"`data` must hold one JSONL file per split of {name}, got none in {empty}. docs/bench.md has the layout."
        )
    return found


def _hash_data(files: Mapping[str, Mapping[str, Path]]) -> str:
    named = [(f"{part} {split}", path) for part, splits in files.items() for split, path in splits.items()]
    return hash_files(named)[:16]


def write_local_task(name: str, data: Path, into: Path) -> str:
    """Write definitions that differ from the harness's in where the data are; returns the name of the task."""
    import lm_eval.tasks
    import yaml

    benchmark, task_folder = BENCHMARKS[name], Path(lm_eval.tasks.__file__).parent
    tasks = []
    for part, splits in _local_files(data, name).items():
        original = task_folder / benchmark.definition.format(part)
        if not original.is_file():
            raise ValueError(f"`data` must have folders of parts that the harness knows, got {name}/{part}.")
        tasks.append(f"local_{name}_{part}" if part else f"local_{name}")
        definition = {
            "include": str(original),
            "task": tasks[-1],
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path) for split, path in splits.items()}},
        }
        (into / f"{tasks[-1]}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
    if "{}" not in benchmark.definition:
        return tasks[0]
    group = {
        "group": f"local_{name}",
        "task": tasks,
        "aggregate_metric_list": [{"metric": benchmark.metric[0], "weight_by_size": True}],
    }
    (into / "group.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    return f"local_{name}"


def check_nltk(data: Path | None) -> None:
    """Raise before answers are generated, if IFEval's check of them needs NLTK's data, which are missing.

    Args:
        data: folder of local data, whose prompts may all do without; None for the hub.
    """
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
        return
    except LookupError:
        pass
    needing = "it"
    if data is not None:
        rows = [
            json.loads(line)
            for path in _local_files(data, "ifeval")[""].values()
            for line in path.open(encoding="utf-8")
        ]
        count = sum(bool(set(row["instruction_id_list"]) & set(NEED_NLTK)) for row in rows)
        if not count:
            return
        needing = f"{count} of {len(rows)} prompts"
    raise ValueError(
        f"ifeval must have NLTK's `punkt_tab`, which {needing} cannot be checked without, and it is not there. Run "
        "`python -m nltk.downloader punkt_tab` where there is a network, and copy the folder that it names."
    )


# --- records -------------------------------------------------------------------------------------------------------


def records_of(outcome: Outcome, config: Mapping[str, Any], *, seed: int, command: str) -> list[Record]:
    """One record per number; that of the score comes last, so that a benchmark that has it is complete."""
    known = {
        **config,
        "shots_used": outcome.shots_used,
        "metric": ",".join(BENCHMARKS[outcome.benchmark].metric),
        "task_version": outcome.version,
    }
    score = outcome.score
    numbers: list[tuple[str, float | None, tuple[float, float] | None]] = [
        (f"bench/{outcome.benchmark}/{name}", value, None) for name, value in outcome.others.items()
    ]
    numbers.append((f"bench/{outcome.benchmark}", score.value, score.interval))
    where = provenance()
    return [
        Record(name=name, value=value, n=score.n, interval=bounds, config=known, seed=seed, command=command, **where)
        for name, value, bounds in numbers
    ]


def done(kept: Iterable[Record], config: Mapping[str, Any], seed: int) -> Record | None:
    """The score that these settings gave before, or None."""
    wanted = json.loads(json.dumps(dict(config)))
    for record in kept:
        if (
            record.name == f"bench/{config['benchmark']}"
            and record.seed == seed
            and all(record.config.get(key, key) == value for key, value in wanted.items())
        ):
            return record
    return None


def quiet() -> None:
    """Leave the harness its warnings, and the bars to people."""
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "WARNING")

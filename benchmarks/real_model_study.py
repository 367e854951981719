"""The methods of the study on a real model and real pairs: what becomes of length, and of the lean on length.

    python benchmarks/real_model_study.py --model FOLDER --data PAIRS.jsonl.gz --out real-results
    python benchmarks/real_model_study.py … --group long      # pairs whose chosen answer is longer
    python benchmarks/real_model_study.py … --steps 10 --pairs 80 --seeds 1

Each run trains a LoRA adapter with one method and one seed (which draws its pairs, their order and the adapter), then
scores held-out pairs and samples answers to held-out prompts. Nobody judges the answers: the numbers are about length,
not about quality. Records are appended to `records.jsonl` in the output folder, those of a run together; a
finished run is not run again, and answers that were written are not written again. The reference's log-probs are
computed once.
`python docs/build.py` makes the table of docs/results.md from measurements/real_model_study.jsonl.
"""

import argparse
import shlex
import sys
import time
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from sampo.io import records as results
from sampo.lab.experiment import Number
from sampo.lab.methods import METHODS, STUDY_METHODS
from sampo.methods import Method

START = "start"
CHOICES = {
    **METHODS,
    "rdpo_01": Method("R-DPO .01", {"token_weighting": "all", "length_penalty": 0.01}),
    "rejected_learned_balanced": STUDY_METHODS["rejected_learned_balanced"],
}
GROUPS = ("all", "long", "short")
HELD_OUT_SEED = 0  # of the split into prompts to train on and held-out ones, the same for all runs
MEASURED = ("held_out_pairs", "prompts", "max_tokens", "max_length", "dtype")  # what all numbers depend on
TRAINED = ("steps", "batch_size", "learning_rate", "beta", "lora_rank")  # and those of a run that trains
LAST = "seconds"  # what is written last
COLUMNS = {  # record -> head, digits
    "tokens": ("tokens", 1),
    "stops": ("stops", 2),
    "accuracy_chosen_longer": ("accuracy, chosen longer", 2),
    "accuracy_chosen_shorter": ("accuracy, chosen shorter", 2),
    "correlation": ("corr. with length", 2),
    "slope": ("margin per token", 4),
    "penalty_per_token": ("penalty per token", 4),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="local folder or hub id")
    parser.add_argument("--data", required=True, help="preference pairs: file, folder or hub id")
    parser.add_argument("--out", type=Path, default=Path("real-results"))
    parser.add_argument("--methods", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    parser.add_argument("--group", choices=GROUPS, default="all", help="pairs to train on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0, help="to share the seeds among processes")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--pairs", type=int, help="pairs to train on; as many as the steps take once, if not given")
    parser.add_argument("--max_length", type=int, default=256, help="longer pairs are omitted, none is cut")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--held_out_pairs", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts that are answered")
    parser.add_argument("--max_tokens", type=int, default=128, help="cap of an answer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    for name in ("seeds", "steps", "batch_size", "max_length", "held_out_pairs", "prompts", "max_tokens", "threads"):
        if getattr(args, name) < 1:
            raise SystemExit(f"real_model_study: `--{name}` must be at least 1, got {getattr(args, name)}.")
    args.command = shlex.join(["python", "benchmarks/real_model_study.py", *(sys.argv[1:] if argv is None else argv)])
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    path, bench = args.out / "records.jsonl", None
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for method in [START, *args.methods] if seed == 0 else args.methods:
            config = config_of(args, method, seed)
            key = results.config_key(config)
            if any(record.key == key and record.name == LAST for record in results.read(path)):
                continue
            bench = bench or Bench(args)
            began = time.perf_counter()
            numbers = [*bench.measure(method, seed, key), Number(LAST, time.perf_counter() - began, 1)]
            about = {"config": config, "seed": seed, "command": args.command, **results.provenance()}
            records = [results.Record(**number._asdict(), **about) for number in numbers]
            results.append(path, records)
            shown = {record.name: record.value for record in records if record.value is not None}
            print(f"seed {seed}, {method}: " + ", ".join(f"{name} {value:.3g}" for name, value in shown.items()))
            sys.stdout.flush()
    print(table(results.read(path)))


def config_of(args: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Everything that the numbers of a run depend on; a folder and a file by their names."""
    config = {"experiment": "real model", "model": Path(args.model).name, "data": Path(args.data).name}
    config |= {"method": method, "seed": seed, **{name: getattr(args, name) for name in MEASURED}}
    if method == START:
        return config
    config |= {name: getattr(args, name) for name in ("group", *TRAINED)}
    return config | {"pairs": args.pairs or args.steps * args.batch_size, **CHOICES[method].options}


class Bench:
    """Model, tokenizer and pairs, which all runs share."""

    def __init__(self, args: argparse.Namespace):
        from sampo import load_preferences
        from sampo.data.subsets import split_by_prompt
        from sampo.evaluation.answers.prompts import Question
        from sampo.evaluation.texts import Texts
        from sampo.models.inference import fingerprint
        from sampo.models.load import load_tokenizer

        self.args = args
        self.tokenizer = load_tokenizer(args.model)
        self.texts, self.weights = Texts(self.tokenizer), fingerprint(args.model, None)
        pairs = load_preferences(args.data, on_bad_rows="drop")
        lengths = [self._lengths(row) for row in pairs]
        fits = [i for i, (prompt, *sides) in enumerate(lengths) if prompt + max(sides) <= args.max_length]
        print(f"{len(fits)} of {len(pairs)} pairs fit into {args.max_length} tokens.")
        pairs = pairs.select(fits)
        share = min(0.5, 1.2 * max(args.held_out_pairs, args.prompts) / max(len(pairs), 1))
        train, held_out = split_by_prompt(pairs, share, HELD_OUT_SEED)
        self.held_out = held_out.select(range(min(args.held_out_pairs, len(held_out))))
        self.train = train.select([i for i, row in enumerate(train) if self._in_group(row)])
        prompts = {Question(row["prompt"], {}).prompt_id: Question(row["prompt"], {}) for row in held_out}
        self.questions = list(prompts.values())[: args.prompts]
        wanted = args.pairs or args.steps * args.batch_size
        if len(self.train) < wanted:
            raise SystemExit(
                f"real_model_study: `--pairs` must not be more than there are, got {wanted} of {len(self.train)} in "
                f"the group {args.group} after {len(held_out)} were held out. Lower it, or raise `--max_length`."
            )

    def _lengths(self, row: dict[str, Any]) -> tuple[int, int, int]:
        prompt, chosen = self.texts.row(row["prompt"], _text(row["chosen"]))
        return len(prompt), len(chosen), len(self.texts.row(row["prompt"], _text(row["rejected"]))[1])

    def _in_group(self, row: dict[str, Any]) -> bool:
        _, chosen, rejected = self._lengths(row)
        return {"all": True, "long": chosen > rejected, "short": chosen < rejected}[self.args.group]

    def load_model(self):
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=getattr(torch, self.args.dtype))

    def measure(self, method: str, seed: int, key: str) -> list[Number]:
        """Train unless it is the start, and measure."""
        if method == START:
            return self._measure_answers(self.load_model().eval(), key, self.weights)
        trainer, seconds = self._trained(method, seed)
        numbers = self._measure_pairs(trainer)
        name = "length_penalty/per_token"
        thetas = [log[name] for log in trainer.state.log_history if name in log]
        if thetas:
            numbers.append(Number("penalty_per_token", thetas[-1], len(trainer.train_dataset)))
        policy = trainer.model.merge_and_unload().eval()
        numbers += self._measure_answers(policy, key, f"run {key}")
        return [*numbers, Number("seconds_per_step", seconds / self.args.steps, self.args.steps)]

    def _trained(self, method: str, seed: int):
        import torch
        from peft import LoraConfig
        from transformers import PrinterCallback

        from sampo import SamPOConfig, SamPOTrainer

        args, size = self.args, self.args.pairs or self.args.steps * self.args.batch_size
        config = SamPOConfig(
            output_dir=str(args.out / "scratch"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            beta=args.beta,
            warmup_steps=max(args.steps // 10, 1),
            lr_scheduler_type="linear",
            weight_decay=0.0,
            max_length=args.max_length + 8,  # nothing is cut
            seed=seed,
            use_cpu=not torch.accelerator.is_available(),
            bf16=False,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
            pair_stream="auto",
            precompute_ref_log_probs=True,
            ref_cache_dir=str(args.out / "ref_logps"),
            log_token_statistics=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **CHOICES[method].options,
        )
        torch.manual_seed(seed)  # peft draws the adapter from the global generator
        trainer = SamPOTrainer(
            model=self.load_model(),
            args=config,
            train_dataset=self.train.shuffle(seed=seed).select(range(size)),
            eval_dataset=self.held_out,
            processing_class=self.tokenizer,
            peft_config=LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear"),
        )
        trainer.remove_callback(PrinterCallback)
        began = time.perf_counter()
        trainer.train()
        return trainer, time.perf_counter() - began

    def _measure_pairs(self, trainer) -> list[Number]:
        """The plain sums of log-ratios on held-out pairs, for every method alike."""
        measured, n = trainer.evaluate(), len(self.held_out)
        names = {
            "accuracy_chosen_longer": "eval_dpo/accuracies/chosen_longer",
            "accuracy_chosen_shorter": "eval_dpo/accuracies/chosen_shorter",
            "correlation": "eval_dpo/length_gap/correlation",
            "slope": "eval_dpo/length_gap/slope",
        }
        return [Number(name, measured.get(source), n) for name, source in names.items()]

    def _measure_answers(self, policy, key: str, weights: str | None) -> list[Number]:
        from sampo.evaluation.answers.answers import read_answers
        from sampo.evaluation.answers.backends import TransformersBackend
        from sampo.evaluation.answers.generate import Sampling, generate
        from sampo.models.inference import Loaded
        from sampo.stats.intervals import mean_interval, rate_interval

        folder = self.args.out / "answers"
        folder.mkdir(parents=True, exist_ok=True)
        policy.generation_config.eos_token_id = policy.generation_config.eos_token_id or self.tokenizer.eos_token_id
        backend = TransformersBackend(key, Loaded(policy, weights, None), self.texts, batch_size=16)
        sampling = Sampling(max_tokens=self.args.max_tokens, temperature=1.0)
        generate(self.questions, backend, sampling, folder / f"{key}.jsonl")
        answers = read_answers(folder / f"{key}.jsonl")
        tokens = np.array([answer.tokens for answer in answers], dtype=float)
        length = mean_interval(tokens)
        stops = rate_interval(np.array([float(answer.stop != "length") for answer in answers]))
        return [
            Number("tokens", length.value, length.n, length.interval),
            Number("stops", stops.value, stops.n, stops.interval),
        ]


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


def table(records: list[results.Record]) -> str:
    """A table per experiment, that of the latest runs first."""
    experiments: dict[tuple[str, ...], list[results.Record]] = {}
    for record in records:
        if record.config["method"] != START:
            key = tuple(str(record.config[name]) for name in ("model", "data", *MEASURED, *TRAINED))
            experiments.setdefault(key, []).append(record)
    tables = []
    for runs in reversed(experiments.values()):
        starts = [r for r in records if r.config["method"] == START and _shared(r).items() <= runs[0].config.items()]
        tables.append(_table([*starts, *runs]))
    return "\n\n".join(tables)


def _shared(start: results.Record) -> dict[str, Any]:
    """What a start's numbers depend on."""
    return {name: value for name, value in start.config.items() if name not in ("method", "seed")}


def _table(records: list[results.Record]) -> str:
    """Mean ± standard deviation over seeds, of a single one with its interval, and how the runs were made."""
    lines: dict[tuple[str, str], dict[str, list[results.Record]]] = {}
    for record in records:
        if record.value is not None:
            line = lines.setdefault((record.config.get("group", ""), record.config["method"]), {})
            line.setdefault(record.name, []).append(record)
    order = ["", *GROUPS], [START, *CHOICES]
    found = sorted(lines, key=lambda key: (order[0].index(key[0]), order[1].index(key[1])))
    head = ["trained on", "method", "seeds", *(title for title, _ in COLUMNS.values())]
    rows = [head, ["---"] * len(head)]
    for group, method in found:
        title = "start" if method == START else CHOICES[method].title
        cells = [_cell(lines[group, method].get(name, []), digits) for name, (_, digits) in COLUMNS.items()]
        rows.append([f"`{group}`" if group else "–", title, str(len(lines[group, method]["tokens"])), *cells])
    settings = [{*r.config.items()} for r in records if r.config["method"] != START]
    about = ", ".join(f"{name} {value}" for name, value in sorted(set.intersection(*settings)))
    commands = "\n".join(f"- `{command}`" for command in dict.fromkeys(r.command for r in records))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{about}. Run by\n\n{commands}"


def _cell(records: list[results.Record], digits: int) -> str:
    if not records:
        return "–"
    values = [record.value for record in records if record.value is not None]
    text = f"{mean(values):.{digits}f}"
    if len(records) > 1:
        return f"{text} ± {stdev(values):.{digits}f}"
    interval = records[0].interval
    return text if interval is None else f"{text} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


if __name__ == "__main__":
    main()

"""Answers of the study on a real model through the commands of evaluation: judged by a model and by a ruler, compared.

    python benchmarks/real_model_study.py --model FOLDER --data PAIRS.jsonl.gz --out real-results
    python benchmarks/real_model_judged.py --model FOLDER --data PAIRS.jsonl.gz --out real-results

The judge is an implicit reward: a LoRA adapter on the same model, trained here (DPO with a learned length penalty) on
pairs that the study's seed 0 does not train on and whose prompts nobody answers. It is as small as what it judges; the
share of held-out pairs on which it agrees with people stands beside its verdicts. The ruler calls the longer answer
better. Commands are printed; an existing judge is not trained again.
"""

import argparse
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import real_model_study as study

from sampo.cli import main as sampo
from sampo.io import records as results

JUDGE_PAIRS = 512
JUDGE_SEED = 100  # of the shuffle of its pairs


def answers_of(out: Path, folder: Path, seed: int) -> dict[str, Path]:
    """Files of answers by method, copied under its name, which the tables then show."""
    found = {}
    for record in results.read(out / "records.jsonl"):
        method = record.config["method"]
        if record.name == "tokens" and record.config["seed"] == seed:
            copied = shutil.copy(out / "answers" / f"{record.key}.jsonl", folder / f"{method}.jsonl")
            found[method] = Path(copied)
    return found


def write_pairs(args: argparse.Namespace, folder: Path) -> None:
    """The judge's pairs: to train on, and the study's held-out ones."""
    bench = study.Bench(args)
    used = args.pairs or args.steps * args.batch_size
    taken = {json.dumps(row["prompt"]) for row in bench.train.shuffle(seed=0).select(range(used))}
    others = [row for row in bench.train.shuffle(seed=JUDGE_SEED) if json.dumps(row["prompt"]) not in taken]
    folder.mkdir()
    for name, rows in (("train", others[: args.judge_pairs]), ("test", bench.held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def commands(args: argparse.Namespace, folder: Path, answers: dict[str, Path]) -> list[list[str]]:
    """What is run, in this order."""
    training = {
        **{"--model_name_or_path": args.model, "--dataset_name": folder / "pairs", "--dtype": args.dtype},
        **{"--output_dir": folder / "adapter"},
        **{"--token_weighting": "all", "--length_penalty": "learned", "--beta": "0.1", "--use_peft": "true"},
        **{"--lora_r": "16", "--lora_alpha": "32", "--lora_target_modules": "all-linear", "--bf16": "false"},
        **{"--learning_rate": "2e-4", "--warmup_steps": "6", "--num_train_epochs": "1", "--use_cpu": "true"},
        **{
            "--per_device_train_batch_size": "8",
            "--max_length": args.max_length + 8,
            "--seed": "0",
            "--pair_stream": "auto",
        },
        **{"--report_to": "none", "--eval_strategy": "epoch", "--precompute_ref_log_probs": "true"},
    }
    found = [["train", *(str(word) for item in training.items() for word in item)]]
    judges = {"implicit": ["--model", str(folder / "adapter")], "longer": []}
    for judge, more in judges.items():  # first: win rates show what is known of their judge
        labelled = [
            "--labelled",
            str(folder / "pairs" / "test.jsonl"),
            "--out",
            str(folder / f"labelled-{judge}.jsonl"),
        ]
        found.append(["judge", *labelled, "--judge", judge, *more])
    for judge, more in judges.items():
        judged = []
        for method, path in answers.items():
            if method == study.START:
                continue
            judged.append(str(folder / f"{method}-{judge}.jsonl"))
            files = ["--system", str(path), "--baseline", str(answers[study.START])]
            found.append(["judge", *files, "--judge", judge, *more, "--out", judged[-1]])
        found.append(["compare", "--judgements", *judged, "--out", str(folder / f"comparison-{judge}")])
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Train the judge, judge, compare."""
    parser = study.make_parser()
    parser.description = __doc__
    parser.add_argument("--judge_pairs", type=int, default=JUDGE_PAIRS)
    args = parser.parse_args(words)
    folder = args.out / "judged"
    folder.mkdir(parents=True, exist_ok=True)
    answers = answers_of(args.out, folder, seed=0)
    if study.START not in answers or len(answers) < 2:
        raise SystemExit(f"real_model_judged: `--out` must hold a study with answers, got {sorted(answers)}.")
    if not (folder / "pairs").exists():
        write_pairs(args, folder / "pairs")
    for command in commands(args, folder, answers):
        if command[0] == "train" and (folder / "adapter" / "adapter_config.json").exists():
            continue
        print(f"$ sampo {shlex.join(command)}", flush=True)
        sampo(command)


if __name__ == "__main__":
    main()

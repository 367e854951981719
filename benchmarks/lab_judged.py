"""The lab's models through the commands of evaluation: generate, judge by the truth and by a ruler, compare.

    python benchmarks/lab_judged.py --out lab-judged

trains the supervised start, DPO and SamPO of `sampo lab` for one seed (minutes on two cores) and then runs what a user
would run; the commands are printed. Here the right answer is known: `--judge lab` is the true quality, so what the
statistics make of it can be compared with the lab's own table.
"""

import argparse
import contextlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from sampo.cli import main as sampo

METHODS = ("dpo", "sampo", "sampo_rejected_learned")


def train_models(out: Path, seed: int, settings) -> None:
    """The start and each method's model as folders, and the lab's questions as a file of prompts."""
    from sampo.lab import model as lm
    from sampo.lab.experiment import Bench, train
    from sampo.lab.settings import Run
    from sampo.lab.world import text

    @contextlib.contextmanager
    def progress(title: str, steps: int):
        print(f"{title}: {steps} steps", flush=True)
        yield lambda done: None

    bench = Bench(seed, settings, out, progress)
    rows = [json.dumps({"prompt": text(question.prompt)}) + "\n" for question in bench.questions]
    (out / "prompts.jsonl").write_text("".join(rows))
    lm.save(bench.start, out / "sft")
    for method in METHODS:
        if not (out / method).exists():
            lm.save(train(bench, Run(seed, "all", method, settings), lambda done: None)[0], out / method)


def commands(out: Path, seed: int) -> list[list[str]]:
    """What is run on them."""
    found = []
    for name in ("sft", *METHODS):
        sampling = ["--format", "raw", "--max_tokens", "120", "--temperature", "1.0", "--batch_size", "64"]
        files = ["--prompts", str(out / "prompts.jsonl"), "--out", str(out / f"{name}.jsonl")]
        found.append(["generate", str(out / name), *files, *sampling, "--device", "cpu"])
    for judge, more in (("lab", ["--lab_seed", str(seed)]), ("longer", [])):
        for name in METHODS:
            files = ["--system", f"{out / name}.jsonl", "--baseline", f"{out / 'sft'}.jsonl"]
            place = ["--out", f"{out / name}-{judge}.jsonl"]
            found.append(["judge", *files, "--judge", judge, *more, *place])
        files = [f"{out / name}-{judge}.jsonl" for name in METHODS]
        found.append(["compare", "--judgements", *files, "--out", str(out / f"comparison-{judge}")])
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Train, run, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lab-judged"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a few steps: shows that it runs and nothing else")
    args = parser.parse_args(words)
    from sampo.lab.settings import Settings

    few = {"steps": 2, "sft_steps": 5, "pairs": 64, "questions": 24, "demonstrations": 64}
    args.out.mkdir(parents=True, exist_ok=True)
    train_models(args.out, args.seed, Settings(**few) if args.tiny else Settings())
    for command in commands(args.out, args.seed):
        print(f"$ sampo {shlex.join(command)}", flush=True)
        sampo(command)


if __name__ == "__main__":
    main()

"""CPU time and memory of `sampo judge` and `sampo compare` on many prompts with several samples each.

    python benchmarks/evaluation_scale.py --out measurements/evaluation_scale.jsonl

writes two files of answers for each number of prompts, judges them by length (so that nothing but sampo is timed),
compares them, and appends one record per command and measure. `--code FOLDER` times another checkout of sampo.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sampo.io import records as results

ROOT = Path(__file__).resolve().parent.parent
WORDS = [f"word{i}" for i in range(30)]
SIDES = ["--system", "a.jsonl", "--baseline", "b.jsonl"]
COMMANDS = {
    "judge": ["judge", *SIDES, "--judge", "longer", "--out", "judged.jsonl"],
    "compare": ["compare", "--judgements", "judged.jsonl"],
}


def write_files(folder: Path, prompts: int, samples: int, seed: int = 0) -> None:
    """Two systems' answers of 20 to 120 words, `samples` to each prompt."""
    rng = random.Random(seed)
    for name in ("a", "b"):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(prompts):
                for sample in range(samples):
                    answer = " ".join(rng.choices(WORDS, k=rng.randrange(20, 120)))
                    row = {"prompt": f"Question {i}?", "sample": sample, "answer": answer, "stop": "eos"}
                    file.write(json.dumps(row) + "\n")


def run(command: list[str], folder: Path, code: Path) -> tuple[float, float]:
    """CPU seconds and peak memory in MB of one command of the sampo in `code`."""
    program = [sys.executable, "-c", "import sys; from sampo.cli import main; sys.exit(main(sys.argv[1:]))", *command]
    process = subprocess.Popen(
        program,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"`sampo {' '.join(command)}` must end without an error, got {process.returncode}.")
    peak = used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return used.ru_utime + used.ru_stime, peak


def measure(sizes: list[int], samples: int, code: Path, label: str, command: str) -> Iterator[results.Record]:
    """Two records per size and command."""
    where = results.provenance()
    for prompts in sizes:
        with tempfile.TemporaryDirectory() as place:
            write_files(Path(place), prompts, samples)
            for name, words in COMMANDS.items():
                seconds, peak = run(words, Path(place), code)
                for kind, value in (("cpu_seconds", seconds), ("peak_mb", peak)):
                    yield results.Record(
                        name=f"scale/{name}_{kind}",
                        value=value,
                        n=prompts,
                        config={"prompts": prompts, "samples": samples, "code": label},
                        command=command,
                        **where,
                    )


def scale_table(records: list[results.Record]) -> str:
    """Rows: code and number of prompts; columns: time and memory of both commands."""
    newest = {(r.name, r.config["code"], r.config["prompts"]): r.value for r in records}
    heads = ["code", "prompts × samples"]
    heads += [f"`{name}`, {what}" for name in COMMANDS for what in ("CPU s", "µs per pair", "peak MB")]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    samples = records[-1].config["samples"]
    for code, prompts in sorted(
        {(r.config["code"], r.config["prompts"]) for r in records}, key=lambda x: (x[0], x[1])
    ):
        cells = [code, f"{prompts:,} × {samples}"]
        for name in COMMANDS:
            seconds = newest[f"scale/{name}_cpu_seconds", code, prompts]
            peak = newest[f"scale/{name}_peak_mb", code, prompts]
            cells += [f"{seconds:.0f}", f"{1e6 * seconds / prompts / samples:.0f}", f"{peak:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    commands = dict.fromkeys(r.command for r in records)
    return "\n".join([*lines, "", "; ".join(f"`{command}`" for command in commands) + "."])


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, nargs="+", default=[12_500, 50_000, 200_000])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--code", type=Path, default=ROOT, help="checkout of sampo to time")
    parser.add_argument("--label", default="now", help="of that checkout in the table")
    options = parser.parse_args()
    command = f"python benchmarks/evaluation_scale.py --prompts {' '.join(map(str, options.prompts))}"
    command += f" --samples {options.samples}" + (
        "" if options.label == "now" else f" --code FOLDER --label '{options.label}'"
    )
    for record in measure(options.prompts, options.samples, options.code.resolve(), options.label, command):
        results.append(options.out, [record])
    sys.stdout.write(f"{scale_table(results.read(options.out))}\n")


if __name__ == "__main__":
    main()

"""The steps of on-policy rounds on a real model: their times and counts, from the state file of `sampo iterate`.

    head -96 pairs/harmless/test.jsonl > prompts.jsonl; tail -32 pairs/harmless/test.jsonl > held_out.jsonl
    OMP_NUM_THREADS=1 sampo iterate --config benchmarks/onpolicy_real_model.yaml --model_name_or_path FOLDER \
        --judge "implicit --model sweeps/harmless/runs/dpo-lr0.0002-beta0.1-s42 --ref_model FOLDER" \
        --output_dir rounds
    python benchmarks/onpolicy_real_model.py --rounds rounds --out measurements/onpolicy_real_model.jsonl

The pairs are those of real_pairs.py, and the judge is the implicit reward of a run of real_sweep.py, which has not
seen these prompts. What is measured are mechanics and times: such a judge is not known to be right.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sampo.io import records as results
from sampo.io.files import write_atomic
from sampo.io.records import Record
from sampo.training.onpolicy import OnPolicyState
from sampo.training.rounds import STATE, read_state

COUNTS = {
    "prompts": "prompts",
    "pairs": "pairs",
    "answers_tokens": "tokens of an answer",
    "answers_cut": "answers cut off",
    "chosen_longer": "chosen answer longer",
    "eval_tokens_ratio": "held-out answers, length / start",
    "eval_win_rate": "win rate against the start, by the same judge",
}
SHARES = ("answers_cut", "chosen_longer", "eval_win_rate")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=Path, required=True, help="folder of `sampo iterate`")
    parser.add_argument("--out", type=Path, required=True, help="file of records")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    state = read_state(args.rounds / STATE, OnPolicyState)
    if not isinstance(state, OnPolicyState):
        raise SystemExit(f"onpolicy_real_model: {args.rounds} must hold rounds of `sampo iterate`.")
    command = f"python benchmarks/onpolicy_real_model.py --rounds {args.rounds} --out {args.out}"
    found = []
    for one in state.rounds:
        numbers = {f"seconds/{step}": value for step, value in one.seconds.items()}
        numbers |= {name: one.metrics["on_policy"][name] for name in COUNTS}
        found += [
            Record(
                name=f"onpolicy/{name}",
                value=value,
                n=one.metrics["on_policy"]["prompts"],
                config={"round": one.number, "model": Path(state.plan.model).name, "generate": state.plan.generate},
                command=command,
                **results.provenance(),
            )
            for name, value in numbers.items()
        ]
    write_atomic(args.out, results.lines(found))
    print(table(found))


def table(records: Sequence[Record]) -> str:
    """One column for each round."""
    rounds = sorted({record.config["round"] for record in records})
    found = {(record.name.removeprefix("onpolicy/"), record.config["round"]): record.value for record in records}
    steps = dict.fromkeys(name for name, _ in found if name.startswith("seconds/"))
    rows = [["", *(f"round {number}" for number in rounds)]]
    for name, title in [(step, f"{step.removeprefix('seconds/')}, seconds") for step in steps] + list(COUNTS.items()):
        rows.append([title, *(_cell(name, found.get((name, number))) for number in rounds)])
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name in SHARES:
        return f"{value:.1%}"
    return f"{value:.0f}" if name.startswith("seconds/") or name in ("prompts", "pairs") else f"{value:.2f}"


if __name__ == "__main__":
    main()

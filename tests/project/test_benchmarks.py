"""The short form of the benchmark runs, and what it counts is right; its times mean nothing here."""

import gc
import itertools
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from tiny import make_model, make_pairs, save_model
from transformers import LlamaConfig
from trl.trainer.utils import add_fused_lm_head

from sampo.io import records as results

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import check  # noqa: E402, found by the path above
import class_swap  # noqa: E402, found by the path above
import counting  # noqa: E402, found by the path above
import profiling  # noqa: E402, found by the path above
import real_model_judged  # noqa: E402, found by the path above
import real_model_study  # noqa: E402, found by the path above
import sides  # noqa: E402, found by the path above
import step_time  # noqa: E402, found by the path above
import tables  # noqa: E402, found by the path above
import workload  # noqa: E402, found by the path above

MODELS = 2  # policy and live reference


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tables.Run:
    """What the short form measured."""
    out = tmp_path_factory.mktemp("benchmark") / "records.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "step_time.py"), "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = tables.runs(results.read(out))
    return found


def tiny_args(**more) -> SimpleNamespace:
    parsed = vars(step_time.make_parser().parse_args(["--tiny"]))
    return SimpleNamespace(**parsed | step_time.TINY | {"benchmark": "step_time"} | more)


def words(row: dict) -> tuple[int, int, int]:
    """Tokens of prompt, chosen and rejected; TRL adds an end token to both completions."""
    prompt, chosen, rejected = (len(row[name].split()) for name in ("prompt", "chosen", "rejected"))
    return prompt, chosen + 1, rejected + 1


def test_every_side_is_timed_in_each_repeat(run):
    assert set(run.timed) == set(sides.SIDES)
    assert all(len(run.sides[side]["seconds"]) == 2 for side in run.timed)


def test_tokens_are_those_of_the_layouts_and_methods(run):
    args = tiny_args()
    rows = [words(row) for row in workload.typical_drawn_rows(args, 997)]
    top = args.max_length
    lengths = [(p, min(c, top - p), min(r, top - p)) for p, c, r in rows]
    batches = [lengths[i : i + args.batch] for i in range(0, len(lengths), args.batch)]
    padded = sum(2 * args.batch * max(p + max(c, r) for p, c, r in batch) for batch in batches)
    labelled = sum(c + r for _, c, r in lengths)
    counted = sum(2 * min(c, r) for _, c, r in lengths)

    def of(side: str) -> tuple[float, float]:
        return run.sides[side]["backbone_tokens"], run.sides[side]["head_tokens"]

    assert of("TRL") == (MODELS * padded, MODELS * (padded - 2 * len(lengths)))
    assert of("TRL, reference cached") == (padded, padded - 2 * len(lengths))
    assert of("TRL, compact head") == (MODELS * padded, MODELS * labelled)
    assert of("authors' SamPO loss") == (MODELS * padded, MODELS * padded)
    assert of("DPO, padded") == (MODELS * padded, MODELS * labelled)
    assert of("DPO, stream")[1] == MODELS * labelled
    assert of("SamPO, stream")[1] == MODELS * counted
    for side, expected in (("DPO, stream", labelled), ("SamPO, stream", counted)):
        cached = f"{side}, reference cached"
        assert of(cached)[1] == expected
        assert of(cached)[0] <= sum(map(sum, lengths))
    # the stream may leave out what predicts no scored token, and no token else
    assert of("SamPO, stream")[0] <= of("DPO, stream")[0] <= MODELS * sum(map(sum, lengths)) < 0.7 * MODELS * padded


def test_policy_and_reference_are_equal_at_the_start_but_on_the_subsets_of_the_authors(run):
    for side, numbers in run.sides.items():
        if side == "authors' SamPO loss":
            assert abs(numbers["loss"] - math.log(2)) > 1e-3
        elif not side.startswith("limit"):  # whose loss is none of preferences
            assert numbers["loss"] == pytest.approx(math.log(2), abs=1e-5), side


def test_sides_that_share_models_do_not_disturb_each_other(run, tmp_path):
    args = tiny_args()
    work = workload.make_workload(args, str(tmp_path))
    built = {name: sides.SIDES[name](work) for name in ("TRL", "DPO, stream", "authors' SamPO loss", "SamPO, stream")}
    for side in built.values():
        step_time.warm_up(side)  # a stream compares its first batch with the padded forward
    for name in [*built, *reversed(built)]:
        built[name].activate()
        with counting.Counter([work.policy, work.reference]) as counter:
            step_time.run_pass(built[name])
        numbers = run.sides[name]
        assert (counter.backbone, counter.head) == (numbers["backbone_tokens"], numbers["head_tokens"]), name


def test_memory_is_that_of_a_whole_process(run):
    for numbers in run.sides.values():
        assert 0 <= numbers["added_memory_gib"] < numbers["peak_memory_gib"]
        assert 0.1 < numbers["peak_memory_gib"] < 10  # Python and torch alone are more than 0.1


def test_what_was_measured_is_not_measured_again_by_the_same_commit(tmp_path):
    args = tiny_args(out=tmp_path / "records.jsonl", purpose=None, command="", commit="abc")
    step_time.Log(args).write("seconds", 1.0, side="TRL", repeat=0)
    assert step_time.Log(args).has("seconds", side="TRL", repeat=0)
    assert not step_time.Log(args).has("seconds", side="TRL", repeat=1)
    others = [{"commit": commit} for commit in ("def", "abc-dirty", None)]
    for other in [*others, {"fresh": True}, {"seed": 1}, {"batch": 3}, {"dtype": "bfloat16"}, {"purpose": "batch"}]:
        assert not step_time.Log(tiny_args(**{**vars(args), **other})).has("seconds", side="TRL", repeat=0)


def test_the_command_can_be_run_again_and_names_no_folder_of_this_machine():
    parser = step_time.make_parser()
    words = ["--model", "/a/b/SmolLM2", "--data", "/c/pairs.jsonl.gz", "--batch", "2", "--sides", "TRL", "DPO, stream"]
    command = step_time.command_of(parser.parse_args([*words, "--fresh", "--out", "/d/x.jsonl"]), parser)
    assert "/a/" not in command
    assert "/c/" not in command
    assert "/d/" not in command
    shell = f'FOLDER=/a/b; for word in {command.removeprefix("python benchmarks/step_time.py")}; do echo "$word"; done'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    again = parser.parse_args(done.stdout.splitlines())
    assert (again.model, again.batch, again.sides) == ("/a/b/SmolLM2", 2, ["TRL", "DPO, stream"])


@pytest.mark.parametrize("shape", ["hh", "tldr", "ultrafeedback"])
def test_drawn_lengths_have_the_medians_of_their_shape(shape):
    args = tiny_args(shape=shape, batch=8, batches=workload.POOL, max_length=4096)
    drawn = zip(*map(words, workload.typical_drawn_rows(args, 50)), strict=True)
    for tokens, (wanted, spread) in zip(drawn, workload.SHAPES[shape], strict=True):
        assert median(tokens) == pytest.approx(wanted, rel=0.2)  # 808 draws: a few standard errors of the widest
        assert torch.tensor(tokens).log().std().item() == pytest.approx(spread, rel=0.15)


def test_a_shape_can_be_given_in_tokens():
    rows = workload.typical_drawn_rows(tiny_args(shape="7:5:3", batch=2, batches=3), 50)
    assert [words(row) for row in rows] == [(7, 5, 3)] * 6


def test_the_typical_batch_is_the_median_in_padding():
    def batch(longest: int) -> list[tuple[int, int, int]]:
        return [(10, longest, 5), (10, 5, 5)]

    batches = [batch(longest) for longest in (400, 5, 100, 20, 50)]
    assert workload.typical(batches, 1) == [4]  # 5, 20, 50, 100, 400 long
    assert workload.typical(batches, 5) == [1, 3, 4, 2, 0]


def test_the_authors_loss_sums_as_many_drawn_tokens_of_each_row_as_the_shorter_has():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 6, 11), torch.randint(11, (2, 6))
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0]])
    logps = logits.log_softmax(-1).gather(2, targets[:, :, None]).squeeze(2)
    subsets = [sum(pair).item() for pair in itertools.combinations(logps[0, 1:], 2)]
    seen = set()
    for _ in range(60):
        chosen, rejected = sides.sampled_sums(logits, targets, mask).tolist()
        assert rejected == pytest.approx(logps[1, 3:5].sum().item(), abs=1e-5)
        distances = [abs(chosen - subset) for subset in subsets]
        assert min(distances) < 1e-5
        seen.add(distances.index(min(distances)))
    assert len(seen) > 5  # of ten subsets


def test_the_compact_head_gives_what_trl_gives():
    models = [make_model(), make_model()]
    for model in models:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    torch.manual_seed(0)
    ids = torch.randint(2, 69, (4, 9))
    labels = ids.masked_fill(torch.rand(4, 9) < 0.5, -100)
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "fused_lm_head": True}
    expected, got = models[0](**kwargs), sides.with_compact_head(models[1], **kwargs)
    for name in ("log_probs", "entropy", "is_top1"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name))
    for output in (expected, got):
        output.log_probs.sum().backward()
    for theirs, ours in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("tied", [True, False])
def test_the_counter_sees_ids_and_rows_of_the_head_in_forward_passes_only(tied):
    model = make_model(tie_word_embeddings=tied)
    ids = torch.randint(2, 69, (3, 7))
    model(input_ids=ids)  # outside: not counted
    with counting.Counter([model]) as counter:
        model(input_ids=ids, logits_to_keep=2).logits.sum().backward()
    with torch.no_grad():
        model(input_ids=ids)
    assert (counter.backbone, counter.head) == (21, 6)


def test_the_counter_forgets_a_model_that_is_gone():
    memory = torch.rand(69, 16)  # outlives the model, as memory that the next tensor gets
    model = make_model(tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(memory)
    counter = counting.Counter([model])
    del model
    gc.collect()
    with counter:
        torch.rand(5, 69) @ memory
    assert counter.head == 0


@pytest.mark.parametrize("live", [True, False])
def test_flops_agree_with_a_count_by_hand(live):
    rng = random.Random(1)
    heads, kv, d, layers, inner, vocab = 6, 2, 8, rng.randint(2, 5), rng.randint(20, 99), rng.randint(100, 999)
    config = LlamaConfig(
        hidden_size=heads * d,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        num_hidden_layers=layers,
        intermediate_size=inner,
        vocab_size=vocab,
    )
    hidden, tokens, scored, row = heads * d, 1000, 77, 64
    weights = layers * (hidden * (heads + 2 * kv) * d + heads * d * hidden + 3 * hidden * inner)
    causal_attention = layers * 2 * 2 * heads * d * row / 2  # q·k and attention·v, half of the places
    forward = tokens * (2 * weights + causal_attention) + scored * 2 * vocab * hidden
    got = counting.flops(config, tokens=tokens, scored=scored, row_length=row, live_reference=live)
    assert got == pytest.approx(forward * (4 if live else 3), rel=1e-9)
    assert config.vocab_size == vocab


@pytest.mark.parametrize(
    ("name", "shapes", "group"),
    [
        ("aten::mm", [[100, 576], [576, 1536]], "linear layers"),
        ("aten::mm", [[1536, 100], [100, 576]], "linear layers"),  # its weight's gradient
        ("aten::mm", [[16384, 576], [576, 576]], "linear layers"),  # as many rows as a tile of the head is wide
        ("aten::mm", [[100, 576], [576, 32768]], "LM head"),
        ("aten::addmm", [[32768, 576], [32768, 100], [100, 576]], "LM head"),
        ("aten::addmm_", [[32768, 576], [32768, 100], [100, 576]], "LM head"),
        ("aten::exp", [[100, 16384]], "LM head"),
        ("aten::_log_softmax", [[16, 100, 49152]], "LM head"),
        ("aten::copy_", [[32768, 576], [32768, 576]], "LM head"),  # its weight in float32
        ("aten::bmm", [[9, 20, 64], [9, 64, 20]], "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [[1, 9, 20, 64]], "attention"),
        ("aten::embedding_dense_backward", [[1, 100, 576], [1, 100]], "embedding"),
        ("aten::index_put_", [[1, 100, 576]], "copies and layout"),
        ("aten::silu", [[1, 100, 1536]], "norms, activations, positions and the rest"),
    ],
)
def test_operations_are_grouped(name, shapes, group):
    assert profiling.group_of(name, shapes, inner={576, 192, 1536}, widths={49152, 32768, 16384}) == group


def swap_args(**more) -> SimpleNamespace:
    given = {"command": "", "commit": "abc", "purpose": None, "data": "d.jsonl", "model": "m", "dtype": "float32"}
    parsed = vars(class_swap.make_parser().parse_args(["--batch", "4", "--steps", "2"]))
    return SimpleNamespace(**parsed | given | {"benchmark": "class_swap", "batches": 2} | more)


def test_tables_of_a_class_swap_state_medians_ratios_and_targets(tmp_path):
    log = step_time.Log(swap_args(out=tmp_path / "r.jsonl"))
    seconds = {"TRL": (80.0, 40.0, 40.0), "SamPO": (8.0, 8.0, 2.0), "limit": (4.0, 4.0, 4.0)}
    for side, repeats in seconds.items():
        for repeat, value in enumerate(repeats):
            log.write("seconds", value, side=side, repeat=repeat)
            log.write("peak_memory_gib", 3.0 + repeat, side=side, repeat=repeat)
    later = step_time.Log(swap_args(out=log.path, commit="def"))
    later.write("seconds", 1.0, side="TRL", repeat=0)  # fewer sides: the tables keep what has more
    records = results.read(log.path)
    (swap,) = tables.swaps(records)
    assert swap.ratio("SamPO", "TRL") == (5.0, 5.0, 20.0)
    assert swap.ratio("SamPO", "authors") is None
    assert "| SamPO | 1 | 5.0 × | – | 50% | 5.00 |" in tables.class_swap_table(swap)
    assert "| SamPO against TRL | ≥ 9 × | 5.00 × | no |" in tables.targets_table(swap)
    assert "| sampo, live reference | 1 | 5.0 × | 5.00 |" in tables.readme_swap(records)


@pytest.mark.slow
def test_a_class_swap_is_timed_with_its_limit(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "class_swap.py"), "--tiny", "--steps", "2"]
    sides = ["TRL, compact head", "SamPO", "limit"]
    done = subprocess.run(
        [*command, "--sides", *sides, "--out", str(tmp_path / "r.jsonl")],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = results.read(tmp_path / "r.jsonl")
    (swap,) = tables.swaps(records)
    assert list(swap.seconds) == sides
    unique = [r.value for r in records if r.name == "unique_tokens"]
    selected = [r.value for r in records if r.name == "selected_tokens"]
    assert len(unique) == len(selected) == class_swap.TINY["steps"]
    assert all(0 < b < a for a, b in zip(unique, selected, strict=True))


def test_a_baseline_fails_below_its_noise_only():
    kept = {"sides": {"SamPO": {"ratio": 8.0, "noise": 0.1, "peak_memory_gib": 4.0}}}

    def compared(ratio, memory):
        return check.compare(kept, {"sides": {"SamPO": {"ratio": ratio, "noise": 0.05, "peak_memory_gib": memory}}})

    assert compared(6.9, 4.3) == []
    assert "must be at least 6.80 × TRL (baseline 8.00 ×" in compared(6.7, 4.0)[0]
    assert "must need at most a quarter more than 4.00 GiB, got 5.50 GiB" in compared(8.0, 5.5)[0]


def test_each_configuration_has_its_baseline():
    kept = {path.stem: json.loads(path.read_text()) for path in check.BASELINES.glob("*.json")}
    assert {name: each["configuration"] for name, each in kept.items()} == check.CONFIGURATIONS
    assert all(set(each["sides"]) == set(check.SIDES[1:]) for each in kept.values())


# --- the study on a real model --------------------------------------------------------------------------------------

METHOD = "sampo_rejected_learned"
TINY_STUDY = "--steps 2 --batch_size 2 --held_out_pairs 10 --prompts 4 --max_tokens 8 --seeds 1 --threads 1"


@pytest.fixture(scope="module")
def real_study(tmp_path_factory):
    """A study on a tiny model: its command and its folder."""
    folder = tmp_path_factory.mktemp("study")
    make_pairs(60, conversational=True).to_json(folder / "pairs.jsonl")
    paths = [
        "--model",
        save_model(folder / "model"),
        "--data",
        str(folder / "pairs.jsonl"),
        "--out",
        str(folder / "out"),
    ]
    command = [*paths, *TINY_STUDY.split(), "--max_length", "64", "--methods", METHOD]
    real_model_study.main(command)
    return command, folder / "out"


def test_the_study_on_a_real_model_measures_the_start_and_a_method(real_study):
    records = results.read(real_study[1] / "records.jsonl")
    numbers = {(r.config["method"], r.name): r for r in records}
    assert {method for method, _ in numbers} == {"start", "sampo_rejected_learned"}
    for method in ("start", "sampo_rejected_learned"):
        assert 1 <= numbers[method, "tokens"].value <= 8
        assert numbers[method, "tokens"].n == 4
        answers = (real_study[1] / "answers" / f"{numbers[method, 'tokens'].key}.jsonl").read_text().splitlines()
        mean = sum(json.loads(line)["tokens"] for line in answers) / 4
        assert numbers[method, "tokens"].value == pytest.approx(mean)
    trained = {name: record.value for (method, name), record in numbers.items() if method != "start"}
    assert trained["penalty_per_token"] != 0
    assert trained["seconds_per_step"] > 0
    assert {"accuracy_chosen_longer", "accuracy_chosen_shorter", "correlation", "slope"} <= trained.keys()
    table = real_model_study.table(records)
    (low, high) = numbers["start", "tokens"].interval
    assert f"| start | 1 | {numbers['start', 'tokens'].value:.1f} [{low:.1f}, {high:.1f}] |" in table
    assert "steps 2" in table


def test_runs_of_another_setting_get_a_table_of_their_own(real_study):
    """One with more steps has the same start, one with shorter answers has another."""
    records = results.read(real_study[1] / "records.jsonl")
    trained = [r for r in records if r.config["method"] != "start"]
    longer = [
        replace(r, config=r.config | {"steps": 9, "seed": seed}, value=2.0, command=f"again {seed}")
        for r in trained
        for seed in (0, 1)
    ]
    shorter = [replace(r, config=r.config | {"max_tokens": 3}) for r in trained]
    first, second, third = real_model_study.table([*records, *longer, *shorter]).split("\n\n| trained on")
    assert ("max_tokens 3" in first, "steps 9" in second, "steps 2" in third) == (True, True, True)
    assert ["| start |" in table for table in (first, second, third)] == [False, True, True]
    assert "| 2 | 2.0 ± 0.0 |" in second
    assert [second.count(f"- `again {seed}`") for seed in (0, 1)] == [1, 1]
    assert second.count("± 0.0") == len([r for r in trained if r.name in real_model_study.COLUMNS])


def test_processes_can_share_the_seeds_of_the_study_on_a_real_model(real_study, tmp_path):
    command, folder = real_study
    (tmp_path / "records.jsonl").write_bytes((folder / "records.jsonl").read_bytes())
    real_model_study.main([*command, "--out", str(tmp_path), "--first_seed", "1"])
    records = results.read(tmp_path / "records.jsonl")
    assert {(r.config["method"], r.seed) for r in records} == {("start", 0), (METHOD, 0), (METHOD, 1)}
    assert "| 2 |" in real_model_study.table(records)


def test_the_study_on_a_real_model_runs_nothing_twice_and_says_what_is_missing(real_study):
    command, folder = real_study
    before = (folder / "records.jsonl").read_bytes()
    real_model_study.main(command)
    assert (folder / "records.jsonl").read_bytes() == before
    with pytest.raises(SystemExit, match="`--pairs` must not be more than there are, got 1000 of"):
        real_model_study.main([*command, "--pairs", "1000"])
    with pytest.raises(SystemExit, match="`--steps` must be at least 1, got 0"):
        real_model_study.main([*command, "--steps", "0"])


def test_its_answers_are_judged_by_a_model_of_other_pairs_and_by_a_ruler(real_study, capsys):
    command, out = real_study
    real_model_judged.main([*command, "--judge_pairs", "16"])
    folder = out / "judged"

    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]

    trained, tested = rows("pairs/train"), rows("pairs/test")
    assert len(trained) == 16
    assert not {json.dumps(row["prompt"]) for row in trained} & {json.dumps(row["prompt"]) for row in tested}
    answers = {name: {row["prompt_id"]: row["tokens"] for row in rows(name)} for name in ("start", METHOD)}
    assert answers["start"].keys() == answers[METHOD].keys()
    judged = json.loads((folder / "comparison-longer.json").read_text())["systems"]
    assert judged[0]["system"] == METHOD
    assert judged[0]["tokens_mean"] == pytest.approx(sum(answers[METHOD].values()) / len(answers[METHOD]))
    compared = json.loads((folder / "comparison-implicit.json").read_text())["systems"]
    checked = {r.name: r for r in results.read(folder / "labelled-implicit.agreement.jsonl")}
    assert checked["agreement/count/pairs"].value == len(tested)
    assert f"in {100 * checked['agreement/accuracy'].value:.1f} % [" in compared[0]["judge_check"]
    capsys.readouterr()
    real_model_judged.main([*command, "--judge_pairs", "16"])
    assert "$ sampo train" not in capsys.readouterr().out

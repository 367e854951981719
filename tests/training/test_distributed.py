"""Two real processes on CPU (gloo, DistributedDataParallel) against one process with twice the batch."""

import math

import pytest
import yaml
from processes import ROOT, launch, launch_runs
from tiny import make_pairs, save_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


OURS = {"sampled_sides": "rejected", "token_budget": "dataset", "length_penalty": "learned"}


STREAM = {"pair_stream": "true", **OURS}
CACHED = {"precompute_ref_log_probs": True, **OURS}
# Pairs of very unequal lengths, eight a step: what one process accumulates, two lay into full micro-batches.
UNEQUAL = {"unequal": True, "batch": 1}
FILLED = {"gradient_accumulation_steps": 4, "max_tokens_per_forward": 300}
GENERATED = {"generate_every": 3, "generate_max_tokens": 12, **OURS}
FULL_PRECISION_SUMS = 5e-6  # a loss, fp32 sums in another order
OTHER_LAYOUT = 2e-5  # a loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(model_folder, folder):
    """The runs of one process."""
    runs = {"plain": {"batch": 4, "options": OURS}, "bf16": {"batch": 4, "options": {"bf16": True}}}
    runs["generated"] = {"batch": 4, "options": GENERATED}
    accumulated = {"gradient_accumulation_steps": 8}
    runs["accumulated"] = {**UNEQUAL, "options": {**OURS, **accumulated}}
    runs["accumulated lora"] = {**UNEQUAL, "lora": True, "options": accumulated}
    return {name: ranks[0] for name, ranks in launch_runs(model_folder, folder / "alone", runs, processes=1).items()}


@pytest.fixture(scope="module")
def one(alone):
    return alone["plain"]


@pytest.fixture(scope="module")
def together(model_folder, folder):
    """Those of two processes, all in one launch, for its start takes longer than a run."""
    checkpoint = str(folder / "together" / "plain" / "checkpoint-3")
    make_pairs(24).save_to_disk(folder / "data")
    runs = {
        "plain": {"options": {"save_strategy": "steps", "save_steps": 3, **OURS}},
        "resumed": {"options": OURS, "resume": checkpoint},
        "generated": {"options": {**GENERATED, **STREAM}},
        "stream": {"options": STREAM},
        "pieces": {"options": {"max_tokens_per_forward": 20, **STREAM}},
        "unfilled": {**UNEQUAL, "options": {"gradient_accumulation_steps": 4, **STREAM}},
        "filled": {**UNEQUAL, "options": {**FILLED, **STREAM}},
        "filled cached": {**UNEQUAL, "options": {**FILLED, "pair_stream": "false", **CACHED}},
        "filled lora": {**UNEQUAL, "lora": True, "options": {**FILLED, "pair_stream": "true"}},
        "memory": {"options": {"ref_cache_dir": str(folder / "memory"), **CACHED}},
        "disk": {"options": {"ref_cache_dir": str(folder / "disk"), **CACHED}, "disk": str(folder / "data")},
    }
    runs = {name: {"batch": 2, **settings} for name, settings in runs.items()}
    return launch_runs(model_folder, folder / "together", runs, processes=2)


@pytest.fixture(scope="module")
def two(together):
    return together["plain"]


def test_two_processes_train_as_one_with_twice_the_batch(one, two):
    assert [rank["processes"] for rank in two] == [2, 2]
    assert two[0]["losses"] == pytest.approx(one["losses"], abs=FULL_PRECISION_SUMS)
    assert two[0]["checksum"] == two[1]["checksum"]
    assert two[0]["checksum"] == pytest.approx(one["checksum"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_on_two_processes_trains_as_on_one_without_a_word_of_unused_parameters(
    model_folder, folder, checkpointing
):
    def run(processes):
        options = {"gradient_checkpointing": checkpointing, "log_level": "warning"}
        runs = {"lora": {"lora": True, "batch": 4 // processes, "options": options}}
        out = folder / f"lora-{processes}-{checkpointing}"
        return launch_runs(model_folder, out, runs, processes=processes)["lora"], (out / "stderr.txt").read_text()

    (alone,), _ = run(1)
    (first, _), said = run(2)
    assert first["losses"] == pytest.approx(alone["losses"], abs=FULL_PRECISION_SUMS)
    for noise in ("find_unused_parameters", "[RANK", "Setting accelerator to CPU"):
        assert noise not in said


def test_the_subsets_of_two_processes_are_those_of_one(one, two):
    together = sorted(two[0]["subsets"] + two[1]["subsets"])
    assert together == one["subsets"]
    assert any(0.0 in kept[len(kept) // 2 :] and 1.0 in kept for _, _, kept in together)


def test_theta_is_one_number_on_all_processes_and_that_of_one_process(one, two):
    thetas = [rank["theta"] for rank in two]
    assert thetas[0] == thetas[1] != 0
    assert thetas[0] == pytest.approx(one["theta"], abs=1e-6)


def test_metrics_of_length_do_not_depend_on_the_number_of_processes_and_the_uneven_last_batch(one, two):
    names = [name for name in one["eval"] if "length" in name or "accuracies/chosen" in name]
    assert len(names) >= 9
    for rank in two:
        for name in names:
            # margins in fp32, after six steps whose rounding differs
            bound = {"slope": 1e-5, "correlation": 2e-3}.get(name.rsplit("/", 1)[-1], 1e-9)
            assert rank["eval"][name] == pytest.approx(one["eval"][name], rel=0, abs=bound), name
        assert rank["eval"]["eval_length/chosen"] == one["eval"]["eval_length/chosen"]
    assert [e["length/chosen"] for e in one["log"][:6]] == [e["length/chosen"] for e in two[0]["log"][:6]]


def test_two_processes_answer_their_shares_of_an_odd_number_of_prompts(alone, together):
    def generated(run):
        return [entry for entry in run["log"] if "length/generated" in entry]

    one, (first, second) = generated(alone["generated"]), map(generated, together["generated"])
    assert [entry["step"] for entry in one] == [0, 3, 6]
    for ours, same, theirs in zip(first, second, one, strict=True):
        for name in ("length/generated", "length/generated_ended", "length/generated_ratio"):
            assert ours[name] == same[name] == theirs[name], name
    assert together["generated"][0]["losses"] == together["stream"][0]["losses"]


def test_two_processes_resume_to_the_same_losses_theta_and_subsets(two, together):
    resumed = together["resumed"]
    assert resumed[0]["losses"] == two[0]["losses"]
    assert resumed[0]["theta"] == two[0]["theta"]
    assert resumed[0]["checksum"] == two[0]["checksum"]
    assert resumed[1]["subsets"] == [s for s in two[1]["subsets"] if s[0] >= 3]


def test_two_processes_with_the_pair_stream_train_as_one_without(one, together):
    ranks = together["stream"]
    assert [rank["streams"] for rank in ranks] == [True, True]
    assert ranks[0]["losses"] == pytest.approx(one["losses"], abs=OTHER_LAYOUT)
    assert sorted(ranks[0]["subsets"] + ranks[1]["subsets"]) == one["subsets"]
    assert ranks[0]["theta"] == ranks[1]["theta"] == pytest.approx(one["theta"], abs=1e-5)


@pytest.mark.parametrize("name", ["filled", "filled cached", "filled lora"])
def test_two_processes_with_full_micro_batches_train_as_one_that_accumulates(alone, together, name):
    one, ranks = alone["accumulated lora" if "lora" in name else "accumulated"], together[name]
    assert ranks[0]["losses"] == pytest.approx(one["losses"], abs=OTHER_LAYOUT)
    assert ranks[0]["checksum"] == ranks[1]["checksum"]
    assert ranks[0]["checksum"] == pytest.approx(one["checksum"], rel=1e-5)
    assert ranks[0]["theta"] == ranks[1]["theta"] == pytest.approx(one["theta"], abs=1e-5)
    for ours, theirs in zip(ranks[0]["log"][:6], one["log"][:6], strict=True):
        for metric in ("grad_norm", "learning_rate", "epoch", "length/chosen", "num_tokens", "rewards/margins"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4, abs=1e-5), metric


@pytest.mark.parametrize("name", ["filled", "filled cached", "filled lora"])
def test_both_processes_run_as_many_forwards_within_the_limit(together, name):
    first, second = ([step for step, _ in rank["forwards"]] for rank in together[name])
    assert first == second
    assert max(tokens for rank in together[name] for _, tokens in rank["forwards"]) <= FILLED["max_tokens_per_forward"]


def test_pairs_move_between_processes_until_both_have_like_tokens(together):
    def difference(name):
        totals = [[sum(n for at, n in rank["forwards"] if at == step) for step in range(6)] for rank in together[name]]
        return sum(abs(a - b) for a, b in zip(*totals, strict=True)) / sum(map(sum, totals))

    assert len(together["filled"][0]["forwards"]) < len(together["unfilled"][0]["forwards"]) == 6 * 4
    # the rest: tokens behind the last selected one are not computed, and a step may have an odd number of long pairs
    assert difference("filled") < difference("unfilled") / 2


def test_two_processes_in_pieces_train_as_one_without(one, together):
    ranks = together["pieces"]
    assert ranks[0]["losses"] == pytest.approx(one["losses"], abs=OTHER_LAYOUT)
    assert ranks[0]["checksum"] == ranks[1]["checksum"]
    assert ranks[0]["theta"] == ranks[1]["theta"] == pytest.approx(one["theta"], abs=1e-5)
    assert [e["length/chosen"] for e in one["log"][:6]] == [e["length/chosen"] for e in ranks[0]["log"][:6]]


def test_under_fsdp2_in_bf16_the_log_probs_are_summed_in_float32(model_folder, alone, tmp_path):
    shipped = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text())
    shipped["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] = False  # needs a device
    shipped["mixed_precision"] = "no"  # `bf16: true` of the trainer says it
    config = tmp_path / "fsdp2.yaml"
    config.write_text(yaml.safe_dump(shipped))
    one = alone["bf16"]
    ranks = launch(model_folder, tmp_path, processes=2, batch=2, config=config, bf16=True)
    assert ranks[0]["kind"].startswith("FSDP")
    assert ranks[0]["dtypes"] == ["torch.float32"]
    # the parameters themselves are in bf16 here, and in float32 under autocast there
    assert ranks[0]["losses"] == pytest.approx(one["losses"], abs=4e-3)
    assert ranks[0]["losses"][0] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_two_processes_fill_a_reference_cache_together_and_train_as_with_a_live_one(folder, together, two, place):
    ranks = together[place]
    assert [rank["computed"] for rank in ranks] == [[24, 11]] * 2
    assert len(list((folder / place).glob("*/shard-*.arrow"))) == 4  # one a rank of each data set
    assert_same_losses(ranks[0], two[0])


def test_one_process_takes_the_reference_cache_of_two(model_folder, folder, together, one, tmp_path):
    assert together["memory"][0]["computed"] == [24, 11]
    (again,) = launch(model_folder, tmp_path, processes=1, batch=4, ref_cache_dir=str(folder / "memory"), **CACHED)
    assert again["computed"] == [0, 0]
    assert_same_losses(again, one)


def assert_same_losses(ours, theirs):
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=FULL_PRECISION_SUMS)
    assert ours["eval"]["eval_loss"] == pytest.approx(theirs["eval"]["eval_loss"], abs=FULL_PRECISION_SUMS)


def test_a_rank_that_cannot_write_its_shard_ends_all(model_folder, tmp_path):
    cached = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")}
    done = launch(model_folder, tmp_path / "o", processes=2, batch=2, check=False, no_shard_on=1, **cached)
    assert done.returncode != 0
    assert "No such file or directory: '/no/such/folder/file'" in done.stderr
    # whichever rank the launcher ends first; neither waits for the other
    assert "failed on other processes: {1: " in done.stderr or "SIGTERM" in done.stderr


def test_processes_that_do_not_know_of_each_other_are_refused(model_folder, tmp_path):
    done = launch(model_folder, tmp_path, processes=2, batch=2, check=False, use_cpu=False)
    assert done.returncode != 0
    assert "All 2 launched processes must train one model together" in done.stderr

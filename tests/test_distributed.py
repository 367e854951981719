"""Two real processes on CPU (gloo, DistributedDataParallel) against one process with twice the batch."""

import math

import pytest
import yaml
from processes import ROOT, launch
from tiny import make_pairs, save_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


OURS = {"sampled_sides": "rejected", "length_penalty": "learned"}


@pytest.fixture(scope="module")
def one(model_folder, tmp_path_factory):
    return launch(model_folder, tmp_path_factory.mktemp("one"), processes=1, batch=4, **OURS)[0]


@pytest.fixture(scope="module")
def two(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, launch(model_folder, folder, processes=2, batch=2, save_strategy="steps", save_steps=3, **OURS)


def test_two_processes_train_as_one_with_twice_the_batch(one, two):
    ranks = two[1]
    assert [rank["processes"] for rank in ranks] == [2, 2]
    assert ranks[0]["losses"] == pytest.approx(one["losses"], abs=5e-6)  # fp32 sums in another order
    assert ranks[0]["checksum"] == ranks[1]["checksum"]
    assert ranks[0]["checksum"] == pytest.approx(one["checksum"], rel=1e-5)


def test_the_subsets_of_two_processes_are_those_of_one(one, two):
    together = sorted(two[1][0]["subsets"] + two[1][1]["subsets"])
    assert together == one["subsets"]
    assert any(0.0 in kept[len(kept) // 2 :] and 1.0 in kept for _, _, kept in together)


def test_theta_is_one_number_on_all_processes_and_that_of_one_process(one, two):
    thetas = [rank["theta"] for rank in two[1]]
    assert thetas[0] == thetas[1] != 0
    assert thetas[0] == pytest.approx(one["theta"], abs=1e-6)


def test_metrics_of_length_do_not_depend_on_the_number_of_processes_and_the_uneven_last_batch(one, two):
    names = [name for name in one["eval"] if "length" in name or "accuracies/chosen" in name]
    assert len(names) >= 9
    for rank in two[1]:
        for name in names:
            # margins in fp32, after six steps whose rounding differs
            bound = {"slope": 1e-5, "correlation": 2e-3}.get(name.rsplit("/", 1)[-1], 1e-9)
            assert rank["eval"][name] == pytest.approx(one["eval"][name], rel=0, abs=bound), name
        assert rank["eval"]["eval_length/chosen"] == one["eval"]["eval_length/chosen"]
    assert [e["length/chosen"] for e in one["log"][:6]] == [e["length/chosen"] for e in two[1][0]["log"][:6]]


def test_two_processes_resume_to_the_same_losses_theta_and_subsets(model_folder, two, tmp_path):
    folder, ranks = two
    checkpoint = folder / "run" / "checkpoint-3"
    resumed = launch(model_folder, tmp_path, processes=2, batch=2, resume=checkpoint, **OURS)
    assert resumed[0]["losses"] == ranks[0]["losses"]
    assert resumed[0]["theta"] == ranks[0]["theta"]
    assert resumed[0]["checksum"] == ranks[0]["checksum"]
    assert resumed[1]["subsets"] == [s for s in ranks[1]["subsets"] if s[0] >= 3]


def test_two_processes_with_the_pair_stream_train_as_one_without(model_folder, one, tmp_path):
    ranks = launch(model_folder, tmp_path, processes=2, batch=2, pair_stream="true", **OURS)
    assert ranks[0]["losses"] == pytest.approx(one["losses"], abs=2e-5)  # rounding of the other layout
    assert sorted(ranks[0]["subsets"] + ranks[1]["subsets"]) == one["subsets"]
    assert ranks[0]["theta"] == ranks[1]["theta"] == pytest.approx(one["theta"], abs=1e-5)


def test_two_processes_in_pieces_train_as_one_without(model_folder, one, tmp_path):
    ranks = launch(model_folder, tmp_path, processes=2, batch=2, pair_stream="true", max_tokens_per_forward=20, **OURS)
    assert ranks[0]["losses"] == pytest.approx(one["losses"], abs=2e-5)  # rounding of the other layout
    assert ranks[0]["checksum"] == ranks[1]["checksum"]
    assert ranks[0]["theta"] == ranks[1]["theta"] == pytest.approx(one["theta"], abs=1e-5)
    assert [e["length/chosen"] for e in one["log"][:6]] == [e["length/chosen"] for e in ranks[0]["log"][:6]]


def test_under_fsdp2_in_bf16_the_log_probs_are_summed_in_float32(model_folder, tmp_path):
    shipped = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text())
    shipped["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] = False  # needs a device
    shipped["mixed_precision"] = "no"  # `bf16: true` of the trainer says it
    config = tmp_path / "fsdp2.yaml"
    config.write_text(yaml.safe_dump(shipped))
    one = launch(model_folder, tmp_path / "one", processes=1, batch=4, bf16=True)[0]
    ranks = launch(model_folder, tmp_path / "two", processes=2, batch=2, config=config, bf16=True)
    assert ranks[0]["kind"].startswith("FSDP")
    assert ranks[0]["dtypes"] == ["torch.float32"]
    # the parameters themselves are in bf16 here, and in float32 under autocast there
    assert ranks[0]["losses"] == pytest.approx(one["losses"], abs=4e-3)
    assert ranks[0]["losses"][0] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_two_processes_fill_a_reference_cache_together_and_train_as_with_a_live_one(
    model_folder, one, two, tmp_path, place
):
    disk = tmp_path / "data" if place == "disk" else None
    if disk:
        make_pairs(24).save_to_disk(disk)
    cached = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache"), **OURS}
    runs = [(launch(model_folder, tmp_path / "two", processes=2, batch=2, disk=disk, **cached), two[1][0])]
    assert [rank["computed"] for rank in runs[0][0]] == [[24, 11]] * 2
    assert len(list((tmp_path / "cache").glob("*/shard-*.arrow"))) == 4  # one a rank of each data set
    if not disk:
        runs.append((launch(model_folder, tmp_path / "again", processes=1, batch=4, **cached), one))
        assert runs[1][0][0]["computed"] == [0, 0]
    for ranks, live in runs:
        assert ranks[0]["losses"] == pytest.approx(live["losses"], abs=5e-6)  # fp32 sums in another order
        assert ranks[0]["eval"]["eval_loss"] == pytest.approx(live["eval"]["eval_loss"], abs=5e-6)


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

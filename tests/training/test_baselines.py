"""`trainer: simpo`, `cpo`, `orpo` and `kto` through `sampo train`, against TRL's own trainers used directly."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from tiny import make_pairs, save_model, training_options
from transformers import AutoModelForCausalLM, AutoTokenizer

from sampo.commands import train
from sampo.commands.option_checks import WITHOUT_REFERENCE
from sampo.commands.options import TRAINERS, make_parser
from sampo.data.load import load_preference_splits
from sampo.lab.methods import STUDY_METHODS
from sampo.methods import find_method
from sampo.training import baselines
from sampo.training.baselines import BASELINES

every_trainer = pytest.mark.parametrize("name", list(BASELINES))
TIMES = ("runtime", "per_second")
OPTIONS = {"simpo_gamma": 0.7, "cpo_alpha": 0.3}  # of CPO and SimPO


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    save_model(folder / "model")
    make_pairs(22, conversational=True).to_json(folder / "pairs.jsonl")
    return folder


def words(place, name, folder, **options):
    shared = training_options(folder, max_steps=7, logging_steps=3, gradient_accumulation_steps=2)
    shared |= {"model_name_or_path": place / "model", "dataset_name": place / "pairs.jsonl", "dtype": "float32"}
    shared |= {"trainer": name, **(OPTIONS if name in ("cpo", "simpo") else {}), **options}
    return [word for key, value in shared.items() for word in (f"--{key}", str(value))]


def run(place, name, folder, **options):
    """Train; the status, the weights and the log without times."""
    assert train.start(words(place, name, folder, **options)) == 0
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return weights, [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in log[:-1]]


def differences(one, other):
    return [name for name in one if not torch.equal(one[name], other[name])]


def trl_trainer(name, place, folder, pairs):
    """TRL's trainer as its own script would make it."""
    options = training_options(folder, max_steps=7, logging_steps=3, gradient_accumulation_steps=2)
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    more = {"processing_class": AutoTokenizer.from_pretrained(place / "model")}
    if name == "kto":  # each pair as two responses, in one order; the batch has as many pairs
        rows = [{"prompt": p["prompt"], "completion": p["chosen"], "label": True} for p in pairs]
        rows += [{"prompt": p["prompt"], "completion": p["rejected"], "label": False} for p in pairs]
        args = baselines.KTOConfig(**options | {"per_device_train_batch_size": 8})
        return baselines.KTOTrainer(
            model, args=args, train_dataset=Dataset.from_list(rows).shuffle(seed=options["seed"]), **more
        )
    kind, config, method = {
        "cpo": (baselines.CPOTrainer, baselines.CPOConfig, OPTIONS),
        "simpo": (baselines.CPOTrainer, baselines.CPOConfig, {**OPTIONS, "loss_type": "simpo", "beta": 2.0}),
        "orpo": (baselines.ORPOTrainer, baselines.ORPOConfig, {}),
    }[name]
    return kind(model, args=config(**options, **method), train_dataset=pairs, **more)


@every_trainer
def test_the_command_trains_what_trls_trainer_trains_to_the_bit(place, tmp_path, name):
    weights, log = run(place, name, tmp_path / "ours")
    theirs = trl_trainer(name, place, tmp_path / "theirs", load_preference_splits(place / "pairs.jsonl")["train"])
    theirs.train()
    assert differences(theirs.model.state_dict(), weights) == []
    shared = [{key: line[key] for key in line if not key.endswith(TIMES)} for line in theirs.state.log_history[:-1]]
    assert [{key: line[key] for key in their_line} for line, their_line in zip(log, shared, strict=True)] == shared
    assert differences(AutoModelForCausalLM.from_pretrained(place / "model").state_dict(), weights) != []


@every_trainer
def test_a_run_continues_from_a_checkpoint_to_the_same_bits(place, tmp_path, name):
    saves = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 7,
        "eval_fraction": 0.3,
    }
    weights, log = run(place, name, tmp_path / "whole", **saves)
    (tmp_path / "killed").mkdir()  # between two lines of the log, in the second epoch
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "killed" / "checkpoint-4")
    again, its_log = run(place, name, tmp_path / "killed", **saves, resume="auto")
    assert differences(weights, again) == []
    assert its_log == log
    other = "cpo" if name == "simpo" else "simpo"
    assert train.start(words(place, other, tmp_path / "killed", **saves, resume="auto")) == 2


def test_the_metrics_of_length_are_those_of_a_slow_loop(place, tmp_path):
    _, log = run(
        place, "simpo", tmp_path, eval_strategy="steps", eval_steps=7, eval_fraction=0.4, gradient_accumulation_steps=1
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    pairs = load_preference_splits(place / "pairs.jsonl", eval_fraction=0.4, seed=7)["test"]
    lengths, margins = [], []
    for pair in pairs:
        means = []
        start = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=False)
            ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            n = len(ids) - len(tokenizer(start)["input_ids"])
            logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            means.append((sum(logps[t - 1, ids[t]].item() for t in range(len(ids) - n, len(ids))) / n, n))
        margins.append(2.0 * (means[0][0] - means[1][0]))
        lengths.append((means[0][1], means[1][1]))
    found = next(line for line in log if "eval_loss" in line)
    assert found["eval_length/chosen"] == pytest.approx(sum(chosen for chosen, _ in lengths) / len(pairs))
    assert found["eval_length/rejected"] == pytest.approx(sum(rejected for _, rejected in lengths) / len(pairs))
    for name, sign in (("longer", 1), ("shorter", -1)):
        right = [m > 0 for m, (a, b) in zip(margins, lengths, strict=True) if sign * (a - b) > 0]
        assert found[f"eval_accuracies/chosen_{name}"] == pytest.approx(sum(right) / len(right))
    d, m = torch.tensor(lengths, dtype=torch.float64).diff(dim=1)[:, 0] * -1, torch.tensor(margins)
    slope = ((d - d.mean()) * (m - m.mean())).sum() / ((d - d.mean()) ** 2).sum()
    assert found["eval_length_gap/slope"] == pytest.approx(slope.item(), rel=1e-4)


@every_trainer
def test_a_prompt_that_fills_max_length_is_dropped_and_counted(place, tmp_path, name, caplog):
    rows = make_pairs(12, seed=2, conversational=True, max_len=5).to_list()
    rows[3]["prompt"][0]["content"] = " ".join(["w1"] * 40)
    Dataset.from_list(rows).to_json(tmp_path / "pairs.jsonl")
    with caplog.at_level("INFO", logger="sampo"):
        _, log = run(place, name, tmp_path / "run", dataset_name=tmp_path / "pairs.jsonl", max_length=20)
    assert "11 pairs" in caplog.text
    assert "at max_length 20: 1 dropped" in caplog.text
    assert all(line["loss"] == line["loss"] for line in log)  # NaN is not itself


def test_a_loss_that_is_not_finite_stops_the_run(place, tmp_path, capsys):
    assert train.start(words(place, "cpo", tmp_path, beta=1e39)) == 1
    assert "The loss must be finite" in capsys.readouterr().err


def test_the_card_names_the_method_and_its_options(place, tmp_path):
    run(place, "simpo", tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "trained with SimPO" in card
    assert "Method: SimPO (`trainer: simpo`, arXiv 2405.14734), by TRL's trainer.\nReference: none. Beta 2.0" in card
    assert "| `simpo_gamma` | 0.7 |" in card
    run(place, "kto", tmp_path / "kto")
    assert "| pairs per step | 8 |" in (tmp_path / "kto" / "README.md").read_text()


@pytest.mark.parametrize("name", ["orpo", "kto"])
def test_a_dry_run_measures_steps_of_as_many_pairs_as_were_asked_for(place, tmp_path, name, capsys):
    assert train.start([*words(place, name, tmp_path / "none", max_steps=9), "--dry_run"]) == 0
    assert "9 of 8 pairs each" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


# --- refusals


@pytest.mark.parametrize(
    ("name", "more", "part"),
    [
        (
            "simpo",
            {"token_weighting": "all", "length_penalty": 0.1, "pair_stream": "false", "ref_cache_dir": "x"},
            "`trainer: simpo` must go without options of `trainer: dpo`, got `token_weighting`, `length_penalty`, "
            "`pair_stream`, `ref_cache_dir`. Remove them.",
        ),
        ("orpo", {"loss_type": "sigmoid"}, "options of `trainer: dpo`, got `loss_type`"),
        ("orpo", {"bata": 1}, "`--bata` is no option. Did you mean `--beta`?"),
        ("orpo", {"simpo_gamma": 1}, "`--simpo_gamma` is no option. It is of `trainer: cpo | simpo`."),
        ("dpo", {"desirable_weight": 1}, "`--desirable_weight` is no option. It is of `trainer: kto`."),
        ("simp", {}, "Did you mean `simpo`?"),
        ("simpo", {"loss_type": "hinge"}, "`--loss_type` must be one of ['simpo']"),
        ("cpo", {"ref_model_name_or_path": "m"}, "`trainer: cpo` has no reference, got `ref_model_name_or_path`"),
        ("kto", {"dataset_streaming": "true"}, "`trainer: kto` needs all rows, got a stream"),
    ],
)
def test_options_of_another_trainer_are_one_error(place, tmp_path, name, more, part, capsys):
    with pytest.raises(SystemExit) as stop:
        train.start(words(place, name, tmp_path / "none", **more))
    assert stop.value.code == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_recipe_file_names_the_trainer_as_the_command_line_does(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("trainer: cpo\nmodel_name_or_path: m\ndataset_name: d\noutput_dir: o\ncpo_alpha: 0.5\n")
    _, options = make_parser().read(["--config", str(path), "--use_cpu"])
    assert (options.trainer, options.cpo_alpha, options.beta) == ("cpo", 0.5, 0.1)
    path.write_text(f"{path.read_text()}token_weighting: all\nkeep_end_token: true\n")
    with pytest.raises(SystemExit):
        make_parser().read(["--config", str(path)])
    assert "got `token_weighting`, `keep_end_token`. Remove them." in capsys.readouterr().err


def test_a_command_that_cannot_train_them_says_so(capsys):
    with pytest.raises(SystemExit):
        make_parser(prog="sampo cache").read(["--trainer", "kto", "--model_name_or_path", "m", "--dataset_name", "d"])
    assert "`trainer: kto` is for `sampo train` and `sampo sweep`, got it in `sampo cache`." in capsys.readouterr().err


# --- names


def test_each_trainer_is_a_method_with_its_default_beta_and_none_is_in_the_lab():
    assert ("dpo", *BASELINES) == TRAINERS
    for name, (config, _) in BASELINES.items():
        method = find_method(name)
        assert method.options == {"trainer": name}
        assert method.beta == config.__dataclass_fields__["beta"].default
        assert name not in STUDY_METHODS
        assert (name in WITHOUT_REFERENCE) == ("precompute_ref_log_probs" not in config.__dataclass_fields__)
    assert find_method("simpo=2.5").beta == 2.5
    assert find_method("simpo=2.5").options == find_method("simpo").options
    with pytest.raises(ValueError, match="may be followed by its beta"):
        find_method("orpo=x")

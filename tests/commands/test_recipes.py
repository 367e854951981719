"""Every recipe is a case here: it goes through the real parser, and its remarks and its counterpart are looked at."""

import re
from pathlib import Path

import pytest
import yaml
from tiny import make_tokenizer

from sampo.commands.iterate import make_plan
from sampo.commands.option_checks import HELD_OUT
from sampo.commands.options import ITERATE_OPTIONS, make_parser
from sampo.commands.recipes import find_recipe, recipes
from sampo.methods import METHOD_OPTIONS, find_method

ROOT = Path(__file__).resolve().parents[2]
RECIPES = recipes()
PARSER = make_parser()  # for its defaults; a parser that reads a file changes them


def kind_of(name):
    """`full` of `model/sampo_full`."""
    return name.split("/")[1].split("_")[1]


def method_of(name):
    """`sampo` of `model/sampo_full`."""
    return name.split("/")[1].split("_")[0]


MODELS = {
    "llama-3-8b-instruct",
    "pythia-2.8b-hh",
    "pythia-2.8b-tldr",
    "qwen2.5-0.5b-instruct",
    "qwen2.5-7b-instruct",
    "smollm2-135m-instruct",
    "tulu-2-13b",
}
# One order of keys for all recipes: model, data, method, optimisation, evaluation and output.
ORDER = [
    *("model_name_or_path", "dtype", "chat_template", "use_peft", "load_in_4bit", "lora_r", "lora_alpha"),
    *("use_dora", "use_rslora", "lora_dropout", "lora_target_modules"),
    *("dataset_name", "dataset_train_split", "dataset_test_split", "on_bad_rows"),
    *("trainer", "token_weighting", "sampled_sides", "token_budget", "balance_end_token", "length_penalty"),
    *("dpop_lambda", "tdpo", "tdpo_alpha", "precompute_ref_log_probs", "beta", "simpo_gamma", "cpo_alpha"),
    *("rounds", "data", "reference"),
    *("pair_stream", "max_length", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "eval_strategy", "eval_steps"),
    *("per_device_eval_batch_size", "save_steps", "save_total_limit", "output_dir"),
]
# Baselines that differ from DPO in a term of the loss: method -> keys that differ from `dpo_full` beside `output_dir`.
BASELINES = {"dpop": {"dpop_lambda"}, "tdpo2": {"tdpo", "tdpo_alpha", "precompute_ref_log_probs"}}
# Variants are compared with another recipe of the method: kind -> (that one, keys that differ beside `output_dir`).
VARIANTS = {
    "dora": ("lora", {"use_dora"}),
    "rslora": ("lora", {"use_rslora"}),
    "qlora": ("lora", {"load_in_4bit"}),
    "iterative": ("full", {"rounds", "data", "reference"}),
    "recommended": ("full", {"sampled_sides", "token_budget", "balance_end_token", "length_penalty"}),
}
ITERATIVE = [name for name in RECIPES if name.endswith("iterative")]
TRAINERS = ("cpo", "kto", "orpo", "simpo")  # of TRL
OTHER_TRAINERS = [name for name in RECIPES if method_of(name) in TRAINERS]
SINGLE = [name for name in RECIPES if kind_of(name) not in VARIANTS and method_of(name) not in (*BASELINES, *TRAINERS)]
NEEDS_NO_REMARK = {"model_name_or_path", "dataset_train_split", "dataset_test_split", "output_dir"}

every_recipe = pytest.mark.parametrize("name", RECIPES)


def read(name):
    return yaml.safe_load(RECIPES[name].read_text())


def parse(name, *more):
    """Script, training, model and mixture arguments; on the CPU, where bf16 and quantised weights would be refused."""
    parser = make_parser()
    parser.not_ours = set(ITERATE_OPTIONS) if name in ITERATIVE else set()
    words = ["--config", str(RECIPES[name]), "--use_cpu", "true", "--load_in_4bit", "false", *more]
    return parser.parse_args_and_config(words)


@every_recipe
def test_the_method_of_a_recipe_is_a_named_method(name):
    """The file's name is the method's, and for the other variants it ends in one of their kinds."""
    prefix, kind = name.split("/")[1].split("_")
    method = find_method("recommended" if kind == "recommended" else prefix)
    assert {key: value for key, value in read(name).items() if key in METHOD_OPTIONS} == method.options


def header(name):
    lines = RECIPES[name].read_text().splitlines()
    return lines[: lines.index("")]


def test_each_model_has_full_and_lora_for_sampo_and_dpo():
    kinds = ("dpo_full", "dpo_lora", "sampo_full", "sampo_lora")
    assert sorted(f"{model}/{kind}" for model in MODELS for kind in kinds) == SINGLE
    assert len(SINGLE) == 28
    assert len(ITERATIVE) == 4
    assert [f"smollm2-135m-instruct/{name}_full" for name in TRAINERS] == OTHER_TRAINERS
    assert len(RECIPES) == 28 + 4 + 3 + 3 + len(BASELINES) + len(TRAINERS)
    assert len(list((ROOT / "recipes").rglob("*.y*ml"))) == len(RECIPES)


@every_recipe
def test_a_recipe_parses_and_means_what_its_name_says(name):
    script, training, model, mixture = parse(name)
    method, kind = name.split("/")[1].split("_")
    if name in OTHER_TRAINERS:
        assert (script.trainer, hasattr(training, "token_weighting")) == (method, False)
    else:
        assert training.token_weighting == {"sampo": "sampo"}.get(method, "all")
    assert model.use_peft == kind.endswith(("lora", "dora"))
    assert not mixture.datasets
    written = {key: value for key, value in read(name).items() if key not in ITERATE_OPTIONS}
    assert written.pop("load_in_4bit", False) == (kind == "qlora")
    if method == "kto":  # whose batches are of responses
        written |= {key: 2 * written[key] for key in written if key.endswith("batch_size")}
    together = {**vars(script), **vars(model), **vars(training)}
    for key in ("learning_rate", "warmup_steps", "eval_steps", "save_steps"):
        assert together[key] == float(written.pop(key)), key
    for key in ("eval_strategy", "lr_scheduler_type"):
        assert together[key].value == written.pop(key), key
    assert {key: together[key] for key in written} == written


@every_recipe
def test_no_recipe_trains_on_held_out_data(name):
    recipe = read(name)
    assert not HELD_OUT & set(re.split(r"[^a-z]+", recipe["dataset_train_split"]))
    assert recipe["dataset_test_split"].split("[")[0] != recipe["dataset_train_split"].split("[")[0]


@pytest.mark.parametrize("name", [name for name in SINGLE if "/sampo" in name])
def test_the_dpo_counterpart_differs_in_method_and_place_alone(name):
    ours, counterpart = read(name), read(name.replace("/sampo", "/dpo"))
    assert list(ours) == list(counterpart)
    assert {key for key in ours if ours[key] != counterpart[key]} == {"token_weighting", "output_dir"}


@pytest.mark.parametrize("name", OTHER_TRAINERS)
def test_a_recipe_of_another_trainer_has_the_budget_of_dpo(name):
    ours, counterpart = read(name), read(f"{name.split('/')[0]}/dpo_full")
    differ = {key for key in ours.keys() | counterpart.keys() if ours.get(key) != counterpart.get(key)}
    assert differ <= {"trainer", "token_weighting", "beta", "simpo_gamma", "cpo_alpha", "output_dir"}
    (line,) = [line for line in header(name) if line.startswith("# Compare:    dpo_full.yaml ")]
    assert set(re.findall(r"`(\w+)`", line)) == differ


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in (*SINGLE, *OTHER_TRAINERS)])
def test_a_variant_differs_from_its_counterpart_in_what_its_name_says(name):
    kind, method = kind_of(name), method_of(name)
    kind, (counterpart, keys) = (method, ("dpo", BASELINES[method])) if method in BASELINES else (kind, VARIANTS[kind])
    ours, theirs = read(name), read(name.replace(kind, counterpart))
    differ = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert differ - {"num_train_epochs"} == keys | {"output_dir"}
    stated = " ".join(
        "\n".join(header(name)).split("# Deviations")[0].split("# Compare:")[1].replace("#", " ").split()
    )
    assert stated.startswith(f"{RECIPES[name].name.replace(kind, counterpart)} ")
    assert set(re.findall(r"`(\w+)`", stated)) == differ


@pytest.mark.parametrize("name", ITERATIVE)
def test_the_papers_rounds_are_three_epochs_or_the_thirds_of_one(name):
    recipe, single = read(name), read(name.replace("iterative", "full"))
    plan, _ = make_plan({}, ["--config", str(RECIPES[name])])
    assert (plan.rounds, plan.reference) == (3, "previous")
    epochs = single["num_train_epochs"]
    if name.startswith("pythia"):
        assert (plan.data, epochs, recipe["num_train_epochs"]) == ("shards", 1, 1)
    else:
        assert (plan.data, epochs, recipe["num_train_epochs"] * plan.rounds) == ("full", 3, 3)


@every_recipe
def test_the_keys_stand_in_the_one_order(name):
    assert list(read(name)) == [key for key in ORDER if key in read(name)]


def is_default(key, value):
    if key in ITERATE_OPTIONS:
        return False
    default = PARSER.get_default(key)
    default = getattr(default, "value", default)
    numbers = isinstance(default, int | float) and not isinstance(default, bool)
    return (float(value) == default) if numbers else value == default


@every_recipe
def test_a_value_that_is_not_the_default_has_a_remark(name):
    lines = RECIPES[name].read_text().splitlines()
    for key, value in read(name).items():
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
        remark = "  # " in lines[at] or lines[at - 1].startswith("# ")
        assert remark or key in NEEDS_NO_REMARK or is_default(key, value), f"{key}: {value} says nothing of why"


@every_recipe
def test_the_header_gives_command_cost_and_counterpart(name):
    text = "\n".join(header(name))
    file, command = f"recipes/{name}.yaml", "iterate" if name in ITERATIVE else "train"
    assert f"# Command:    sampo {command} --config {file}" in text
    assert "not measured" in text
    if name not in ITERATIVE:
        assert f"scripts/train_sampo.py --config {file}" in text
        assert (ROOT / re.search(r"--config_file (\S+)", text)[1]).is_file()
    if name in SINGLE:
        here, there = ("sampo", "dpo") if "/sampo" in name else ("dpo", "sampo")
        assert f"# Compare:    {RECIPES[name].name.replace(here, there)}" in text
    assert len(max(RECIPES[name].read_text().splitlines(), key=len)) <= 119


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("full")])
def test_full_fine_tuning_in_bfloat16_is_left_to_engines_that_keep_a_float32_copy(name):
    sharded = "accelerate/zero" in "\n".join(header(name))
    assert read(name)["dtype"] == ("bfloat16" if sharded else "float32")


@pytest.mark.parametrize(
    ("model", "gpus", "expected"),
    [
        ("pythia-2.8b-hh", 1, {"beta": 0.05, "learning_rate": 1e-6, "num_train_epochs": 1, "max_length": 1024}),
        ("pythia-2.8b-tldr", 1, {"beta": 0.5, "learning_rate": 1e-6, "num_train_epochs": 1, "max_length": 1024}),
        ("llama-3-8b-instruct", 8, {"beta": 0.1, "learning_rate": 4e-7, "num_train_epochs": 3, "max_length": 8192}),
        ("tulu-2-13b", 8, {"beta": 0.1, "learning_rate": 1e-6, "num_train_epochs": 3, "max_length": 8192}),
    ],
)
def test_the_papers_models_have_the_papers_hyper_parameters(model, gpus, expected):
    """Table 5 of arXiv 2406.10957: 128 pairs a step, warm-up of a tenth, linear decay, AdamW without weight decay."""
    _, training, _, _ = parse(f"{model}/sampo_full")
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * gpus == 128
    common = {"warmup_steps": 0.1, "lr_scheduler_type": "linear", "weight_decay": 0.0, "seed": 42}
    for key, value in {**expected, **common}.items():
        assert getattr(training, key) == value, key


def test_the_template_of_the_hh_recipe_gives_the_transcript_back():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = read("pythia-2.8b-hh/sampo_full")["chat_template"]
    messages = [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "Well."},
    ]
    prompt = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert prompt == "\n\nHuman: Hello?\n\nAssistant: Yes.\n\nHuman: Well?\n\nAssistant:"
    assert whole == prompt + " Well.<eos>"


def test_a_recipe_is_found_by_the_names_that_people_type():
    path = RECIPES["tulu-2-13b/dpo_lora"]
    assert find_recipe("tulu-2-13b/dpo_lora") == find_recipe("recipes/tulu-2-13b/dpo_lora.yaml") == path
    with pytest.raises(ValueError, match="Did you mean `tulu-2-13b/dpo_lora`"):
        find_recipe("tulu2-13b/dpo_lora")
    with pytest.raises(ValueError, match="`llama-3-8b-instruct/sampo_qlora`"):  # half of a name
        find_recipe("sampo_qlora")


@pytest.mark.parametrize("words", [["--config", "NAME"], ["--config=NAME"]])
def test_config_takes_the_name_of_a_recipe_where_there_is_no_such_file(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "smollm2-135m-instruct/dpo_lora"
    words = [word.replace("NAME", name) for word in words]
    expected = read(name)
    recipe, options = make_parser().read(words)
    assert recipe == expected
    assert (options.output_dir, options.max_length) == (expected["output_dir"], expected["max_length"])
    _, training, *_ = make_parser().parse_args_and_config([*words, "--use_cpu", "--bf16", "false"])
    assert (training.output_dir, training.token_weighting) == (expected["output_dir"], "all")
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("output_dir: mine\nmodel_name_or_path: m\ndataset_name: d\n")
    assert make_parser().read(words)[1].output_dir == "mine"


def test_an_unknown_recipe_of_config_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser(prog="sampo cache").read(["--config", "tulu2-13b/dpo_lora"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("sampo cache: error: `--config` must be a YAML file that exists or the name of a recipe, ")
    assert "got 'tulu2-13b/dpo_lora'. Did you mean `tulu-2-13b/dpo_lora`" in said

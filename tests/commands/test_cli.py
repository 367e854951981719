import contextlib
import io
import json
import math
import os
import pty
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from tiny import make_pairs, save_model
from trl import DPOConfig
from trl.scripts.utils import ScriptArguments

from sampo import cli
from sampo.commands import train
from sampo.commands.launch import OPTIONS, accelerate_config, asks_for_cpu, launch_command, split_options
from sampo.commands.options import SamPOScriptArguments, make_parser
from sampo.commands.recipes import recipes
from sampo.config import SamPOConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    make_pairs(24, conversational=True).to_json(path)
    return str(path)


@pytest.fixture
def words(model, pairs, tmp_path):
    """The options of a run of two steps on the CPU."""
    return [
        *("--model_name_or_path", model, "--dataset_name", pairs, "--output_dir", str(tmp_path / "out"), "--use_cpu"),
        *("--bf16", "false", "--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "4"),
        *("--learning_rate", "1e-3", "--save_strategy", "no"),
    ]


def log_of(folder):
    return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


def refusal(capsys, *words):
    """What is said when the options are refused, and that nothing else happens."""
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args_and_config(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err


def yaml_file(tmp_path, **options):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(options))
    return str(path)


# --- sampo


def test_help_takes_well_under_a_second_and_imports_nothing_heavy():
    code = (
        "import sys; from sampo.cli import main; main(['--help']); "
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'numpy', 'yaml'} & set(sys.modules)))"
    )

    def timed():
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return time.perf_counter() - began, done.stdout

    runs = [timed() for _ in range(3)]
    assert all(out.splitlines()[-1] == "[]" for _, out in runs)
    assert all(name in runs[0][1] for name in cli.COMMANDS)
    assert min(seconds for seconds, _ in runs) < 0.5


def test_the_help_of_train_shows_our_options_on_two_screens_without_importing_torch():
    code = (
        "import sys; from sampo.cli import main; main(['train', '--beta', '1', '-h']); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    *said, imported = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert imported == "[]"
    assert len(said) <= 150
    shown = [line.split()[0] for line in said if line.startswith("  --")]
    ours = {f.name for f in fields(SamPOConfig)} - {f.name for f in fields(DPOConfig)}
    ours |= {f.name for f in fields(SamPOScriptArguments)} - {f.name for f in fields(ScriptArguments)}
    assert {f"--{name}" for name in {*ours, *OPTIONS}} <= set(shown)
    assert {"--model_name_or_path", "--dataset_name", "--output_dir", "--learning_rate", "--use_peft"} <= set(shown)
    assert set(shown[: len(ours)]) == {f"--{name}" for name in ours}


@pytest.mark.parametrize("command", ["train", "iterate", "sweep", "cache"])
def test_help_all_prints_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help_all"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: sampo {command} ")
    parser = make_parser(prog=None if command == "train" else f"sampo {command}")
    assert all(action.option_strings[0] in said for action in parser._actions if action.option_strings)
    if command != "train":
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert "`--help_all`" in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_the_nearest_one(capsys):
    assert cli.main(["tain"]) == 2
    assert "Did you mean `train`?" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sampo 0.")


def test_recipes_are_listed_shown_and_copied(capsys, tmp_path):
    assert cli.main(["recipes", "ls"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(recipes())
    name, path = next(iter(recipes().items()))
    assert cli.main(["recipes", "show", name]) == 0
    assert capsys.readouterr().out == path.read_text()
    assert cli.main(["recipes", "cp", name, str(tmp_path)]) == 0
    assert (tmp_path / path.name).read_text() == path.read_text()
    with pytest.raises(SystemExit, match="must not exist yet"):
        cli.main(["recipes", "cp", name, str(tmp_path / path.name)])


# --- options


def test_all_unknown_options_are_named_at_once_with_the_nearest_names(capsys, tmp_path):
    file = yaml_file(tmp_path, bata=0.2, learning_rat=1e-6, num_processes=2, zzzzzz=1)
    said = refusal(capsys, "--config", file, "--max-lenght", "7", "--token_wighting=all")
    for wrong, right in {"bata": "beta", "learning_rat": "learning_rate"}.items():
        assert f"`{wrong}` in {file} is no option. Did you mean `{right}`?" in said
    assert f"`num_processes` in {file} is no option. It is for the launcher: `sampo train --num_processes" in said
    assert f"`zzzzzz` in {file} is no option." in said
    assert "`--max-lenght` is no option. Did you mean `--max_length`?" in said
    assert "`--token_wighting` is no option. Did you mean `--token_weighting`?" in said
    assert "usage" not in said


def test_an_abbreviation_is_no_option(capsys):
    assert "Did you mean `--max_steps`?" in refusal(capsys, "--max_step", "3")


def test_a_stray_word_is_refused(capsys):
    assert "`3e-6` is no option." in refusal(capsys, "--beta", "0.1", "3e-6")


def test_a_choice_is_checked_in_the_file_too(capsys, tmp_path):
    said = refusal(capsys, "--config", yaml_file(tmp_path, dtype="bf16", on_bad_rows="keep"))
    assert "`dtype`" in said
    assert "'bfloat16'" in said
    assert "got 'bf16'" in said
    assert "`on_bad_rows`" in said


@pytest.mark.parametrize("content", ["- a\n- b\n", "beta: [0.1\n", "just a text\n"])
def test_a_file_that_is_no_mapping_is_refused(capsys, tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert str(path) in refusal(capsys, "--config", str(path))
    assert "nowhere.yaml" in refusal(capsys, "--config", "nowhere.yaml")


def test_the_command_line_beats_the_file_and_the_file_beats_the_default(words, tmp_path):
    file = yaml_file(tmp_path, beta=0.3, learning_rate="2e-5", max_length=128, use_peft=True, length_penalty="learned")
    script, training, model_args, _ = make_parser().parse_args_and_config(
        [f"--config={file}", *words, "--beta", "0.4", "--learning-rate", "3e-5"]
    )
    assert (training.beta, training.learning_rate) == (0.4, 3e-5)
    assert (training.max_length, training.length_penalty, model_args.use_peft) == (128, "learned", True)
    assert (training.label_smoothing, script.on_bad_rows) == (0.0, "error")


def test_numbers_in_the_file_are_converted_as_on_the_command_line(capsys, words, tmp_path):
    assert "--max_steps" in refusal(capsys, *words[:6], "--config", yaml_file(tmp_path, max_steps=2.5))
    file = yaml_file(tmp_path, run_name=7, length_penalty=0.01)
    _, training, _, _ = make_parser().parse_args_and_config(["--config", file, *words])
    assert (training.run_name, training.length_penalty) == ("7", 0.01)


def test_all_that_is_wrong_with_the_values_is_said_at_once(capsys):
    said = refusal(
        capsys,
        *("--use_cpu", "--token_weighting", "mean", "--mask_samples", "3", "--eval_fraction", "0.1"),
        *("--dataset_train_split", "test_prefs", "--load_in_4bit"),
    )
    for part in (
        "`model_name_or_path` must be given",
        "`dataset_name` or `datasets` must be given",
        "got the split ['test_prefs'] to train on",
        "with `eval_strategy: no`",
        "`load_in_4bit` needs `use_peft`",
        "`mask_samples: 3`",
    ):
        assert part in said


@pytest.mark.parametrize("split", ["test", "test_prefs", "train+validation[:10]", "eval", "dev-clean"])
def test_training_on_a_held_out_split_is_refused(capsys, words, split):
    assert "must not see held-out data" in refusal(capsys, *words, "--dataset_train_split", split)


def test_a_mixture_with_a_held_out_split_is_refused(capsys, words, tmp_path):
    file = yaml_file(tmp_path, datasets=[{"path": "a/b"}, {"path": "c/d", "split": "test"}])
    without_name = [*words[:2], *words[4:]]
    said = refusal(capsys, *without_name, "--config", file)
    assert "['test']" in said
    assert "exclude each other" in refusal(capsys, *words, "--config", file)


@pytest.mark.parametrize("split", ["train", "contest", "train_prefs", "latest", "train[:5%]"])
def test_a_split_that_only_sounds_like_one_is_not_refused(words, split):
    assert make_parser().parse_args_and_config([*words, "--dataset_train_split", split])


def test_quantisation_without_a_cuda_device_is_refused_before_anything_is_loaded(capsys):
    begin = ["--model_name_or_path", "no/such-model", "--dataset_name", "no/such-data", "--use_cpu", "--use_peft"]
    for option in ("load_in_4bit", "load_in_8bit"):
        said = refusal(capsys, *begin, f"--{option}")
        assert f"`{option}` needs" in said
        assert "a CUDA device, and the run has none" in said
        assert "such-model" not in said


def test_bars_are_for_people_and_not_for_logs():
    ours, theirs = pty.openpty()
    with os.fdopen(ours), os.fdopen(theirs, "w") as terminal, contextlib.redirect_stderr(terminal):
        assert make_parser().get_default("disable_tqdm") is False
    with contextlib.redirect_stderr(io.StringIO()):
        assert make_parser().get_default("disable_tqdm") is True


def test_bars_are_on_when_asked_for(words):
    assert not make_parser().parse_args_and_config([*words, "--disable_tqdm", "false"])[1].disable_tqdm


# --- a run


def test_a_run_trains_and_saves_a_model_that_loads(words, tmp_path, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert train.start(words) == 0
    log = log_of(tmp_path / "out")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[0]["length/chosen"] > 0
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    printed = capfd.readouterr()
    assert "deprecated" not in printed.err
    assert "%|" not in printed.err


def test_pairs_are_held_out_by_prompt_when_asked_for(words, tmp_path):
    assert train.start([*words, "--eval_fraction", "0.4", "--eval_strategy", "steps", "--eval_steps", "2"]) == 0
    evaluated = [entry for entry in log_of(tmp_path / "out") if "eval_loss" in entry]
    assert len(evaluated) == 1
    assert "eval_dpo/accuracies/chosen_shorter" in evaluated[0]


def test_held_out_pairs_come_from_the_training_split_even_where_there_is_another(words, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for seed, split in enumerate(["train", "test"]):
        make_pairs(40, seed=seed).to_json(folder / f"{split}.jsonl")
    words = [*words, "--dataset_name", str(folder), "--eval_strategy", "steps"]

    def prompts(*more):
        script, training, _, mixture = make_parser().parse_args_and_config([*words, *more])
        return {side: set(rows["prompt"]) for side, rows in train.load_data(script, training, mixture, None).items()}

    whole, held_out = prompts(), prompts("--eval_fraction", "0.3")
    assert held_out["train"] | held_out["test"] == whole["train"]
    assert not held_out["train"] & held_out["test"]
    assert not whole["train"] & whole["test"]


def test_an_evaluation_without_pairs_is_refused(words, capsys):
    assert train.start([*words, "--eval_strategy", "steps"]) == 2
    assert "Set `eval_fraction`" in capsys.readouterr().err


def test_bad_rows_stop_the_run_before_the_model_is_loaded_or_are_dropped(words, pairs, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    rows[3]["chosen"][0]["content"] = " "
    Path(pairs).write_text("\n".join(map(json.dumps, rows)))
    assert train.start(words) == 2
    assert "1 of 24 pairs" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert train.start([*words, "--on_bad_rows", "drop"]) == 0


def test_messages_need_a_chat_template_and_one_can_be_given(words, tmp_path, capsys):
    plain = save_model(tmp_path / "plain", chat=False)
    words = ["--model_name_or_path", plain, *words[2:]]
    assert train.start(words) == 2
    assert "Set `chat_template`" in capsys.readouterr().err
    template = "{% for m in messages %} {{ m['content'] }} <eos>{% endfor %}"
    assert train.start([*words, "--chat_template", template]) == 0
    file = tmp_path / "template.jinja"
    file.write_text(template)
    assert train.start([*words, "--chat_template", str(file)]) == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template


def test_a_mixture_of_data_sets_is_trained_on_as_in_trl(words, pairs, tmp_path):
    mixture = [{"path": "json", "data_files": pairs}, {"path": "json", "data_files": pairs, "split": "train[:8]"}]
    file = yaml_file(tmp_path, datasets=mixture, num_train_epochs=1, max_steps=-1)
    words = [word for word in words if word not in ("--dataset_name", pairs, "--max_steps", "2")]
    assert train.start([*words, "--config", file]) == 0
    assert log_of(tmp_path / "out")[-1]["step"] == (24 + 8) // 4


def test_a_stream_is_trained_on_and_what_needs_all_rows_is_refused_with_it(words, pairs, tmp_path, capsys):
    words = ["--dataset_streaming", *(str(Path(pairs).parent) if word == pairs else word for word in words)]
    said = refusal(capsys, *words, "--length_split", "long", "--on_bad_rows", "drop")
    assert "`length_split` needs all rows" in said
    assert "`on_bad_rows: drop` needs all rows" in said
    assert train.start(words) == 0
    assert log_of(tmp_path / "out")[-1]["step"] == 2


def test_resume_true_goes_on_from_the_last_checkpoint(words, tmp_path):
    words = [*words, "--save_strategy", "steps", "--save_steps", "2", "--lr_scheduler_type", "constant"]
    words += ["--pair_stream", "false"]  # two runs of `auto` can find other forwards faster
    assert train.start(words) == 0
    assert train.start([*words, "--max_steps", "4", "--resume_from_checkpoint", "true"]) == 0
    resumed = [entry["loss"] for entry in log_of(tmp_path / "out") if "loss" in entry]
    assert train.start([*words, "--max_steps", "4", "--output_dir", str(tmp_path / "whole")]) == 0
    assert resumed == [entry["loss"] for entry in log_of(tmp_path / "whole") if "loss" in entry]
    assert len(resumed) == 4


@pytest.mark.parametrize(("more", "warned"), [([], True), (["--use_peft"], False)])
def test_tiny_steps_on_bfloat16_weights_are_warned_of(words, more, warned, caplog):
    parsed = make_parser().parse_args_and_config([*words, "--dtype", "bfloat16", *more])
    train.warn_of_lost_updates(parsed[1], parsed[2])
    assert ("rounded away" in caplog.text) == warned


def test_what_the_warning_says_of_bfloat16_is_so():
    weight = torch.tensor(1.0, dtype=torch.bfloat16)
    assert weight - 0.001 == weight
    assert weight - 0.004 != weight


def test_main_refuses_what_the_parser_would_have_refused(words):
    parsed = make_parser().parse_args_and_config(words)
    parsed[0].dataset_train_split = "test"
    with pytest.raises(train.RefusedRun, match="held-out"):
        train.main(*parsed)


# --- several processes


def test_options_of_the_launcher_are_taken_out_and_the_rest_keeps_its_order():
    argv = ["--beta", "0.1", "--num_processes=2", "--loss_type", "sigmoid", "sft", "--accelerate-config", "zero3"]
    options, rest = split_options(argv)
    assert options == {"num_processes": "2", "accelerate_config": "zero3"}
    assert rest == ["--beta", "0.1", "--loss_type", "sigmoid", "sft"]


def test_the_launcher_options_are_accelerates_own_and_none_is_an_option_of_the_training():
    accelerates = {action.dest for action in launch_command_parser()._actions}
    assert set(OPTIONS) - {"accelerate_config"} <= accelerates
    assert not set(OPTIONS) & {action.dest for action in make_parser()._actions}


def test_a_configuration_goes_by_name_and_a_free_port_is_found_on_one_machine():
    words = launch_command({"accelerate_config": "zero3", "num_processes": "4"}, [])
    file = str(ROOT / "configs" / "accelerate" / "zero3.yaml")
    assert words[3:] == ["--config_file", file, "--num_processes", "4", "--main_process_port", "0"]
    assert launch_command({"num_processes": "2"}, [])[-1] == "--multi_gpu"
    with pytest.raises(SystemExit, match="Did you mean `zero3`"):
        accelerate_config("zer03")


def test_several_machines_keep_their_port_and_each_needs_address_and_number():
    places = {"main_process_ip": "10.0.0.1", "machine_rank": "1"}
    words = launch_command({"accelerate_config": "zero3_2nodes", **places}, [])
    assert words[-4:] == ["--main_process_ip", "10.0.0.1", "--machine_rank", "1"]
    assert "--main_process_port" not in launch_command({"num_machines": "2", "num_processes": "4", **places}, [])
    for options in ({"num_machines": "2"}, {"accelerate_config": "zero3_2nodes", "main_process_ip": "10.0.0.1"}):
        missing = [f"`--{name}`" for name in places if name not in options]
        with pytest.raises(SystemExit, match=f"2 machines needs {' and '.join(missing)}. Start"):
            launch_command(options, [])


def test_two_machines_are_believed_a_file_of_the_users_own(tmp_path):
    config = yaml.safe_load((ROOT / "configs" / "accelerate" / "multi_gpu_2nodes.yaml").read_text())
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({**config, "main_process_ip": "10.0.0.1", "machine_rank": 1}))
    assert launch_command({"accelerate_config": str(own)}, [])[3:] == ["--config_file", str(own)]


@pytest.mark.parametrize(
    "rest", [["--use_cpu"], ["--use-cpu", "true"], ["--use_cpu=True"], ["--use_cpu", "--beta", "1"]]
)
def test_fsdp_on_the_cpu_is_refused_before_accelerate_makes_ddp_of_it(rest, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # the machine has GPUs; the run does not
    with pytest.raises(SystemExit, match="FSDP must have a GPU for each process, got a run on the CPU"):
        launch_command({"accelerate_config": "fsdp2"}, rest)
    assert launch_command({"accelerate_config": "fsdp2"}, ["--use_cpu", "false"])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="`--accelerate_config cpu_zero3`"):
        launch_command({"accelerate_config": "fsdp2"}, [])


def test_a_deepspeed_configuration_goes_by_name_in_the_file_of_options_too(tmp_path, capsys):
    file = str(ROOT / "configs" / "deepspeed" / "zero2.json")
    assert make_parser().parse_known_args(["--deepspeed", "zero2"])[0].deepspeed == file
    assert make_parser().parse_known_args(["--deepspeed", file])[0].deepspeed == file
    parser = make_parser()
    parser.set_defaults_with_config(deepspeed="zero2")
    assert parser.parse_known_args([])[0].deepspeed == file
    assert make_parser().parse_known_args([])[0].deepspeed is None
    assert "Did you mean `zero2`?" in refusal(capsys, "--deepspeed", "zeor2")


def test_the_cpu_is_asked_for_when_the_configuration_does():
    rest = []
    launch_command({"accelerate_config": "cpu_ddp"}, rest)
    assert rest == ["--use_cpu"]


@pytest.mark.slow
def test_two_processes_on_the_cpu_train_as_one_with_the_double_batch(words, tmp_path):
    """Through `sampo train --accelerate_config`: words, free port, gloo, averaged gradients, one model saved."""
    words = [*words, "--pair_stream", "false"]  # two runs of `auto` can find other forwards faster
    assert train.start(words) == 0
    alone = [entry for entry in log_of(tmp_path / "out") if "loss" in entry]
    place = str(tmp_path / "two")
    halved = ["--accelerate_config", "cpu_ddp", *words, "--per_device_train_batch_size", "2", "--output_dir", place]
    without_cpu = [word for word in halved if word != "--use_cpu"]  # the configuration asks for it
    subprocess.run([sys.executable, "-m", "sampo.cli", "train", *without_cpu], check=True, timeout=300)
    together = [entry for entry in log_of(place) if "loss" in entry]
    for one, two in zip(alone, together, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=5e-6)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert two["num_tokens"] == one["num_tokens"]


def test_a_refused_launch_says_so_once(words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sampo.cli", "train", "--accelerate_config", "cpu_ddp", *words, "--bata", "1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.count("Did you mean `--beta`?") == 1


@pytest.mark.parametrize("words", [["recipes", "ls"], ["recipes", "show", "qwen2.5-0.5b-instruct/sampo_lora"]])
def test_a_reader_that_ends_early_is_no_error(words):
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "sampo.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert said == ""
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("words", "default", "asks"),
    [
        (["--use_cpu"], False, True),
        (["--use_cpu", "--bf16", "false"], False, True),
        (["--use-cpu=false"], True, False),
        (["--use_cpu", "true", "--use_cpu", "false"], False, False),
        ([], True, True),
        ([], False, False),
    ],
)
def test_the_last_use_cpu_takes_effect_and_a_recipe_without_one(words, default, asks):
    assert asks_for_cpu(words, default=default) is asks

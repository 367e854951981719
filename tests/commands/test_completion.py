import re
import shlex
import subprocess

import pytest

from sampo import cli, plugins
from sampo.commands.completion import SCRIPTS, completions
from sampo.commands.options import make_parser
from sampo.commands.recipes import recipes


@pytest.fixture(scope="module")
def found():
    return {name: completions(name) for name in cli.COMMANDS}


@pytest.fixture(scope="module")
def script(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "sampo.bash"
    path.write_text(SCRIPTS["bash"](found))
    return path


@pytest.fixture
def complete(script, tmp_path):
    """What bash offers for the last word of a line, where a folder holds the file `my file.yaml`."""
    (tmp_path / "my file.yaml").touch()

    def ask(*words):
        code = (
            f"source {shlex.quote(str(script))}; complete -p sampo >&2; COMP_WORDS=({shlex.join(words)}); "
            f"COMP_CWORD={len(words) - 1}; _sampo; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        done = subprocess.run(
            ["bash", "--norc", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=20
        )
        assert done.stderr == "complete -o default -F _sampo sampo\n"
        return done.stdout.splitlines() if done.stdout.strip() else []

    return ask


def test_bash_completes_commands(complete):
    assert complete("sampo", "") == list(cli.COMMANDS)
    assert complete("sampo", "co") == ["compare", "completion"]


@pytest.mark.parametrize("command", ["train", "iterate", "sweep", "cache"])
def test_bash_completes_options_of_the_training_and_of_the_launcher(complete, command):
    assert complete("sampo", command, "--token_w") == ["--token_weighting"]
    assert complete("sampo", command, "--beta", "1", "--num_proc") == ["--num_processes"]
    assert complete("sampo", command, "--use_cpu", "--plug") == ["--plugin"]
    assert complete("sampo", command, "--sampled_sides", "") == ["both", "rejected"]
    assert complete("sampo", command, "--sampled_sides", "=", "r") == ["rejected"]
    assert complete("sampo", command, "--sampled_sides", "=") == ["both", "rejected"]
    assert complete("sampo", command, "--accelerate_config", "fsdp") == ["fsdp2", "fsdp2_2nodes"]


def test_bash_completes_recipes_and_files_after_config(complete):
    wanted = [name for name in recipes() if name.startswith("qwen2.5-0.5b-instruct/sampo_")]
    assert complete("sampo", "train", "--config", "qwen2.5-0.5b-instruct/sampo_") == wanted != []
    assert complete("sampo", "train", "--config", "my") == ["my file.yaml"]
    assert complete("sampo", "recipes", "show", "tulu-2-13b/d") == ["tulu-2-13b/dpo_full", "tulu-2-13b/dpo_lora"]


def test_bash_completes_subcommands_and_leaves_the_rest_to_files(complete):
    assert complete("sampo", "recipes", "") == ["ls", "show", "cp"]
    assert complete("sampo", "completion", "z") == ["zsh"]
    assert complete("sampo", "audit", "my") == []  # `-o default`: files
    assert complete("sampo", "rounds", "--da") == []


def test_bash_completes_a_line_that_is_typed(script, tmp_path):
    """In an interactive bash: the command line that TAB leaves is run."""
    lines = f'PS1=; source {script}\nsampo() {{ echo "got $*"; }}\nsampo trai\t--sampled_si\trej\t\nexit\n'
    done = subprocess.run(
        ["bash", "--norc", "-i"], input=lines, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=20
    )
    assert "got train --sampled_sides rejected" in done.stdout


def test_every_option_of_every_parser_is_there(found):
    for name, (module, _) in cli.COMMANDS.items():
        parsers = [make_parser()] if name == "train" else []
        if name != "train":
            parsers.append(__import__(f"sampo.{module}", fromlist=["make_parser"]).make_parser())
        for action in (action for parser in parsers for action in parser._actions):
            names = [option for option in action.option_strings if option.startswith("--")]
            assert not names or set(names) & set(found[name].options), action.option_strings
        assert ("--plugin" in found[name].options) == (name in plugins.COMMANDS_WITH_PLUGINS)
    assert "--max-length" not in found["train"].options


@pytest.mark.parametrize("shell", list(SCRIPTS))
def test_the_script_is_printed_with_all_commands_and_balanced_quotes(shell, found, capsys):
    assert cli.main(["completion", shell]) == 0
    said = capsys.readouterr().out
    assert said == SCRIPTS[shell](found)
    assert all(re.search(rf"\b{name}\b", said) for name in cli.COMMANDS)
    for line in said.splitlines():
        assert shlex.split(line, comments=True) or not line.strip("# ") or line.startswith("#")


def test_fish_has_a_line_per_option_with_its_values(found):
    lines = SCRIPTS["fish"](found).splitlines()
    begin = "complete -c sampo -n '__fish_seen_subcommand_from train' -l"
    assert f"{begin} sampled_sides -x -a 'both rejected'" in lines
    assert f"{begin} no_log_token_statistics" in lines
    assert f"{begin} output_dir -r -F" in lines
    assert f"{begin} config -r -F -a '{' '.join(recipes())}'" in lines

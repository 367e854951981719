"""`sampo completion bash | zsh | fish`: a script that completes commands, options and their values."""

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module

from .. import plugins
from ..cli import COMMANDS
from .launch import OPTIONS, packaged
from .options import make_parser as make_train_parser
from .recipes import recipes

TRAINS = ("train", "iterate", "sweep", "cache")  # they take the options of the training


@dataclass
class Completions:
    """What a command takes.

    Attributes:
        options: option -> whether a value follows it.
        words: arguments without an option: subcommands.
        values: option or subcommand -> what may follow it.
        or_files: keys of `values` that a file may follow too.
    """

    options: dict[str, bool] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    values: dict[str, list[str]] = field(default_factory=dict)
    or_files: set[str] = field(default_factory=set)


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo completion",
        allow_abbrev=False,
        description="Print a script that completes the commands of sampo, their options and the values of these. The "
        "script is static: print it again after an update. docs/install.md says where to put it.",
    )
    parser.add_argument("shell", choices=list(SCRIPTS), help="the shell that will read the script")
    plugins.add_option(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the script."""
    print(SCRIPTS[args.shell]({name: completions(name) for name in COMMANDS}), end="")


def completions(command: str) -> Completions:
    """Everything that a command takes, from its parser."""
    found = Completions()
    if command != "train":
        _add(import_module(f"sampo.{COMMANDS[command][0]}").make_parser(), found)
    if command in TRAINS:
        _add(make_train_parser(), found)
        configs = packaged("configs")
        named = {
            "--config": list(recipes()),
            "--accelerate_config": sorted(path.stem for path in (configs / "accelerate").glob("*.yaml")),
            "--deepspeed": sorted(path.stem for path in (configs / "deepspeed").glob("*.json")),
        }
        found.options |= dict.fromkeys(["--config", "--plugin", *(f"--{name}" for name in OPTIONS)], True)
        found.values |= named
        found.or_files |= set(named)
    if command == "recipes":
        found.values |= {action: list(recipes()) for action in ("show", "cp")}
    return found


def _add(parser: argparse.ArgumentParser, found: Completions) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.words += list(action.choices)
            for subparser in action.choices.values():
                _add(subparser, found)
        elif not action.option_strings:
            found.words += _values(action)
        for option in action.option_strings:
            if option.startswith("--") and not _is_alias(option, action.option_strings):
                found.options[option] = action.nargs != 0
                if values := _values(action):
                    found.values[option] = values


def _is_alias(option: str, others: Iterable[str]) -> bool:
    """Whether it is `--an-option` beside `--an_option`."""
    return "-" in option[2:] and f"--{option[2:].replace('-', '_')}" in others


def _values(action: argparse.Action) -> list[str]:
    """The values of an option that are words to the shell."""
    values = ["true", "false"] if action.nargs == "?" and action.const is True else action.choices or ()
    return [str(value) for value in values if re.fullmatch(r"[\w./:-]+", str(value))]


# --- scripts ---------------------------------------------------------------------------------------------------------

BASH = """\
# Completion of sampo for bash, printed by `sampo completion bash`
_sampo() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}}
    local options='' words='' values='' files=''
    if [[ $current == '=' ]]; then  # bash makes three words of --option=value
        current=''
    elif [[ $previous == '=' ]]; then
        previous=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W '{commands}' -- "$current"))
        return
    fi
    case $command in
{tables}
    esac
    case "$command $previous" in
{values}
    esac
    if [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$current"))
    elif [[ -n $values ]]; then
        COMPREPLY=($(compgen -W "$values" -- "$current"))
        local IFS=$'\\n'  # a name of a file may hold blanks
        [[ -z $files ]] || COMPREPLY+=($(compgen -f -- "$current"))
    else
        COMPREPLY=($(compgen -W "$words" -- "$current"))
    fi
}}
complete -o default -F _sampo sampo  # no match: files
"""

ZSH = """\
#compdef sampo
# Completion of sampo for zsh, printed by `sampo completion zsh`
_sampo() {{
    local current=${{words[CURRENT]}} previous=${{words[CURRENT-1]}} command=${{words[2]}}
    local options='' words_='' values='' files=''
    if (( CURRENT == 2 )); then
        compadd -- {commands}
        return
    fi
    case $command in
{tables}
    esac
    case "$command $previous" in
{values}
    esac
    if [[ $current == -* ]]; then
        compadd -- ${{=options}}
    elif [[ -n $values ]]; then
        compadd -- ${{=values}}
        [[ -z $files ]] || _files
    else
        compadd -- ${{=words_}}
        _files
    fi
}}
if [[ $funcstack[1] == _sampo ]]; then
    _sampo "$@"
else
    compdef _sampo sampo
fi
"""


def _of_bash(commands: dict[str, Completions]) -> str:
    return _fill(BASH, commands, "words")


def _of_zsh(commands: dict[str, Completions]) -> str:
    return _fill(ZSH, commands, "words_")  # zsh has `words` for the command line


def _fill(script: str, commands: dict[str, Completions], words: str) -> str:
    """Put the tables into a script: the options of each command, then the values of each option."""
    tables, values = [], []
    for name, found in commands.items():
        tables.append(f"        {name}) options='{' '.join(found.options)}' {words}='{' '.join(found.words)}' ;;")
        for word, offered in found.values.items():
            files = " files=1" if word in found.or_files else ""
            values.append(f"        '{name} {word}') values='{' '.join(offered)}'{files} ;;")
    return script.format(commands=" ".join(commands), tables="\n".join(tables), values="\n".join(values))


def _of_fish(commands: dict[str, Completions]) -> str:
    lines = ["# Completion of sampo for fish, printed by `sampo completion fish`"]
    for name in commands:
        text = re.sub(r'([\\"$])', r"\\\1", COMMANDS[name][1])
        lines.append(f'complete -c sampo -n __fish_use_subcommand -f -a {name} -d "{text}"')
    for name, found in commands.items():
        begin = f"complete -c sampo -n '__fish_seen_subcommand_from {name}'"
        if found.words:
            lines.append(f"{begin} -a '{' '.join(found.words)}'")
        for option, takes_value in found.options.items():
            values = f" -a '{' '.join(found.values[option])}'" if option in found.values else ""
            only = "-r -F" if option in found.or_files or not values else "-x"
            lines.append(f"{begin} -l {option[2:]}{f' {only}{values}' if takes_value else ''}")
        for word in (word for word in found.values if word not in found.options):
            condition = f"'__fish_seen_subcommand_from {name}; and __fish_seen_subcommand_from {word}'"
            lines.append(f"complete -c sampo -n {condition} -a '{' '.join(found.values[word])}'")
    return "\n".join(lines) + "\n"


SCRIPTS = {"bash": _of_bash, "zsh": _of_zsh, "fish": _of_fish}

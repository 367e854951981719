"""One page per command, from its parser. `python docs/build.py` writes them to docs/commands."""

import argparse
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any

GUIDES = {
    "init": ("train", "choose"),
    "train": ("train", "configuration", "data", "resume", "scale"),
    "iterate": ("iterate",),
    "sweep": ("sweep",),
    "merge": ("lora",),
    "cache": ("cache",),
    "audit": ("audit",),
    "diagnose": ("diagnose", "choose"),
    "generate": ("generate",),
    "prompts": ("claim",),
    "chat": ("chat",),
    "judge": ("judges", "judge_check", "evaluation"),
    "pairs": ("onpolicy",),
    "filter": ("onpolicy",),
    "panel": ("judges",),
    "compare": ("evaluation",),
    "alpaca_eval": ("evaluation",),
    "bench": ("bench",),
    "report": ("report",),
    "memory": ("scale",),
    "recipes": ("train",),
    "env": ("install",),
    "completion": ("install",),
    "lab": ("lab",),
}  # command -> pages of docs/ that explain it
TRAINS = ("iterate", "sweep", "cache")  # they also take the options of `sampo train`
OF_THE_TERMINAL = ("disable_tqdm",)  # a default that depends on where the command runs


def command_pages() -> dict[str, str]:
    """File name in docs/commands -> text, for each command and for the list of all."""
    from sampo.cli import COMMANDS

    pages = {"README.md": _index(COMMANDS)}
    for name, (module, summary) in COMMANDS.items():
        parser = _parser(name, module)
        parts = [f"# sampo {name}", _sentence(parser.description or summary), _guides(name)]
        parts += [f"```text\n{usage(parser)}\n```"]
        parts += _train_sections(parser) if name == "train" else list(_sections(parser))
        if name in TRAINS:
            parts.append("All options of [`sampo train`](train.md) are accepted too.")
        pages[f"{name}.md"] = "\n\n".join([*parts, _GENERATED]) + "\n"
    return pages


_GENERATED = "*This page is generated from the parser of the command by `python docs/build.py`.*"


def _parser(name: str, module: str) -> argparse.ArgumentParser:
    module = "commands.options" if name == "train" else module
    parser: argparse.ArgumentParser = import_module(f"sampo.{module}").make_parser()
    return parser


def _index(commands: dict[str, tuple[str, str]]) -> str:
    rows = [(f"[`sampo {name}`]({name}.md)", _sentence(text)) for name, (_, text) in commands.items()]
    parts = ["# Commands", "`sampo COMMAND --help` prints the options of a command."]
    return "\n\n".join([*parts, _table(("command", "what it does"), rows), _GENERATED]) + "\n"


def _guides(name: str) -> str:
    links = [f"[{page}](../{page}.md)" for page in GUIDES[name]]
    return f"{'Guides' if len(links) > 1 else 'Guide'}: {', '.join(links)}."


def usage(parser: argparse.ArgumentParser) -> str:
    """The command with its required arguments, one line."""
    words = [parser.prog]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if not action.option_strings:
            words.append(_shown_value(action))
        elif action.required:
            words += [action.option_strings[0], action.dest.upper() if action.choices else _shown_value(action)]
    optional = any(
        a.option_strings and not a.required and not isinstance(a, argparse._HelpAction) for a in parser._actions
    )
    return " ".join([*words, *(["[options]"] if optional else [])])


def _sections(parser: argparse.ArgumentParser, level: str = "##") -> Iterator[str]:
    """A table for each group of options, and the sections of each subcommand."""
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        subcommands = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
        if actions and not subcommands:
            title = {"positional arguments": "Arguments", "options": "Options"}.get(group.title or "", group.title)
            yield f"{level} {_sentence(title or '', stop='')}\n\n{options_table(actions, parser)}"
        for found in subcommands:
            helps = {choice.dest: choice.help or "" for choice in found._choices_actions}
            for name, subparser in found.choices.items():
                yield f"{level} {name}\n\n{_sentence(helps.get(name, ''))}\n\n```text\n{usage(subparser)}\n```"
                yield from _sections(subparser, level + "#")


def _train_sections(parser: Any) -> list[str]:
    """The options of `sampo train`, by the library that defines them."""
    from transformers import TrainingArguments
    from trl import DPOConfig, ModelConfig

    from sampo.commands.launch import OPTIONS
    from sampo.config import SamPOConfig
    from sampo.plugins import PLUGIN_HELP

    starting = {"dry_run": _dry_run_help(parser)} | OPTIONS | {"plugin": PLUGIN_HELP}
    launcher = _table(("option", "meaning"), [(f"`--{name}`", _cell(text)) for name, text in starting.items()])
    base = names_of(TrainingArguments)
    groups = {
        "Method and speed": names_of(SamPOConfig) - names_of(DPOConfig),
        "Data": names_of(*parser.dataclass_types) - names_of(SamPOConfig, ModelConfig),
        "Model and adapter": names_of(ModelConfig),
        "DPO": names_of(DPOConfig) - base,
        "Training loop": base,
    }
    about = {
        "Method and speed": "These options are sampo's own. [Configuration](../configuration.md) lists them too.",
        "Data": "The first options are those of TRL's `ScriptArguments` and `DatasetMixtureConfig`.",
        "Model and adapter": "These options are those of TRL's `ModelConfig`.",
        "DPO": "These options are those of TRL's `DPOConfig`.",
        "Training loop": "These options are those of transformers' `TrainingArguments`. Some defaults are TRL's.",
    }
    helps = [
        ("`--help`", "a selection: sampo's options and the most used ones"),
        ("`--help_all`", "all options in full"),
    ]
    parts = [
        "`--config FILE` reads the same options from a YAML file, or from a packaged recipe by its name. Options on "
        "the command line take precedence.",
        f"## Launch\n\nThese options are for the command line only.\n\n{launcher}",
    ]
    parts.append(f"## Help\n\n{_table(('option', 'what it prints'), helps)}")
    for title, names in groups.items():
        actions = [action for action in parser._actions if action.dest in names and action.nargs != 0]
        brief = title in ("Model and adapter", "DPO", "Training loop")
        parts.append(f"## {title}\n\n{about[title]}\n\n{options_table(actions, parser, brief=brief)}")
    return parts


# Options of TRL and transformers in `sampo train --help`, which adds sampo's own and the launcher's.
MOST_USED = (
    *("model_name_or_path", "output_dir", "learning_rate", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_length", "beta", "use_peft", "lora_r", "bf16", "eval_strategy"),
    *("save_steps", "report_to", "seed"),
)
HELP_WIDTH, HELP_COLUMN = 100, 33
TRAIN_HELP = """usage: sampo train --config FILE [options]

Train on preference pairs. `--config` takes a YAML file, or the name of a recipe (`sampo recipes
ls`); options on the command line take precedence. This is a selection, with the first sentence of
each help text: `sampo train --help_all` prints all {n} options in full.
"""


def train_help() -> str:
    """What `sampo train --help` prints."""
    from trl import DPOConfig
    from trl.scripts.utils import ScriptArguments

    from sampo.commands.launch import OPTIONS
    from sampo.commands.options import SamPOScriptArguments
    from sampo.config import SamPOConfig
    from sampo.plugins import PLUGIN_HELP

    parser = _parser("train", "")
    actions = {action.dest: action for action in parser._actions if action.nargs != 0}
    own, scripts = (
        names_of(SamPOConfig) - names_of(DPOConfig),
        names_of(SamPOScriptArguments) - {"ignore_bias_buffers"},
    )
    data = sorted((name for name in actions if name in scripts), key=lambda name: name in names_of(ScriptArguments))
    groups = {
        "Method and speed (sampo)": [name for name in actions if name in own],
        "Data and runs (sampo, TRL)": data,
        "Model and training (TRL, transformers)": MOST_USED,
    }
    parts = [TRAIN_HELP.format(n=len(actions))]
    for title, names in groups.items():
        parts.append(f"\n{title}:\n" + "".join(_help_lines(actions[name]) for name in names))
    parts.append("\nOn the command line only; most are for the launcher:\n")
    starting = {"dry_run": _dry_run_help(parser)} | OPTIONS | {"plugin": PLUGIN_HELP}
    return "".join([*parts, *(_help_entry(f"--{name}", text) for name, text in starting.items())])


def _dry_run_help(parser: argparse.ArgumentParser) -> str:
    return next(action.help or "" for action in parser._actions if action.dest == "dry_run")


def _help_lines(action: argparse.Action) -> str:
    text = _first_sentence(" ".join((action.help or "").split()))
    text = text if text.endswith(".") else f"{text}."
    choices = [str(choice) for choice in action.choices or ()]
    if any(f"`{choice}`" not in text for choice in choices):
        text += f" One of {', '.join(choices)}."
    default = "" if action.default is False else _shown_default(action).strip("`")
    return _help_entry(action.option_strings[0], f"{text} Default: {default}" if default else text)


def _help_entry(name: str, text: str) -> str:
    """An option and its meaning, in two columns."""
    indent = " " * HELP_COLUMN
    lines = textwrap.wrap(text, HELP_WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join([f"  {name:<{HELP_COLUMN - 3}} {lines[0].lstrip()}", *lines[1:]]) + "\n"


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[a-z0-9`)\]])\. (?=[A-Z`])", text)[0]


def names_of(*kinds: type) -> set[str]:
    """Names of the fields of dataclasses."""
    return {field.name for kind in kinds for field in fields(kind)}


def options_table(actions: Sequence[argparse.Action], parser: argparse.ArgumentParser, brief: bool = False) -> str:
    """Options with value, default and help; `brief`: of the help the first sentence only."""
    rows = []
    for action in actions:
        text = " ".join((action.help or "").split())
        text = text % {**vars(action), "prog": parser.prog} if "%" in text else text
        if brief:
            text = _first_sentence(text)
        name = action.option_strings[0] if action.option_strings else _shown_value(action)
        value = "" if not action.option_strings or action.nargs == 0 else _shown_value(action)
        rows.append((f"`{name}`", f"`{_cell(value)}`" if value else "", _shown_default(action), _cell(text)))
    heads = (
        "option" if any(action.option_strings for action in actions) else "argument",
        "value",
        "default",
        "meaning",
    )
    shown = [i for i in range(len(heads)) if i in (0, 3) or any(row[i] for row in rows)]  # no empty column
    return _table(tuple(heads[i] for i in shown), [tuple(row[i] for i in shown) for row in rows])


def _shown_value(action: argparse.Action) -> str:
    """The value of an option, as its usage shows it."""
    if action.metavar is not None:
        value = action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    elif action.choices is not None:
        value = " | ".join(map(str, action.choices))
    elif isinstance(action.default, bool):
        value = "true | false"
    else:
        value = (action.dest if not action.option_strings else _kind(action)).upper()
    return f"{value} …" if action.nargs in ("+", "*") else value


def _kind(action: argparse.Action) -> str:
    """A word for the type of a value."""
    name = getattr(action.type, "__name__", "")
    return {"int": "N", "float": "X", "Path": "path"}.get(name, "N" if isinstance(action.default, int) else "text")


def _shown_default(action: argparse.Action) -> str:
    default = action.default
    if action.dest in OF_THE_TERMINAL:
        return "not in a terminal"
    if action.nargs == 0 or default is None or default == argparse.SUPPRESS or default in ("", {}, []):
        return "required" if action.required and action.option_strings else ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, list | tuple):
        default = " ".join(map(str, default))
    return f"`{_cell(str(getattr(default, 'value', default)))}`"


def _sentence(text: str, stop: str = ".") -> str:
    text = " ".join(text.split())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ":")) else stop)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(heads)}", *lines[1:]])

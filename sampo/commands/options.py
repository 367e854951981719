"""The options of `sampo train` and how they are read; `option_checks` checks their values.

The options are those of TRL's `dpo.py`, with `SamPOConfig` instead of `DPOConfig`. An unknown option
is an error that names the nearest one, in the YAML file as on the command line; TRL's script ignores it.
"""

import argparse
import datetime
import difflib
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from trl.scripts.utils import DatasetConfig, ScriptArguments, TrlParser

from ..io.schemas import WrongFile, named, read_yaml, typed
from ..old_options import OLD_OPTIONS
from .launch import OPTIONS as LAUNCH_OPTIONS
from .launch import deepspeed_config
from .option_checks import NO_GPU, find_option_issues
from .recipes import find_recipe
from .yaml_values import check_env, find_wrong_shapes

DRY_RUN = ("--dry_run", "--dry-run")
TRAINS_ALL = ("sampo train", "sampo sweep")
TRAINERS = ("dpo", "cpo", "simpo", "orpo", "kto")
ON_POLICY_OPTIONS = ("on_policy", "prompts", "eval_prompts", "generate", "judge", "pairs")
ITERATE_OPTIONS = ("rounds", "data", "reference", "remove_old_caches", *ON_POLICY_OPTIONS)  # in the YAML file too
OF_TRAIN = "`sampo train --help` prints the most used options of the training, `--help_all` all of them."


@dataclass
class SamPOScriptArguments(ScriptArguments):
    """TRL's arguments of a training script, and how preference data is read.

    Args:
        eval_fraction: Share of the prompts to hold out for evaluation.
        on_bad_rows: `error` or `drop`.
        columns: Names of the columns in the source.
        repeated_prompt: `error` or `cut`.
        text_as_messages: Whether text goes through the chat template.
        length_split: `long`, `short`, `equal` or `balanced`.
        chat_template: Jinja text, or the path of a file with it.
        ref_model_name_or_path: The reference, if it is not what training starts from.
        ref_model_revision: Its revision.
        prompt_shard: `2/3` for the second of three shards of the training prompts.
        split_seed: Seed of all that divides the data.
        resume: `auto`, short for `resume_from_checkpoint: auto`.
        log_line: `compact` or `full`.
        trainer: one of `TRAINERS`.
    """

    trainer: str = field(
        default="dpo",
        metadata={
            "help": "`dpo`: sampo's trainer, with a token weighting. `cpo`, `simpo`, `orpo`, `kto`: TRL's trainer of "
            "that method, with the options of TRL's config in place of those of `dpo`.",
            "choices": list(TRAINERS),
        },
    )
    eval_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Share of the prompts of the training split that is held out for evaluation, instead of "
            "`dataset_test_split`. In [0, 1); all pairs of one prompt stay in one split."
        },
    )
    on_bad_rows: str = field(
        default="error",
        metadata={
            "help": "What happens to pairs that cannot be trained on (an empty response, no shared prompt, ...): "
            "`error` lists them and stops, `drop` omits them and reports how many.",
            "choices": ["error", "drop"],
        },
    )
    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names in the source of `prompt`, `chosen`, `rejected`, `system` and `input`, as `prompt=question "
            "chosen=better`; in a YAML file also a mapping. `system=` omits the system messages."
        },
    )
    repeated_prompt: str = field(
        default="error",
        metadata={
            "help": "What happens where the responses begin with their prompt, as messages or as text: `error`, or "
            "`cut` it there, together with the role tags that a chat template puts around it.",
            "choices": ["error", "cut"],
        },
    )
    text_as_messages: bool = field(
        default=False,
        metadata={
            "help": "Make a message of the user of each text prompt and one of the assistant of each text response, "
            "without the blanks at their ends, so that a chat model is trained through its template."
        },
    )
    length_split: str | None = field(
        default=None,
        metadata={
            "help": "Train only on pairs whose chosen response is longer (`long`), shorter (`short`) or as long "
            "(`equal`) as the rejected one in tokens, or on equally many long and short ones (`balanced`).",
            "choices": ["long", "short", "equal", "balanced"],
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "Chat template (Jinja), or the path of a file that holds one, for a tokenizer that has none or "
            "instead of its own."
        },
    )
    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Reference model, with the vocabulary of the policy. Default: what training starts from, which is "
            "the model of `model_name_or_path`; if that is an adapter, a frozen copy of it."
        },
    )
    ref_model_revision: str | None = field(
        default=None, metadata={"help": "Revision of `ref_model_name_or_path` on the hub."}
    )
    prompt_shard: str | None = field(
        default=None,
        metadata={
            "help": "Train on a part of the prompts: `2/3` is the second of three shards, drawn by a hash of prompt "
            "and `split_seed`. Pairs of one prompt are in one shard, and each pair is in exactly one."
        },
    )
    split_seed: int | None = field(
        default=None,
        metadata={"help": "Seed of `eval_fraction`, `length_split` and `prompt_shard`. Default: `seed`."},
    )
    resume: str | None = field(
        default=None,
        metadata={
            "help": "`auto`: resume from the last complete checkpoint in `output_dir`, or start where there is none. "
            "The same command starts a run and continues it. For a specific checkpoint: `resume_from_checkpoint`.",
            "choices": ["auto"],
        },
    )
    log_line: str = field(
        default="compact",
        metadata={
            "help": "What is printed at each log: `compact` prints one line with step, loss, margin, accuracy, speed "
            "and time left, `full` prints all metrics. `trainer_state.json` and `report_to` always get all.",
            "choices": ["compact", "full"],
        },
    )


class _HelpAll(argparse.Action):
    """`--help_all`: the help that argparse makes of all options."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser._print_message(parser.format_help(), sys.stdout)
        parser.exit()


def short_help() -> str:
    """The most used options of `sampo train`: a file made by `docs/build.py`, since the parser has to import torch."""
    return Path(__file__).with_name("train_help.txt").read_text(encoding="utf-8")


class RecipeParser(TrlParser):
    """TRL's parser, strict: no abbreviations, and unknown options are errors that name the nearest option."""

    def __init__(self, dataclass_types: Any, **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.add_argument("--help_all", "--help-all", action=_HelpAll, help="print all options in full, and exit")
        self.not_ours: set[str] = set()  # options in the YAML file that the command itself reads
        self.trainer = "dpo"  # whose options these are
        self._own_defaults = {action.dest: action.default for action in self._actions}

    def print_help(self, file: Any = None) -> None:
        """What `--help` prints: `short_help`."""
        self._print_message(short_help(), file or sys.stdout)

    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage text of four hundred options."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args_and_config(self, args: Any = None, *switches: Any, **named_switches: Any) -> tuple[Any, ...]:
        """As TRL's, with all issues of the YAML file, the command line and the dataclasses in one message."""
        issues, _, built = self.find_issues(sys.argv[1:] if args is None else list(args))
        if issues:
            self.error(listed(issues))
        return tuple(built)

    def find_issues(self, args: list[str]) -> tuple[list[str], argparse.Namespace, list[Any]]:
        """Read the YAML file and the command line.

        Returns:
            All issues; an attribute for each option of all, with its default where its value cannot be read; and the
            dataclasses without issues of their own.
        """
        # TRL sets it in every run, by names that transformers has deprecated: users cannot change that.
        warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", category=FutureWarning)
        parser = self.for_trainer(args)
        if parser is not self:
            return parser.find_issues(args)
        issues, config, namespace = self._read(args)
        os.environ.update({name: str(value) for name, value in (config.get("env") or {}).items()})
        built = []
        for kind in self.dataclass_types:
            try:
                built.append(kind(**{f.name: getattr(namespace, f.name) for f in fields(kind) if f.init}))
            except (TypeError, ValueError) as error:
                issues.append(NO_GPU if "support bf16/gpu" in str(error) else str(error))
        return issues, namespace, built

    def _read(self, args: list[str]) -> tuple[list[str], dict[str, Any], argparse.Namespace]:
        """All issues except those of the dataclasses; the YAML file; an attribute for each option."""
        args = self._find_config(args)
        config, path = self._read_config(args)
        wrong = self._find_wrong_keys(config, path)
        foreign = [key for key in config if key in wrong and self._is_of_dpo(key)]
        config = {key: value for key, value in config.items() if key not in wrong}
        self.set_defaults_with_config(**{key: value for key, value in config.items() if key != "env"})
        namespace, rest, unreadable = self._parse(args)
        words = _options_in(rest)
        foreign += [name for word in words if self._is_of_dpo(name := _plain(word))]
        words = [word for word in words if not self._is_of_dpo(_plain(word))]
        wrong = {key: issue for key, issue in wrong.items() if key not in foreign}
        unknown = [f"`{word}` is no option.{_nearest(word, vars(namespace))}" for word in words]
        issues = [*self._find_trainer_issues(namespace, foreign), *find_option_issues(namespace)]
        try:
            typed(list[DatasetConfig], config.get("datasets", []), field="datasets")
        except ValueError as error:
            issues.append(f"In {path} {error}.")
        return [*wrong.values(), *unknown, *unreadable, *issues], config, namespace

    def _parse(self, args: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
        """As `parse_known_args`, which ends at the first value that it cannot read; here all of them are issues."""
        issues: list[str] = []
        args, self.exit_on_error = list(args), False
        try:
            while True:
                try:
                    return *self.parse_known_args(args), issues
                except argparse.ArgumentError as error:
                    names = str(error.argument_name).split("/")
                    issues.append(self._describe_argument(names, error.message))
                    self._forget(names, args)
        finally:
            self.exit_on_error = True

    def _describe_argument(self, names: list[str], message: str) -> str:
        """What argparse reports of a value, in the form of the other issues."""
        if kind := re.fullmatch(r"invalid (\w+) value: (.*)", message, re.DOTALL):
            what = {"float": "a number", "int": "a whole number"}.get(kind[1], "a valid value")
            return f"`{names[0]}` must be {what}, got {kind[2]}."
        if choice := re.match(r"invalid choice: '?(.*?)'? \(choose from", message, re.DOTALL):
            choices = list(self._action(names).choices or ())
            return f"`{names[0]}` must be one of {choices}, got {choice[1]!r}.{_nearest(choice[1], choices)}"
        return f"`{names[0]}` {message}."

    def _action(self, names: list[str]) -> argparse.Action:
        return next(action for action in self._actions if action.option_strings[:1] == names[:1])

    def _forget(self, names: list[str], args: list[str]) -> None:
        """Give an option its default: remove it from the arguments, or from what the YAML file has set."""
        given = [i for i, word in enumerate(args) if word.split("=")[0] in names]
        for start in reversed(given):
            stop = next((i for i in range(start + 1, len(args)) if args[i].startswith("--")), len(args))
            del args[start:stop]
        if not given:
            action = self._action(names)
            action.default = self._own_defaults[action.dest]

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Numbers of the YAML file go through the same conversion as those of the command line."""
        as_text = (int, float, datetime.date, datetime.datetime)  # TRL's parser makes a date of a name like 2026-01-31
        texts = {key: str(value) if type(value) in as_text else value for key, value in config.items()}
        columns = config.get("columns")
        if isinstance(columns, dict):  # as on the command line
            texts["columns"] = [f"{ours}={theirs or ''}" for ours, theirs in columns.items()]
        return super().set_defaults_with_config(**texts)

    def for_trainer(self, args: list[str]) -> "RecipeParser":
        """This parser, or that of the trainer which the command line or the YAML file name."""
        words = [part for word in args for part in (word.split("=", 1) if word.startswith("--") else [word])]
        given = [value for word, value in pairwise(words) if word == "--trainer"]
        trainer = given[-1] if given else self._read_config(self._find_config(args))[0].get("trainer")
        if trainer not in TRAINERS or trainer == self.trainer or self.prog not in TRAINS_ALL:
            return self
        parser = make_parser(prog=self.prog, trainer=trainer)
        parser.not_ours = self.not_ours
        return parser

    def _is_of_dpo(self, name: str) -> bool:
        """Whether sampo's trainer alone has an option."""
        from ..config import SamPOConfig

        return name in SamPOConfig.__dataclass_fields__ and name not in self._own_defaults

    def _find_trainer_issues(self, options: argparse.Namespace, foreign: list[str]) -> list[str]:
        if foreign:
            names = ", ".join(f"`{name}`" for name in dict.fromkeys(foreign))
            return [f"`trainer: {self.trainer}` must go without options of `trainer: dpo`, got {names}. Remove them."]
        if options.trainer != self.trainer:  # a command that cannot train it
            return [f"`trainer: {options.trainer}` is for `sampo train` and `sampo sweep`, got it in `{self.prog}`."]
        return []

    def find_unknown(self, args: list[str]) -> list[str]:
        """Find names, choices and shapes of the YAML file, and words of the command line, that are no option."""
        parser, args = self.for_trainer(args), self._find_config(args)
        return [*parser._find_wrong_keys(*self._read_config(args)).values(), *_options_in(parser._parse(args)[1])]

    def _find_wrong_keys(self, config: dict[str, Any], path: str) -> dict[str, str]:
        """Find names, choices and shapes of the YAML file that no dataclass knows; an issue for each name."""
        choices = {action.dest: list(action.choices or ()) for action in self._actions}
        known = {*choices, *self.not_ours, "env"} - {"dry_run", "help", "help_all"}
        unknown = {
            key: f"`{key}` in {path} is no option.{_nearest(key, choices, value)}"
            for key, value in config.items()
            if key not in known
        }
        no_choice = {
            key: f"`{key}` in {path} must be one of {choices[key]}, got {value!r}."
            for key, value in config.items()
            if choices.get(key) and value is not None and value not in choices[key]
        }
        return unknown | no_choice | find_wrong_shapes(config, self.dataclass_types, path)

    def read(self, args: list[str]) -> tuple[dict[str, Any], Any]:
        """The YAML file's options, and an attribute for each option of all; for a caller who trains elsewhere.

        Exits if something is wrong. The dataclasses, which may initialise a device, are not built.
        """
        issues, config, namespace = self.for_trainer(args)._read(args)
        if issues:
            self.error(listed(issues))
        return config, namespace

    def config_of(self, args: list[str]) -> dict[str, Any]:
        """What the YAML file among the arguments holds."""
        return self._read_config(self._find_config(args))[0]

    def _find_config(self, args: list[str]) -> list[str]:
        """Arguments with `--config PATH`, as TRL's parser needs it, for `--config=PATH` and for names of recipes."""
        args = [part for word in args for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        for i, name in enumerate(args[1:], 1):
            if args[i - 1] == "--config" and not os.path.exists(name):
                try:
                    args[i] = str(find_recipe(name))
                except ValueError as error:
                    self.error(f"`--config` must be a YAML file that exists or {error}")
        return args

    def _read_config(self, args: list[str]) -> tuple[dict[str, Any], str]:
        """The mapping in the `--config` file and its path, which are taken out of `args`."""
        if "--config" not in args:
            return {}, ""
        index = args.index("--config")
        if index + 1 == len(args):
            self.error("`--config` must be followed by the path of a YAML file, got nothing.")
        path = args[index + 1]
        del args[index : index + 2]
        try:
            config = read_yaml(Path(path), dict[Any, Any])
            with named(path):
                check_env(config)
        except OSError as error:
            self.error(f"`--config` must be a YAML file that can be read, got {path}: {error.strerror}.")
        except WrongFile as error:
            self.error(f"`--config` must hold `option: value` lines. {error}")
        if not all(isinstance(key, str) for key in config):
            self.error(f"`--config` must hold `option: value` lines, got {path} with something else.")
        return config, path


def _options_in(words: list[str]) -> list[str]:
    """What follows an unknown option is most likely its value."""
    return [word.split("=")[0] for word in words if word.startswith("--")] or words


def listed(issues: list[str]) -> str:
    """One message of one or several issues."""
    return issues[0] if len(issues) == 1 else "\n- ".join([f"{len(issues)} issues:", *issues])


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _nearest(name: str, known: Iterable[str], value: Any = None) -> str:
    plain = _plain(name)
    if plain in OLD_OPTIONS:
        return f" {OLD_OPTIONS[plain](value)}"
    if plain in LAUNCH_OPTIONS:
        return f" It is for the launcher: `sampo train --{plain} ...` on the command line."
    if plain == "dry_run":
        return " It is for the command line: `sampo train --dry_run ...`."
    if plain in ITERATE_OPTIONS:
        return " It is for `sampo iterate`."
    from ..training.baselines import BASELINES  # loads these trainers

    if trainers := [trainer for trainer, one in BASELINES.items() if plain in {f.name for f in fields(one.config)}]:
        return f" It is of `trainer: {' | '.join(trainers)}`."
    near = difflib.get_close_matches(plain, known, n=1)
    return f" Did you mean `{'--' if name.startswith('-') else ''}{near[0]}`?" if near else ""


def make_parser(subparsers: Any = None, prog: str | None = None, trainer: str = "dpo") -> RecipeParser:
    """The parser; alone, or as one of `subparsers` whose class takes `dataclass_types`.

    Args:
        subparsers: of another parser.
        prog: the command in messages.
        trainer: whose options it knows.
    """
    from trl import DatasetMixtureConfig, ModelConfig

    from ..config import SamPOConfig

    config: type = SamPOConfig
    if trainer != "dpo":
        from ..training.baselines import BASELINES  # loads these trainers

        config = BASELINES[trainer].config
    types = (SamPOScriptArguments, config, ModelConfig, DatasetMixtureConfig)
    if subparsers is not None:
        parser = subparsers.add_parser("train", help="Train on preference pairs", dataclass_types=types)
    else:
        parser = RecipeParser(types, prog=prog or "sampo train")
        parser.trainer = trainer
        parser.set_defaults(trainer=trainer)
        if prog in (None, "sampo train"):
            parser.add_argument(
                *DRY_RUN,
                action="store_true",
                help="Print all issues of options, model and data at once; without any, run the first steps in a "
                "temporary folder, and show pairs, selected tokens, steps, memory and time. Nothing is written.",
            )
    # `zero2` for the path of the file that comes with the package, in YAML as on the command line
    next(action for action in parser._actions if action.dest == "deepspeed").type = deepspeed_config
    # Bars are for people: in a log each of their updates is a line.
    parser.set_defaults(disable_tqdm=not sys.stderr.isatty())
    return parser

"""Weightings from outside: files of `--plugin FILE`, and packages with an entry point in the group `sampo.weightings`.

Loading a plugin runs its code. A file is named in an environment variable, so that every process of a run loads the
same ones. This module does not import torch.
"""

import argparse
import importlib.util
import os
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

VARIABLE = "SAMPO_PLUGINS"
GROUP = "sampo.weightings"
COMMANDS_WITH_PLUGINS = (
    "train",
    "iterate",
    "sweep",
    "diagnose",
    "cache",
    "completion",
    "lab",
)  # those that take `--plugin`
PLUGIN_HELP = "Python file that registers a weighting (docs/plugins.md)"


class PluginError(Exception):
    """A plugin that cannot be loaded."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """Show `--plugin` in the help of a command; `take_options` has taken it before the parser reads the rest."""
    parser.add_argument("--plugin", metavar="FILE", help=PLUGIN_HELP)


def take_options(argv: list[str]) -> list[str]:
    """Store the files of `--plugin FILE` for this process and those that it starts; return the other arguments."""
    rest, files, arguments = [], [], iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name != "--plugin":
            rest.append(argument)
            continue
        file = value if equals else next(arguments, "")
        if not Path(file).is_file():
            raise PluginError(f"`plugin` must be a Python file, got {file!r}. Give its path: `--plugin mine.py`.")
        files.append(os.path.abspath(file))
    if files:
        known = list(filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)))
        os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys([*known, *files]))
    return rest


def list_plugins() -> list[str | EntryPoint]:
    """The plugins that `load_plugins` loads: paths, then entry points."""
    return [*filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)), *entry_points(group=GROUP)]


def load_plugins() -> None:
    """Run every plugin once; each registers its methods by `sampo.register_weighting`.

    Raises:
        PluginError: a plugin cannot be run.
    """
    for number, plugin in enumerate(list_plugins()):
        try:
            if isinstance(plugin, str):
                _run_file(f"sampo_plugin_{number}", plugin)
            else:
                plugin.load()
        except Exception as error:  # the user's code may raise anything
            name = plugin if isinstance(plugin, str) else f"{plugin.name} ({plugin.value})"
            raise PluginError(
                f"`plugin` must be Python code that can be run, got {name} with {type(error).__name__}: {error}"
            ) from error


def _run_file(name: str, path: str) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError("its name must end in `.py`.")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))

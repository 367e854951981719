"""`sampo COMMAND …`. A command is imported when it is called, so that `sampo --help` does not wait for torch."""

import difflib
import os
import sys
from importlib import import_module

from . import plugins

# command -> (module, what it does)
COMMANDS = {
    "init": (
        "commands.init",
        "write a first recipe for a model and pairs: audit, method, batch sizes, each explained",
    ),
    "train": ("commands.train", "train on preference pairs, from a YAML file and options, on one process or many"),
    "iterate": ("commands.iterate", "Iterative SamPO: several rounds of training, each from the model of the last"),
    "sweep": (
        "commands.sweep",
        "compare methods on your pairs: train each with the same budget, answer, judge, and say what is decided",
    ),
    "merge": ("commands.merge", "merge an adapter into its base model, and check that the log-probs stay the same"),
    "cache": ("commands.cache", "compute the reference log-probs of a training run ahead; list and delete them"),
    "audit": ("commands.audit", "check preference data: issues, lengths, what length alone predicts"),
    "diagnose": (
        "commands.diagnose",
        "length bias of a model, trained or not: the length pressure of every weighting",
    ),
    "generate": ("commands.generate", "answer prompts with a model: one record per answer, resumable"),
    "prompts": ("commands.prompts", "questions of named benchmarks from their files, and their official settings"),
    "chat": ("commands.chat", "talk to one or two models in the terminal, with the length of each answer"),
    "judge": ("commands.judge", "judge the answers of a system against those of a baseline, in both orders"),
    "pairs": ("commands.pairs", "preference pairs from judged answers, chosen with or without control of length"),
    "filter": ("commands.filter", "keep preference pairs by the lengths of their responses, with the audit after it"),
    "panel": ("commands.panel", "several judges on the same pairs in one result, with their agreement"),
    "compare": ("commands.compare", "several judged systems on one screen: win rates, lengths, each against each"),
    "alpaca_eval": ("commands.alpaca_eval", "AlpacaEval 2's own two numbers, from its annotations and its files"),
    "bench": ("commands.bench", "the paper's five benchmarks by lm-evaluation-harness, one record per number"),
    "report": ("commands.report", "one HTML page from what the other commands wrote into a folder"),
    "memory": ("commands.memory", "memory per GPU of a training run by engine, computed from a model's configuration"),
    "recipes": ("commands.recipes", "list, show or copy the recipes that come with the package"),
    "env": ("commands.env", "versions, devices, extras and engines of this installation, for an issue report"),
    "completion": ("commands.completion", "print a script for the shell that completes commands, options and values"),
    "lab": ("commands.lab", "measure the methods in a small world with ground truth; minutes on two cores"),
}

# Commands that do not compute again what they have written.
RESUMABLE = ("iterate", "sweep", "cache", "diagnose", "generate", "judge", "pairs", "bench", "lab")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        from . import __version__

        print(f"sampo {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        print(f"sampo: the command must be one of {list(COMMANDS)}, got {name!r}.{hint}", file=sys.stderr)
        return 2
    try:
        rest = plugins.take_options(rest) if name in plugins.COMMANDS_WITH_PLUGINS else rest
        return _call(name, rest)
    except plugins.PluginError as error:
        print(f"sampo {name}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # what reads the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again when it flushes
        return 141  # 128 + SIGPIPE, which Windows does not have
    except KeyboardInterrupt:
        again = " The same command continues where it stopped." if name in RESUMABLE else ""
        if os.environ.get("RANK", "0") == "0":  # of several processes one says so
            print(f"\nsampo {name}: stopped.{again}", file=sys.stderr)
        return 130


def _call(name: str, rest: list[str]) -> int:
    """Import a command and run it."""
    module = import_module(f".{COMMANDS[name][0]}", __package__)
    if hasattr(module, "run"):  # its options are TRL's, and it may have to start several processes
        return module.run(rest)
    module.main(module.make_parser().parse_args(rest))
    return 0


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: sampo COMMAND [options]", "", *lines, "", "sampo COMMAND --help shows the options."])


if __name__ == "__main__":
    sys.exit(main())

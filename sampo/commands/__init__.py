"""The commands of `sampo`: options, checks, and what is printed.

In: words of the command line and YAML files. Out: calls of the other packages, files, tables, an exit status. Each
command is a module with `make_parser` and `main`, or `run` where its options are those of training; `sampo/cli.py`
imports it when it is called. Read first: `train.py`, then `options.py` and `option_checks.py`.
"""

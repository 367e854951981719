"""What judgements and answers show: win rates beside lengths, each with an interval over prompts.

In: judgements of one judge (`verdicts.py`) or answers alone (`verbosity.py`). Out: a `Summary` or `Verbosity` per
system, as rows, tables, one sentence and records.
Read `verdicts.py` first, then `win_rate.py`, `length_control.py` and `style_control.py` (win rates at equal length and
at equal style, by the fit of `controlled_fit.py`) and `summary.py`, which puts them together; `judged.py` has the
files, `comparing.py` several systems, `alpaca_eval.py` AlpacaEval's own fit.
"""

"""What judgements and answers show: win rates beside lengths, each with an interval over prompts.

In: judgements of one judge (`verdicts.py`) or answers alone (`verbosity.py`). Out: a `Summary` or `Verbosity` per
system, as rows, tables, one sentence and records.
Read `verdicts.py` first, then `win_rate.py`, `length_control.py` (win rate at equal length) and `summary.py`, which
puts them together; `judged.py` has the files, `comparing.py` several systems, `alpaca_eval.py` AlpacaEval's own fit.
"""

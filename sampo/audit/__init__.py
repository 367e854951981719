"""The audit of preference data: its issues, the lengths of its responses, and what length alone explains.

In: files, folders, hub ids or data sets, and a tokenizer if lengths are to be in tokens. Out: an `Audit`. `audit` is
the entry point, read it first. `scan` reads the rows once and keeps a few numbers of each pair (`tokens` measures
them); `bias`, `truncation` and `duplicates` are arithmetic on these numbers; `report` makes records, tables and
sentences of an audit, and `files` writes it. Numpy and scipy are sufficient without a tokenizer.
"""

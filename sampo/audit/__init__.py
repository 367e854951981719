"""The audit of preference data: what is wrong with it, how long its sides are, and what length alone explains.

`scan` reads the rows once and keeps a few numbers of each pair; `bias`, `truncation` and `duplicates` are arithmetic
on these; `report` turns the answers into records, tables and sentences, `files` writes them.
Numpy and scipy are enough for all of it.
"""

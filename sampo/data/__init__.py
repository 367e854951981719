"""Preference data: from a file, folder, hub id or data set to checked pairs, and from pairs to tokens.

In: rows of any layout that docs/data.md lists. Out: a `datasets.Dataset` with `prompt`, `chosen` and `rejected`
(`load`), later with `prompt_ids`, `chosen_ids` and `rejected_ids` (`tokenize`), and counts of lengths (`lengths`).
On the way: `sources` finds the files, `readers` and `json_files` read them, `columns` makes the three columns,
`layouts` reads one row, `treatment` cuts and converts, `validate` scans all rows. Read `load` first, then `validate`.
"""

"""The study of docs/results.md: every method of the lab over seeds, groups of pairs, learning rates and betas.

`run` (`python -m studies.run`) measures what `plan` lists, with the runs of `sampo.lab`, and writes records.
`analysis` compares the records over seeds, at equal KL and along a frontier; `claims` applies a rule to each claim;
`page` turns both into the tables and figures of docs/results.md. The installed package does not contain this folder.
Read `plan` first.
"""

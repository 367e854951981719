"""The built-in experiment: a small world with ground truth, a tiny model, and the real trainer.

`world` makes questions, answers and preference pairs and knows the true quality of each answer; `model` is the tiny
language model (supervised start, sampling, log-probabilities); `experiment` runs methods and measures them; `report`
turns the records of the runs into a table, a figure and sentences. `judge` and `section` serve `sampo judge` and
`sampo report`. The command is `sampo lab`. Read `world` first.
"""

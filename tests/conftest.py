"""Shared by all tests. Helper modules (`tiny`, `oracles`, …) lie beside them and are imported by name."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network
os.environ.setdefault("TQDM_DISABLE", "1")

import torch

torch.set_num_threads(1)

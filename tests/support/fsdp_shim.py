"""Lets accelerate run FSDP2 on CPU processes, which it turns into plain DDP otherwise. Imported before the trainer."""

import os

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def _prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
    return "gloo", DistributedType.MULTI_GPU


PartialState._prepare_backend = _prepare_backend
torch.distributed.init_process_group("gloo")

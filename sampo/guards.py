"""What is refused before a model is loaded: launches that would not train together, data that cannot be used."""

import os

from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset

from .config import SamPOConfig
from .data import check_preferences


def refuse_separate_processes(args: SamPOConfig) -> None:
    """Processes that do not know of each other.

    Raises:
        RuntimeError: several were launched, and each sees itself alone.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and args.world_size == 1:
        raise RuntimeError(
            f"All {world} launched processes must train one model together, got a process that sees itself alone: "
            "each would train on the same rows and overwrite the other's output. On CPU set `use_cpu: true` and "
            "launch with `torchrun` or an accelerate config of type MULTI_GPU; on GPUs check that each process sees "
            "its device."
        )


def refuse_another_engine(accelerator) -> None:
    """On the CPU accelerate turns FSDP into DDP, or into separate runs, without a word.

    Raises:
        RuntimeError: the launch asked for FSDP or DeepSpeed, and accelerate took something else.
    """
    for engine, kind in (("FSDP", DistributedType.FSDP), ("DEEPSPEED", DistributedType.DEEPSPEED)):
        asked = os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true"
        if asked and accelerator.distributed_type != kind:
            raise RuntimeError(
                f"The processes must train with {kind.value}, as the launch asks for, got "
                f"{accelerator.distributed_type.value} on {accelerator.device.type}. FSDP needs a GPU for each "
                "process; on the CPU launch with `cpu_zero3`, which shards as well, or with `cpu_ddp`."
            )


def _each_dataset(train_dataset, eval_dataset) -> list:
    return [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]


def check_data(train_dataset, eval_dataset) -> None:
    """All faults of the rows, before a model is loaded.

    Raises:
        PreferenceDataError: missing columns or bad rows.
    """
    for dataset in _each_dataset(train_dataset, eval_dataset):
        if isinstance(dataset, Dataset | IterableDataset):  # of other types TRL says what it thinks of them
            check_preferences(dataset)

"""The processes that train one model together, as torchrun starts them; one process is a group of one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tolserve.train.recipe import TrainError


@dataclass(frozen=True)
class Ranks:
    """This process's place among `size` processes, and the device that it computes on."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over all processes, the same in each."""
        return self.sum(value) / self.size

    def sum(self, value: Tensor) -> float:
        """The sum of a scalar over all processes, the same in each."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value.item()

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """The first process runs the block while the others wait; then they run it, and find its files."""
        if not self.first:
            dist.barrier()
        yield
        if self.first and self.size > 1:
            dist.barrier()


# The other processes wait while the first one trains a tokenizer, tokenises the text, and evaluates at the end. torch
# gives up after 30 minutes, over nccl after 10; the paper's text takes longer.
PATIENCE = timedelta(hours=12)

ALONE = Ranks(torch.device("cpu"))


@contextmanager
def join(device: str) -> Iterator[Ranks]:
    """The group that torchrun started this process in, or a group of one.

    `device` is auto, cpu or cuda. Processes talk over gloo on the CPU and over nccl on CUDA, where each takes the
    device of its number on its machine. Raises TrainError where CUDA is asked for and is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainError("--device cuda: torch sees no CUDA device here")
    if not dist.is_torchelastic_launched():
        yield Ranks(torch.device(device))
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        place = torch.device(device, dist.get_node_local_rank()) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(place)
        yield Ranks(place, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()

"""The few things ranks tell each other: sums of counters.

A group of None means that this rank holds everything: nothing is sent.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def all_reduce_sum(counts: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sums int64 counters over the ranks of a group.

    Args:
        counts: Any shape, int64, on any device.
        group: The ranks; None leaves the counters as they are.

    Returns:
        The sums, on the CPU, the same on every rank.
    """
    if group is None:
        return counts.cpu()
    counts = counts.to(communication_device(group), copy=True)
    dist.all_reduce(counts, group=group)
    return counts.cpu()


def communication_device(group: ProcessGroup) -> torch.device:
    """Where a tensor must lie to be sent: under NCCL the GPU, even if the shards were offloaded."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")

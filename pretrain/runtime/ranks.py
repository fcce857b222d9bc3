"""What ranks tell each other outside of a step; alone, each of these does nothing."""

import torch.distributed as dist


def rank_and_world_size() -> tuple[int, int]:
    """(rank, ranks); (0, 1) where there is no process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(mine: dict) -> dict:
    """The union of all ranks' dictionaries."""
    _, ranks = rank_and_world_size()
    if ranks == 1:
        return mine
    parts: list[dict] = [{}] * ranks
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def barrier() -> None:
    """Wait for all ranks."""
    if rank_and_world_size()[1] > 1:
        dist.barrier()

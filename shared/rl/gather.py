"""What all processes have, where there are several."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gather(value: Any) -> list[Any]:
    """The value of each process, in the order of ranks; a list of one where there is one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values

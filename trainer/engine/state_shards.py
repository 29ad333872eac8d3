"""State shards: which part of which tensor of the training state this rank holds, at any ZeRO stage.

The shards of all ranks together are the whole state, in one form for any number of ranks and any stage:
checkpoints consist of them. DeepSpeed's own conversion is not used: between stages 2 and 3 it fails, and from
3 to 3 it exchanges parameter groups without an error (0.19.8).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainer.engine.deepspeed_private import base_optimizer, find_master_part

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StateShard:
    """A contiguous part of one tensor of the training state."""

    key: str
    """`weight/`, `exp_avg/`, `exp_avg_sq/`, `average/` (the EMA) or `buffer/`, and the name in the model."""
    start: int
    """The first element's index in the flattened tensor."""
    values: Tensor
    """1-D view of the tensor in use: writing there changes the state."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    replicated: bool
    """Whether all ranks hold this same shard."""

    @property
    def count(self) -> int:
        return self.values.numel()


def find_state_shards(deepspeed: Any, stage: int) -> list[StateShard]:
    """All shards of weights, moments and buffers that this rank holds; creates missing moments as zeros."""
    found = []
    for name, parameter in deepspeed.module.named_parameters():
        part = find_master_part(deepspeed, stage, parameter)
        if part is None or part.count == 0:
            continue
        tensors = {"weight": part.tensor}
        if part.optimiser is not None:
            state = _state(part.optimiser, part.tensor)
            tensors |= {moment: state[moment] for moment in MOMENTS}
        for kind, tensor in tensors.items():
            values = tensor.detach().view(-1).narrow(0, part.offset, part.count)
            found.append(StateShard(f"{kind}/{name}", part.start, values, part.shape, part.replicated))
    for name, buffer in deepspeed.module.named_buffers():
        found.append(StateShard(f"buffer/{name}", 0, buffer.detach().view(-1), tuple(buffer.shape), True))
    return found


def owned_shards(shards: list[StateShard], rank: int, world_size: int) -> list[StateShard]:
    """What a rank saves: the shards that only it holds, and its part of those that all hold."""
    own = [shard for shard in shards if not shard.replicated]
    total = sum(shard.count for shard in shards if shard.replicated)
    # Cut as one long tensor: into one part per rank, not each tensor into parts for all ranks.
    first, last = rank * total // world_size, (rank + 1) * total // world_size
    position = 0
    for shard in shards:
        if not shard.replicated:
            continue
        begin, end = max(first - position, 0), min(last - position, shard.count)
        if begin < end:
            part = shard.values.narrow(0, begin, end - begin)
            own.append(replace(shard, start=shard.start + begin, values=part))
        position += shard.count
    return own


def set_update_count(deepspeed: Any, count: int) -> None:
    """Set AdamW's step count, on which its bias correction depends."""
    for state in base_optimizer(deepspeed).state.values():
        state["step"].fill_(count)


def _state(optimiser: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor; created as AdamW does in its first step, where that has not run."""
    state = optimiser.state[tensor]
    if not state:
        device = tensor.device if optimiser.defaults.get("fused") else None
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return state

"""The training state in pieces: which part of which tensor this rank holds, whatever the ZeRO stage.

A piece is a contiguous part of one parameter's weight, moment or average, or of a buffer, under the name that
it has in the model. The pieces of all ranks make up the whole state, which therefore has one form for any
number of ranks and any stage: that is what checkpoints are made of. DeepSpeed's own conversion is not used:
between stages 2 and 3 it fails, and from 3 to 3 it mixes up parameter groups without a word (0.19.8).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StateShard:
    """A part of one tensor of the training state.

    key: `weight/`, `exp_avg/`, `exp_avg_sq/`, `average/` or `buffer/`, and the name in the model. start: the
    first element's number in the flattened tensor. values: 1-D view of what is in use: writing there changes
    the state. shape: of the whole tensor. replicated: every rank holds this same piece.
    """

    key: str
    start: int
    values: Tensor
    shape: tuple[int, ...]
    replicated: bool

    @property
    def count(self) -> int:
        return self.values.numel()


def find_state_shards(deepspeed: Any, stage: int) -> list[StateShard]:
    """All pieces of weights, moments and buffers that this rank holds; moments not there yet are made, of
    zeros.
    """
    found = list(_parameter_pieces(deepspeed, stage))
    for name, buffer in deepspeed.module.named_buffers():
        found.append(StateShard(f"buffer/{name}", 0, buffer.detach().view(-1), tuple(buffer.shape), True))
    return found


def owned_shards(pieces: list[StateShard], rank: int, world_size: int) -> list[StateShard]:
    """What each rank answers for: its own pieces, and its part of those that all hold."""
    own = [piece for piece in pieces if not piece.replicated]
    total = sum(piece.count for piece in pieces if piece.replicated)
    # Cut as if they were one long tensor: each is cut where a rank's part ends, not once for every rank.
    first, last = rank * total // world_size, (rank + 1) * total // world_size
    position = 0
    for piece in pieces:
        if not piece.replicated:
            continue
        begin, end = max(first - position, 0), min(last - position, piece.count)
        if begin < end:
            part = piece.values.narrow(0, begin, end - begin)
            own.append(replace(piece, start=piece.start + begin, values=part))
        position += piece.count
    return own


def set_update_count(deepspeed: Any, count: int) -> None:
    for state in deepspeed.basic_optimizer.state.values():
        state["step"].fill_(count)


def sync_model_weights(deepspeed: Any, stage: int) -> None:
    """Make the model's weights those that were written into the pieces. Collective."""
    optimiser = deepspeed.optimizer
    if stage == 3:
        optimiser._partition_all_parameters()
        for group in range(len(optimiser.fp16_groups)):
            optimiser._reassign_or_swap_out_partitioned_parameters(group)
        optimiser._post_step(set())  # small parameters stay gathered: gathers them anew
    elif hasattr(optimiser, "update_lp_params"):
        optimiser.update_lp_params()


def _parameter_pieces(deepspeed: Any, stage: int) -> Iterator[StateShard]:
    optimiser = deepspeed.optimizer
    for name, parameter in deepspeed.module.named_parameters():
        if stage == 3:
            start, shape, tensors = _partitioned(optimiser, parameter)
            replicated = False
        elif hasattr(optimiser, "update_lp_params") and parameter.requires_grad:
            start, shape, tensors = _fragment(optimiser, parameter)
            replicated = False
        else:
            start, shape, tensors = 0, tuple(parameter.shape), _whole(deepspeed.basic_optimizer, parameter)
            replicated = True
        for kind, values in tensors.items():
            if values.numel():
                yield StateShard(f"{kind}/{name}", start, values.detach(), shape, replicated)


def _whole(optimiser: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Nothing is partitioned, or the parameter is frozen."""
    tensors = {"weight": parameter.data.view(-1)}
    if parameter.requires_grad:
        state = _state(optimiser, parameter)
        tensors |= {moment: state[moment].view(-1) for moment in MOMENTS}
    return tensors


def _fragment(optimiser: Any, parameter: nn.Parameter) -> tuple[int, tuple[int, ...], dict[str, Tensor]]:
    """Stages 1 and 2, and bf16 without a stage: each group is one flat tensor, cut into equal partitions."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    shape = tuple(parameter.shape)
    if mapping is None:  # it lies in other ranks' partitions
        return 0, shape, {}
    partitions = getattr(optimiser, "single_partition_of_fp32_groups", None)
    partitions = optimiser.fp32_groups_flat_partition if partitions is None else partitions
    flat = partitions[mapping.param_group_index]
    state = _state(optimiser.optimizer, flat)
    address = mapping.hp_fragment_address
    tensors = {"weight": flat, **{moment: state[moment] for moment in MOMENTS}}
    return (
        mapping.lp_fragment_address.start,
        shape,
        {kind: tensor.narrow(0, address.start, address.numel) for kind, tensor in tensors.items()},
    )


def _partitioned(optimiser: Any, parameter: Any) -> tuple[int, tuple[int, ...], dict[str, Tensor]]:
    """Stage 3: each parameter is cut into a part per rank, all equally long, the last ones padded."""
    shape = tuple(parameter.ds_shape)
    size = parameter.partition_numel()
    start = optimiser._get_param_partition_rank(parameter) * size
    if not parameter.requires_grad:
        tensors = {"weight": parameter.ds_tensor.data.view(-1)}
    else:
        group, offset, size = optimiser.grad_position[optimiser.get_param_id(parameter)]
        flat = optimiser.fp32_partitioned_groups_flat[group]
        state = _state(optimiser.optimizer, flat)
        tensors = {"weight": flat, **{moment: state[moment] for moment in MOMENTS}}
        tensors = {kind: tensor.narrow(0, offset, size) for kind, tensor in tensors.items()}
    count = max(0, min(size, parameter.ds_numel - start))
    return start, shape, {kind: tensor.narrow(0, 0, count) for kind, tensor in tensors.items()}


def _state(optimiser: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor as AdamW makes it in its first step, if that has not been."""
    state = optimiser.state[tensor]
    if not state:
        device = tensor.device if optimiser.defaults.get("fused") else None
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return state

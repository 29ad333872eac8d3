"""What a model costs, from its config alone: parameters, multiply-accumulates, FLOP and bytes.

No weights are allocated. Multiply-accumulates are those of the equations as the paper writes them, so that
they can be compared with its tables; the cross attention here computes fewer (see `CrossAttention`).
"""

import dataclasses

import torch

from models.config import UniFormerV2Config
from models.uniformerv2 import UniFormerV2


def parameter_count(config: UniFormerV2Config) -> int:
    """Number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in _without_storage(config).parameters())


def trainable_parameter_count(config: UniFormerV2Config) -> int:
    """Number of parameters that take a gradient."""
    parameters = _without_storage(config).parameters()
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def multiply_accumulates(config: UniFormerV2Config) -> int:
    """Multiply-accumulates of one view, what the paper's tables call FLOPs.

    Matrix products and convolutions count; norms, activations, softmax and additions do not.
    """
    blocks = config.depth * _block(config)
    return _patch_embedding(config) + blocks + _fusion(config) + config.width * config.num_classes


def train_step_flops(config: UniFormerV2Config, recomputed_blocks: int | None = None) -> int:
    """Floating-point operations of one clip's forward and backward; an accumulate of a product is two.

    The backward costs twice the forward, and each of `recomputed_blocks` (by default those of the config) is
    computed once more. A frozen backbone has no backward and recomputes nothing. These are the operations of
    the model as the paper defines it: divide by the time and the peak rate of a device for its utilisation.
    """
    if config.frozen_backbone:
        return 2 * (multiply_accumulates(config) + 2 * (_fusion(config) + config.width * config.num_classes))
    recomputed = _recomputed(config, recomputed_blocks)
    return 2 * (3 * multiply_accumulates(config) + recomputed * _block(config))


def activation_bytes(
    config: UniFormerV2Config,
    *,
    batch: int,
    bytes_per_element: int = 2,
    recomputed_blocks: int | None = None,
) -> int:
    """Estimate of the bytes that the forward of `batch` clips keeps for the backward.

    Counts the tensors that autograd saves, plus one block's worth where blocks are recomputed. Weights,
    gradients, optimizer state and the allocator's overhead come on top. Attention is taken to be memory
    efficient: its L x L affinities are not stored. Within 15% of what autograd reports for the tiny model.
    """
    recomputed = _recomputed(config, recomputed_blocks)
    tokens = config.inner_frames * _tokens_per_frame(config)
    features = tokens * config.width
    elements = len(config.global_layers) * _saved_by_global_block(config)
    scaled_mlps = len(config.global_layers)
    if not config.frozen_backbone:
        patch_input = config.inner_frames * config.grid**2 * 3 * _patch_volume(config)
        kept = config.depth - recomputed
        elements += patch_input + 2 * features  # the gathered patches, the input and output of ln_pre
        elements += kept * _saved_by_block(config) + recomputed * features
        elements += _saved_by_block(config) if recomputed else 0
        scaled_mlps += kept if config.activation == "quick_gelu" else 0
    scaled_weights = scaled_mlps * 2 * config.width * config.mlp_width  # see ScaledLinear
    return (batch * elements + scaled_weights) * bytes_per_element


def _without_storage(config: UniFormerV2Config) -> UniFormerV2:
    with torch.device("meta"):
        return UniFormerV2(config)


def _recomputed(config: UniFormerV2Config, asked: int | None) -> int:
    """The asked number of recomputed blocks, checked as the config's own would be."""
    if asked is None:
        return config.recomputed_blocks
    return dataclasses.replace(config, recomputed_blocks=asked).recomputed_blocks


def _tokens_per_frame(config: UniFormerV2Config) -> int:
    return 1 + config.grid**2


def _patch_volume(config: UniFormerV2Config) -> int:
    taps, rows, columns = config.patch_kernel
    return taps * rows * columns


def _patch_embedding(config: UniFormerV2Config) -> int:
    return config.inner_frames * config.grid**2 * config.width * 3 * _patch_volume(config)


def _block(config: UniFormerV2Config) -> int:
    """Multiply-accumulates of one Local UniBlock on a whole clip."""
    width, tokens = config.width, _tokens_per_frame(config)
    attention = tokens * 4 * width**2 + 2 * tokens**2 * width
    mlp = tokens * 2 * width * config.mlp_width
    local = config.grid**2 * config.local_width * (2 * width + 3)
    return config.inner_frames * (attention + mlp + config.local_mhra * local)


def _fusion(config: UniFormerV2Config) -> int:
    """Multiply-accumulates of all Global UniBlocks and of what joins them."""
    width = config.width
    patches = config.inner_frames * config.grid**2
    stages = range(len(config.global_layers))
    total = 0
    for stage in stages:
        queries = stage + 1 if config.fusion == "hierarchical_q" else 1
        context = 1 if config.fusion == "hierarchical_kv" and stage else 0
        tokens = patches + config.inner_frames + context
        position = 27 * patches * width
        keys_and_values = 2 * tokens * width**2
        attention = queries * (2 * width**2 + 2 * tokens * width)
        mlp = queries * 2 * width * config.mlp_width
        total += position + keys_and_values + attention + mlp
    joined = len(stages) * width**2 if config.fusion == "parallel" else 0
    return total + joined


def _saved_by_block(config: UniFormerV2Config) -> int:
    """Elements that one block keeps for the backward of one clip.

    Per token: both norms' inputs and outputs (4 C), queries, keys and values (3 C), the attention's output
    (C), and the MLP before and after its activation. Per patch and local MHRA: the batch norm's input and
    output (2 C) and the reduced tensor before and after the convolution (2 r).
    """
    tokens, patches = _tokens_per_frame(config), config.grid**2
    per_frame = tokens * (8 * config.width + 2 * config.mlp_width)
    per_frame += config.local_mhra * patches * 2 * (config.width + config.local_width)
    return config.inner_frames * per_frame


def _saved_by_global_block(config: UniFormerV2Config) -> int:
    """Elements that one global block keeps: the DPE's input, the norm's input and output, affinities."""
    tokens = config.inner_frames * _tokens_per_frame(config)
    return tokens * (3 * config.width + config.global_heads)

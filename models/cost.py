"""Cost of a model from its config: parameters, multiply-accumulates, FLOP and bytes.

No weights are allocated. Multiply-accumulates are those of the paper's equations, so that they compare with
its tables; `CrossAttention` computes fewer.
"""

import dataclasses
from functools import lru_cache

import torch

from models.config import UniFormerV2Config
from models.uniformerv2 import UniFormerV2


def parameter_count(config: UniFormerV2Config) -> int:
    """Number of parameters, frozen ones included."""
    return _counts(config)[0]


def trainable_parameter_count(config: UniFormerV2Config) -> int:
    """Number of parameters with a gradient."""
    return _counts(config)[1]


def multiply_accumulates(config: UniFormerV2Config) -> int:
    """Multiply-accumulates of one view, which the paper's tables call FLOPs.

    Matrix products and convolutions count; norms, activations, softmax and additions do not.
    """
    blocks = config.depth * _block(config)
    return _patch_embedding(config) + blocks + _fusion(config) + config.width * config.num_classes


def train_step_flops(config: UniFormerV2Config, recomputed_blocks: int | None = None) -> int:
    """Floating-point operations of one clip's forward and backward, two per multiply-accumulate.

    The backward costs twice the forward, and each of `recomputed_blocks` (default: the config's) another
    forward. A frozen backbone has no backward and recomputes nothing. These are the operations of the
    paper's model: divide by the time and the peak rate of a device for its MFU.
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
    autocast: bool = False,
    recomputed_blocks: int | None = None,
) -> int:
    """Estimated bytes that the forward of `batch` clips keeps for the backward.

    Counts the tensors that autograd saves, including those of one block that is computed again, but no
    weights, gradients, optimiser state or allocator overhead. Attention is assumed to be memory efficient,
    without stored L x L affinities. Within 3% of autograd's bytes for small models, with recomputation and
    autocast; a fifth too low for a frozen backbone under autocast.

    Args:
        batch: clips in one forward.
        bytes_per_element: of the operands of matrix products.
        autocast: whether the weights and the tokens between blocks are float32; then copies of the weights
        count too. recomputed_blocks: default: the config's.
    """
    residual = 4 if autocast else bytes_per_element
    features = config.inner_frames * _tokens_per_frame(config) * config.width
    # In a global block, the inputs of the DPE and the norm have the dtype between blocks.
    wide = 2 * features * (residual - bytes_per_element)
    scaled = 2 * config.width * config.global_mlp_width  # copies that `ScaledLinear` keeps
    weights = scaled + (4 * config.width**2 if autocast else 0)
    stage = batch * (_saved_by_global_block(config) * bytes_per_element + wide) + weights * bytes_per_element
    fusion = len(config.global_layers) * stage
    if config.frozen_backbone:
        return fusion
    recomputed = _recomputed(config, recomputed_blocks)
    patch_input = config.inner_frames * config.grid**2 * 3 * _patch_volume(config) * bytes_per_element
    # The patches, the input and output of ln_pre, the inputs of recomputed blocks.
    inputs = batch * (patch_input + (2 + recomputed) * features * residual)
    scaled = _scaled_by_mlp(config) if config.activation == "quick_gelu" else 0
    weights = _weights_of_block(config) if autocast else scaled
    weights += _position_biases(config)
    block = batch * _saved_by_block(config, bytes_per_element, residual) + weights * bytes_per_element
    # Recomputed blocks come first, so when the backward reaches them, all other activations are freed.
    kept = fusion + (config.depth - recomputed) * block
    return inputs + max(kept, block if recomputed else 0)


def backward_bytes(
    config: UniFormerV2Config, *, batch: int, bytes_per_element: int = 2, autocast: bool = False
) -> int:
    """Estimated peak bytes of the gradients inside one block, in addition to `activation_bytes`.

    Equal to the activations of that block. In measurements on small models, the sum is 2% too low to 12%
    too high for the peak, and up to 45% too high if all blocks are recomputed. Arguments as in
    `activation_bytes`.
    """
    residual = 4 if autocast else bytes_per_element
    if config.frozen_backbone:
        return batch * _saved_by_global_block(config) * residual
    return batch * _saved_by_block(config, bytes_per_element, residual)


def inference_bytes(
    config: UniFormerV2Config, *, batch: int, bytes_per_element: int = 2, autocast: bool = False
) -> int:
    """Estimated peak bytes of the forward of `batch` clips without gradients.

    The inputs of the global blocks, and the activations of one block: up to twice too high for small
    models, a quarter too low for a frozen backbone under autocast. Arguments as in `activation_bytes`.
    """
    residual = 4 if autocast else bytes_per_element
    features = config.inner_frames * _tokens_per_frame(config) * config.width * residual
    block = _saved_by_block(config, bytes_per_element, residual)
    # Autocast keeps copies of trainable weights to the end of the forward.
    copies = config.depth * 4 * config.width**2 if autocast and not config.frozen_backbone else 0
    return batch * ((len(config.global_layers) + 1) * features + block) + copies * bytes_per_element


@lru_cache(maxsize=16)
def _counts(config: UniFormerV2Config) -> tuple[int, int]:
    """Numbers of parameters and of trainable ones; cached, as a large model takes a tenth of a second."""
    with torch.device("meta"):
        parameters = list(UniFormerV2(config).parameters())
    counts = [(parameter.numel(), parameter.numel() * parameter.requires_grad) for parameter in parameters]
    return sum(count for count, _ in counts), sum(trained for _, trained in counts)


def _recomputed(config: UniFormerV2Config, asked: int | None) -> int:
    """`asked`, checked as a field of the config; None is the config's own value."""
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
    """Multiply-accumulates of all Global UniBlocks and of their fusion."""
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
        mlp = queries * 2 * width * config.global_mlp_width
        total += position + keys_and_values + attention + mlp
    joined = len(stages) * width**2 if config.fusion == "parallel" else 0
    return total + joined


def _scaled_by_mlp(config: UniFormerV2Config) -> int:
    """Weights of an MLP with QuickGELU, of which `ScaledLinear` keeps scaled copies."""
    return 2 * config.width * config.mlp_width


def _position_biases(config: UniFormerV2Config) -> int:
    """Elements of one block's biases of relative positions; all frames of a batch share them."""
    return config.heads * _tokens_per_frame(config) ** 2 if config.relative_positions else 0


def _weights_of_block(config: UniFormerV2Config) -> int:
    """Weights of the matrix products of one block."""
    local = config.local_mhra * 2 * config.width * config.local_width
    return 4 * config.width**2 + _scaled_by_mlp(config) + local


def _saved_by_block(config: UniFormerV2Config, bytes_per_element: int, residual: int) -> int:
    """Bytes that one block keeps for the backward of one clip.

    residual: bytes per element of the tokens between blocks.

    Per token: the inputs (2 C, residual) and outputs (2 C) of both norms, queries, keys and values (3 C), the
    attention's output (C), and the MLP before and after its activation. Per patch and local MHRA: the batch
    norm's input (C, residual) and output (C) and the reduced tensor before and after the convolution (2 r).
    """
    tokens, patches, width = _tokens_per_frame(config), config.local_mhra * config.grid**2, config.width
    scaled = 0 if config.layer_scale is None else 2 * width  # the inputs of both layer scales
    multiplied = tokens * (6 * width + scaled + 2 * config.mlp_width)
    multiplied += patches * (width + 2 * config.local_width)
    stream = (2 * tokens + patches) * width
    return config.inner_frames * (multiplied * bytes_per_element + stream * residual)


def _saved_by_global_block(config: UniFormerV2Config) -> int:
    """Elements that one global block keeps: input of the DPE, input and output of the norm, affinities."""
    tokens = config.inner_frames * _tokens_per_frame(config)
    return tokens * (3 * config.width + config.global_heads)

"""What a model costs, from its config alone: parameters, multiply-accumulates, FLOP and bytes.

No weights are allocated. Multiply-accumulates are those of the equations as the paper writes them, so that
they can be compared with its tables; the cross attention here computes fewer (see `CrossAttention`).
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
    """Number of parameters that take a gradient."""
    return _counts(config)[1]


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
    autocast: bool = False,
    recomputed_blocks: int | None = None,
) -> int:
    """Estimate of the bytes that the forward of `batch` clips keeps for the backward.

    Counts the tensors that autograd saves, with those of a block that is computed again. Weights, gradients,
    optimizer state and the allocator's overhead come on top. Attention is taken to be memory efficient: its
    L x L affinities are not stored. Within 3% of what autograd keeps for small models, recomputation and
    autocast included; a frozen backbone under autocast is told a fifth too low.

    Args:
        batch: clips in one forward.
        bytes_per_element: of what is multiplied.
        autocast: whether the weights, and what is passed on from block to block, are float32 nevertheless;
            then copies of the weights are kept, too.
        recomputed_blocks: by default those of the config.
    """
    passed_on = 4 if autocast else bytes_per_element
    features = config.inner_frames * _tokens_per_frame(config) * config.width
    # Of what a global block keeps, the DPE's and the norm's inputs were passed on.
    wide = 2 * features * (passed_on - bytes_per_element)
    weights = _scaled_by_mlp(config) + (4 * config.width**2 if autocast else 0)
    stage = batch * (_saved_by_global_block(config) * bytes_per_element + wide) + weights * bytes_per_element
    fusion = len(config.global_layers) * stage
    if config.frozen_backbone:
        return fusion
    recomputed = _recomputed(config, recomputed_blocks)
    patch_input = config.inner_frames * config.grid**2 * 3 * _patch_volume(config) * bytes_per_element
    # The gathered patches, the input and the output of ln_pre, the inputs of recomputed blocks.
    inputs = batch * (patch_input + (2 + recomputed) * features * passed_on)
    scaled = _scaled_by_mlp(config) if config.activation == "quick_gelu" else 0
    weights = _weights_of_block(config) if autocast else scaled
    block = batch * _saved_by_block(config, bytes_per_element, passed_on) + weights * bytes_per_element
    # Recomputed blocks are the first: when the backward comes to them, all that was kept is gone.
    kept = fusion + (config.depth - recomputed) * block
    return inputs + max(kept, block if recomputed else 0)


def backward_bytes(
    config: UniFormerV2Config, *, batch: int, bytes_per_element: int = 2, autocast: bool = False
) -> int:
    """The most that gradients take on their way through one block, beside what the forward kept.

    As much as that block kept. By measurement on small models, the forward's activations and this together
    are 2% too low to 12% too high for the peak, and up to 45% too high where all blocks are recomputed.
    Arguments as of `activation_bytes`.
    """
    passed_on = 4 if autocast else bytes_per_element
    if config.frozen_backbone:
        return batch * _saved_by_global_block(config) * passed_on
    return batch * _saved_by_block(config, bytes_per_element, passed_on)


def inference_bytes(
    config: UniFormerV2Config, *, batch: int, bytes_per_element: int = 2, autocast: bool = False
) -> int:
    """The most that the forward of `batch` clips takes where no gradient is wanted.

    The tokens that the global blocks will see, and as much as one block would keep for a backward: up to
    twice too much for small models, and a quarter too little for a frozen backbone under autocast. Arguments
    as of `activation_bytes`.
    """
    passed_on = 4 if autocast else bytes_per_element
    features = config.inner_frames * _tokens_per_frame(config) * config.width * passed_on
    block = _saved_by_block(config, bytes_per_element, passed_on)
    # Autocast keeps its copies of weights that could take a gradient to the end of the forward.
    copies = config.depth * 4 * config.width**2 if autocast and not config.frozen_backbone else 0
    return batch * ((len(config.global_layers) + 1) * features + block) + copies * bytes_per_element


@lru_cache(maxsize=16)
def _counts(config: UniFormerV2Config) -> tuple[int, int]:
    """Parameters, and of these the trainable ones; a large model takes a tenth of a second to lay out."""
    with torch.device("meta"):
        parameters = list(UniFormerV2(config).parameters())
    counts = [(parameter.numel(), parameter.numel() * parameter.requires_grad) for parameter in parameters]
    return sum(count for count, _ in counts), sum(trained for _, trained in counts)


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


def _scaled_by_mlp(config: UniFormerV2Config) -> int:
    """Weights of an MLP with QuickGELU, of which scaled copies are kept; see `ScaledLinear`."""
    return 2 * config.width * config.mlp_width


def _weights_of_block(config: UniFormerV2Config) -> int:
    """Weights of one block that are multiplied with."""
    local = config.local_mhra * 2 * config.width * config.local_width
    return 4 * config.width**2 + _scaled_by_mlp(config) + local


def _saved_by_block(config: UniFormerV2Config, bytes_per_element: int, passed_on: int) -> int:
    """Bytes that one block keeps for the backward of one clip.

    passed_on: bytes of an element of what goes from block to block.

    Per token: both norms' inputs (2 C, passed on) and outputs (2 C), queries, keys and values (3 C), the
    attention's output (C), and the MLP before and after its activation. Per patch and local MHRA: the batch
    norm's input (C, passed on) and output (C) and the reduced tensor before and after the convolution (2 r).
    """
    tokens, patches, width = _tokens_per_frame(config), config.local_mhra * config.grid**2, config.width
    multiplied = tokens * (6 * width + 2 * config.mlp_width) + patches * (width + 2 * config.local_width)
    stream = (2 * tokens + patches) * width
    return config.inner_frames * (multiplied * bytes_per_element + stream * passed_on)


def _saved_by_global_block(config: UniFormerV2Config) -> int:
    """Elements that one global block keeps: the DPE's input, the norm's input and output, affinities."""
    tokens = config.inner_frames * _tokens_per_frame(config)
    return tokens * (3 * config.width + config.global_heads)

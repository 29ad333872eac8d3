"""Cost of a model from its config: parameters, multiply-accumulates, FLOP and bytes.

No weights are allocated. Multiply-accumulates are those of the paper's equations, so that they compare with
its tables; `CrossAttention` computes fewer.
"""

import dataclasses
from functools import lru_cache

import torch

from models.config import UniFormerV2Config
from models.temporal_modules import TRANSFORMER_LAYERS
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
    backbone = _patch_embedding(config) + _blocks(config, config.depth) + _temporal_transformer(config)
    return backbone + _fusion(config) + config.width * config.num_classes


def train_step_flops(config: UniFormerV2Config, recomputed_blocks: int | None = None) -> int:
    """Floating-point operations of one clip's forward and backward, two per multiply-accumulate.

    The backward costs twice the forward, and each of `recomputed_blocks` (default: the config's) another
    forward. A frozen backbone has no backward and recomputes nothing. These are the operations of the
    paper's model: divide by the time and the peak rate of a device for its MFU.
    """
    if config.frozen_backbone:
        return 2 * (multiply_accumulates(config) + 2 * (_fusion(config) + config.width * config.num_classes))
    recomputed = _recomputed(config, recomputed_blocks)
    return 2 * (3 * multiply_accumulates(config) + _blocks(config, recomputed))


def activation_bytes(
    config: UniFormerV2Config,
    *,
    batch: int,
    bytes_per_element: int = 2,
    autocast: bool = False,
    recomputed_blocks: int | None = None,
    on_cpu: bool = False,
    compiled: bool = False,
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
        count too. recomputed_blocks: default: the config's. on_cpu: whether all blocks compute the inputs of
        linear layers again; on a GPU those do that follow recomputed blocks. compiled: whether it is
        `torch.compile` that decides what is kept: then no inputs are taken to be computed again.
    """
    residual = 4 if autocast else bytes_per_element
    features = _tokens(config) * config.width
    # In a global block, the inputs of the DPE and the norm have the dtype between blocks.
    wide = 2 * features * (residual - bytes_per_element)
    # On a GPU, autograd keeps the scaled weights of `ScaledLinear`.
    scaled = 0 if on_cpu and not autocast and not compiled else 2 * config.width * config.global_mlp_width
    weights = scaled + (4 * config.width**2 if autocast else 0)
    stage = batch * (_saved_by_global_block(config) * bytes_per_element + wide) + weights * bytes_per_element
    fusion = len(config.global_layers) * stage
    if config.frozen_backbone:
        return fusion
    recomputed = _recomputed(config, recomputed_blocks)
    patch_input = config.inner_frames * config.grid**2 * 3 * _patch_volume(config) * bytes_per_element
    # The patches, the input and output of ln_pre, the inputs of recomputed blocks.
    inputs = batch * (patch_input + (2 + recomputed) * features * residual)
    blocks = []
    for layer in range(config.depth):
        again = not compiled and _recomputes_inputs(layer, recomputed, on_cpu)
        scaled = 0 if again or config.activation != "quick_gelu" else 2 * config.width * config.mlp_width
        weights = _position_biases(config) + (_weights_of_block(config, layer) if autocast else scaled)
        saved = _saved_by_block(
            config, layer, bytes_per_element, residual, recomputes_inputs=again, on_cpu=on_cpu
        )
        blocks.append(batch * saved + weights * bytes_per_element)
    # Recomputed blocks come first, so when the backward reaches them, all other activations are freed.
    kept = fusion + sum(blocks[recomputed:])
    return inputs + max(kept, *blocks[:recomputed], 0)


def backward_bytes(
    config: UniFormerV2Config,
    *,
    batch: int,
    bytes_per_element: int = 2,
    autocast: bool = False,
    recomputed_blocks: int | None = None,
    on_cpu: bool = False,
    compiled: bool = False,
) -> int:
    """Estimated peak bytes of the gradients inside one block, in addition to `activation_bytes`.

    Equal to the activations of that block. In measurements on small models on a CPU, the sum is 7 to 20% too
    high for the peak. Arguments as in `activation_bytes`.
    """
    residual = 4 if autocast else bytes_per_element
    if config.frozen_backbone:
        return batch * _saved_by_global_block(config) * residual
    recomputed = _recomputed(config, recomputed_blocks)
    blocks = (
        _saved_by_block(
            config,
            layer,
            bytes_per_element,
            residual,
            recomputes_inputs=not compiled and _recomputes_inputs(layer, recomputed, on_cpu),
            on_cpu=on_cpu,
        )
        for layer in range(config.depth)
    )
    return batch * max(blocks)


def inference_bytes(
    config: UniFormerV2Config, *, batch: int, bytes_per_element: int = 2, autocast: bool = False
) -> int:
    """Estimated peak bytes of the forward of `batch` clips without gradients.

    The inputs of the global blocks, and the activations of one block: up to twice too high for small
    models, a quarter too low for a frozen backbone under autocast. Arguments as in `activation_bytes`.
    """
    residual = 4 if autocast else bytes_per_element
    features = _tokens(config) * config.width * residual
    block = max(_saved_by_block(config, layer, bytes_per_element, residual) for layer in range(config.depth))
    # Autocast keeps copies of trainable weights to the end of the forward.
    copies = config.depth * 4 * config.width**2 if autocast and not config.frozen_backbone else 0
    return batch * ((len(config.global_layers) + 1) * features + block) + copies * bytes_per_element


def clips_per_forward(config: UniFormerV2Config, *, on_cpu: bool, bytes_per_element: int = 4) -> int:
    """Clips that a forward without gradients computes at once, at least 1: more are no faster.

    The largest tensor has at most 32 MiB on a CPU and 1 GiB on a GPU: the MLP's hidden layer, the queries,
    keys and values, or the pixels of the patches. glibc maps every larger allocation for itself, and the
    kernel clears its pages each time: docs/performance.md, "prediction and evaluation".
    """
    most = 2**25 if on_cpu else 2**30
    of_block = _tokens(config) * max(3 * config.width, config.mlp_width)
    pixels = _patches(config) * 3 * _patch_volume(config)
    return max(1, most // (max(of_block, pixels) * bytes_per_element))


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


def _tokens(config: UniFormerV2Config) -> int:
    """Tokens of a clip inside the ViT, class tokens included."""
    groups, size = config.attention_shape
    return groups * size


def _patches(config: UniFormerV2Config) -> int:
    """Patches of a clip."""
    return config.inner_frames * config.grid**2


def _patch_volume(config: UniFormerV2Config) -> int:
    taps, rows, columns = config.patch_kernel
    return taps * rows * columns


def _patch_embedding(config: UniFormerV2Config) -> int:
    return _patches(config) * config.width * 3 * _patch_volume(config)


def _blocks(config: UniFormerV2Config, count: int) -> int:
    """Multiply-accumulates of the first `count` Local UniBlocks on a whole clip."""
    return sum(_block(config, layer) for layer in range(count))


def _block(config: UniFormerV2Config, layer: int) -> int:
    width, tokens = config.width, _tokens(config)
    _, size = config.attention_shape
    attention = tokens * 4 * width**2 + 2 * tokens * size * width
    mlp = tokens * 2 * width * config.mlp_width
    return attention + mlp + (_local(config) if config.has_local(layer) else 0)


def _local(config: UniFormerV2Config) -> int:
    """Multiply-accumulates of the local MHRAs, or of the temporal module, of one block."""
    width, patches = config.width, _patches(config)
    bottleneck = config.local_width * (2 * width + 3)
    of_module = {
        "temporal_mhsa": 4 * width**2 + 2 * config.inner_frames * width,
        "temporal_convolution": 3 * width,
        "st_adapter": bottleneck,
    }
    position = 27 * width if config.local_dpe else 0
    per_patch = position + config.local_mhra * bottleneck + of_module.get(config.temporal_module, 0)
    return patches * per_patch


def _temporal_transformer(config: UniFormerV2Config) -> int:
    if config.temporal_module != "temporal_transformer":
        return 0
    width, frames = config.width, config.inner_frames
    layer = frames * (4 * width**2 + 2 * width * config.mlp_width + 2 * frames * width)
    return TRANSFORMER_LAYERS * layer


def _fusion(config: UniFormerV2Config) -> int:
    """Multiply-accumulates of all Global UniBlocks and of their fusion."""
    width = config.width
    stages = range(len(config.global_layers))
    total = 0
    for stage in stages:
        queries = config.global_queries * (stage + 1 if config.fusion == "hierarchical_q" else 1)
        context = config.global_queries if config.fusion == "hierarchical_kv" and stage else 0
        tokens = _tokens(config) + context
        position = 27 * _patches(config) * width if config.global_dpe else 0
        keys_and_values = 2 * tokens * width**2
        attention = queries * (2 * width**2 + 2 * tokens * width)
        mlp = queries * 2 * width * config.global_mlp_width
        total += position + keys_and_values + attention + mlp
    joined = config.global_queries * len(stages) * width**2 if config.fusion == "parallel" else 0
    return total + joined


def _position_biases(config: UniFormerV2Config) -> int:
    """Elements of one block's biases of relative positions; all frames of a batch share them."""
    return config.heads * config.attention_shape[1] ** 2 if config.relative_positions else 0


def _weights_of_block(config: UniFormerV2Config, layer: int) -> int:
    """Weights of the matrix products of one block."""
    local = 0
    if config.has_local(layer):
        bottlenecks = config.local_mhra + (config.temporal_module == "st_adapter")
        local = bottlenecks * 2 * config.width * config.local_width
        local += 4 * config.width**2 if config.temporal_module == "temporal_mhsa" else 0
    return 4 * config.width**2 + 2 * config.width * config.mlp_width + local


def _recomputes_inputs(layer: int, recomputed: int, on_cpu: bool) -> bool:
    """Whether a block computes the inputs of its linear layers again, if the first `recomputed` blocks are
    recomputed as a whole; see `LocalUniBlock`."""
    return on_cpu or 0 < recomputed <= layer


def _saved_by_block(
    config: UniFormerV2Config,
    layer: int,
    bytes_per_element: int,
    residual: int,
    *,
    recomputes_inputs: bool = False,
    on_cpu: bool = False,
) -> int:
    """Bytes that one block keeps for the backward of one clip.

    residual: bytes per element of the tokens between blocks. recomputes_inputs: whether the outputs of norms
    and of the MLP's activation are not kept. on_cpu: whether no batch norm is a `SyncBatchNorm`.

    Per token: the inputs (2 C, residual) and outputs (2 C) of both norms, queries, keys and values (3 C), the
    attention's output (C), and the MLP before and after its activation. Per patch, what `_saved_by_local`
    counts.
    """
    tokens, width = _tokens(config), config.width
    scaled = 0 if config.layer_scale is None else 2 * width  # the inputs of both layer scales
    inputs = 0 if recomputes_inputs else 2 * width + config.mlp_width
    multiplied = tokens * (4 * width + scaled + config.mlp_width + inputs)
    stream = 2 * tokens * width
    if config.has_local(layer):
        of_products, of_stream = _saved_by_local(config, recomputes_inputs, on_cpu)
        multiplied += _patches(config) * of_products
        stream += _patches(config) * of_stream
    return multiplied * bytes_per_element + stream * residual


def _saved_by_local(config: UniFormerV2Config, recomputes_inputs: bool, on_cpu: bool) -> tuple[int, int]:
    """Elements per patch that the local parts of a block keep, of products and of the tokens between blocks.

    A local MHRA: the batch norm's input (C, stream) and output (C), and the reduced tensor before and after
    the convolution (2 r). Where inputs are computed again, neither the output of the convolution nor, on a
    CPU, that of the batch norm; on a GPU it may be a `SyncBatchNorm`, whose output is kept.
    """
    width, reduced = config.width, config.local_width
    of_module = {
        "temporal_mhsa": (6 * width, width),  # the norm, queries, keys, values, the attention's output
        "temporal_convolution": (width, width),  # the norm
        "st_adapter": (width + 3 * reduced, 0),  # input; reduced, before and after GELU
    }
    products, stream = of_module.get(config.temporal_module, (0, 0))
    of_mhra = width + 2 * reduced
    if recomputes_inputs:
        of_mhra = reduced if on_cpu else width + reduced
    products += config.local_mhra * of_mhra
    stream += (config.local_mhra + config.local_dpe) * width
    return products, stream


def _saved_by_global_block(config: UniFormerV2Config) -> int:
    """Elements that one global block keeps: input of the DPE, input and output of the norm, affinities."""
    width = config.width
    return _tokens(config) * (
        (3 if config.global_dpe else 2) * width + config.global_queries * config.global_heads
    )

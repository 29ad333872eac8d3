"""The kernels of a training step, from a run on PyTorch's meta device: FLOPs and bytes of each, no numbers.

Every operation that PyTorch dispatches is a kernel, except those that only give a view. Attention is taken
for fused attention. Compiled, connected operations between two matrix products, attentions or convolutions
are one kernel: elementwise ones, norms, reductions and copies. It reads what it needs from outside once, and
writes what others need.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from models import UniFormerV2, UniFormerV2Config
from models.local_block import LocalUniBlock, use_fp8

PRODUCTS, ATTENTION, CONVOLUTIONS = "matrix products", "attention", "depthwise convolutions"
FP8_PRODUCTS = "matrix products in FP8"
NORMS, COPIES, REDUCTIONS, ELEMENTWISE = "norms and softmax", "copies and casts", "sums", "elementwise"
FUSED = "fused elementwise, norms and copies"
OPTIMISER = "optimiser"
_ALONE = (PRODUCTS, FP8_PRODUCTS, ATTENTION, CONVOLUTIONS, OPTIMISER)
"""Kinds that the compiler leaves kernels of their own."""
_KINDS = {
    "_scaled_mm": FP8_PRODUCTS, "mm": PRODUCTS, "addmm": PRODUCTS, "bmm": PRODUCTS, "baddbmm": PRODUCTS,
    "_scaled_dot_product_flash_attention": ATTENTION,
    "_scaled_dot_product_flash_attention_backward": ATTENTION,
    "_scaled_dot_product_efficient_attention": ATTENTION,
    "_scaled_dot_product_efficient_attention_backward": ATTENTION,
    "convolution": CONVOLUTIONS, "convolution_backward": CONVOLUTIONS,
    "native_layer_norm": NORMS, "native_layer_norm_backward": NORMS,
    "native_batch_norm": NORMS, "native_batch_norm_backward": NORMS, "_native_batch_norm_legit": NORMS,
    "_batch_norm_with_update": NORMS, "batch_norm_backward": NORMS,
    "_softmax": NORMS, "_softmax_backward_data": NORMS,
    "_log_softmax": NORMS, "_log_softmax_backward_data": NORMS,
    "cat": COPIES, "clone": COPIES, "copy_": COPIES, "_to_copy": COPIES, "constant_pad_nd": COPIES,
    "slice_backward": COPIES, "select_backward": COPIES, "stack": COPIES, "fill_": COPIES, "zero_": COPIES,
    "sum": REDUCTIONS, "mean": REDUCTIONS, "add_": ELEMENTWISE,
}  # fmt: skip
_NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach")


@dataclass(frozen=True)
class Kernel:
    """One kernel, or several that are fused."""

    kind: str
    flops: int
    read: Mapping[int, int]
    """Bytes by storage."""
    written: Mapping[int, int]
    """The same."""

    @property
    def bytes(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())


FP8_FACTOR = 1979 / 989
"""The data sheet's rate of an H100's products in FP8, by that in bf16."""


@dataclass(frozen=True)
class Device:
    """What the kernels run on."""

    # Measured on one H100 80GB HBM3: docs/performance.md, "2026-11-26: the first GPU".
    flops: float = 782e12
    """FLOP per second of a bf16 product of 8,192 squared."""
    bandwidth: float = 2.98e12
    """Bytes per second, read and written, of a copy in its memory; 3.35e12 by the data sheet."""
    peak: float = 989e12
    """FLOP per second by the data sheet, of which MFU is a share."""
    least: float = 2e-6
    """Seconds of the shortest kernel; assumed, not measured."""
    launch: float = 10e-6
    """Seconds that the host takes to start a kernel, while the device computes; assumed, not measured."""
    fp8: float = 782e12 * FP8_FACTOR
    """FLOP per second of products in FP8; assumed, not measured."""

    def seconds(self, kernel: Kernel) -> float:
        """The time of a kernel: of its products or of its memory traffic, whichever takes longer."""
        rate = self.fp8 if kernel.kind == FP8_PRODUCTS else self.flops
        return max(kernel.flops / rate, kernel.bytes / self.bandwidth, self.least)


@dataclass(frozen=True)
class _Operation:
    """What an operation does with arguments of these shapes, so that the next such call need not run."""

    kind: str
    flops: int
    made: Any
    """Its new tensors, as a tree of shape, strides and dtype."""


_SEEN: dict[Any, _Operation] = {}
"""Operations with the shapes of their arguments."""


class KernelRecorder(TorchDispatchMode):
    """Records every operation as a `Kernel`.

    An operation whose arguments have shapes that were seen before is not run again: its results are empty
    tensors of the same shapes. PyTorch's meta device needs a millisecond for some operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self._storages: list[Any] = []  # kept, so that no address is used twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given: list[Tensor] = []
        signature: list[Any] = [func]
        _flatten((args, kwargs), given, signature)
        key = tuple(signature) if _makes_new_tensors(func) else None
        known = _SEEN.get(key)
        out = func(*args, **kwargs) if known is None else _empty(known.made)
        made = _tensors(out)
        for tensor in (*given, *made):
            self._storages.append(tensor.untyped_storage())
        changed = _changed(func, args, kwargs)
        sources = {_storage(tensor) for tensor in given}
        is_view = not changed and all(_storage(tensor) in sources for tensor in made)
        if func._overloadpacket.__name__ in _NO_KERNEL or not made or is_view:
            return out
        if known is None:
            kind = _KINDS.get(func._overloadpacket.__name__, ELEMENTWISE)
            known = _Operation(kind, _flops(func, args, kwargs, out), _shapes(out))
            if key is not None:
                _SEEN[key] = known
        self.kernels.append(Kernel(known.kind, known.flops, _bytes(given), _bytes([*made, *changed])))
        return out


@cache
def _makes_new_tensors(func: Any) -> bool:
    """Whether an operation changes no argument, and gives no view of one."""
    schema = func._schema
    return all(value.alias_info is None for value in (*schema.arguments, *schema.returns))


def _flatten(value: Any, tensors: list[Tensor], signature: list[Any]) -> None:
    """Appends the tensors of a call's arguments, and what its results' shapes depend on."""
    if isinstance(value, Tensor):
        tensors.append(value)
        signature.append((value.shape, value.stride(), value.dtype))
    elif isinstance(value, list | tuple):
        signature.append(len(value))
        for item in value:
            _flatten(item, tensors, signature)
    elif isinstance(value, dict):
        signature.append(tuple(value))
        for item in value.values():
            _flatten(item, tensors, signature)
    else:
        signature.append((type(value), value))  # 1 and 1.0 are equal, but promote types differently


def _shapes(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out.shape, out.stride(), out.dtype
    return [_shapes(item) for item in out] if isinstance(out, list | tuple) else out


def _empty(made: Any) -> Any:
    """Tensors as described by `_shapes`; as lists, where they were lists or tuples."""
    if isinstance(made, tuple):
        shape, strides, dtype = made
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    return [_empty(item) for item in made] if isinstance(made, list) else made


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """What PyTorch chooses on a GPU; on the meta device it would choose separate products."""
    if bias is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    bias = bias.expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]


def _flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    if func._overloadpacket is torch.ops.aten.convolution:
        return 2 * out.numel() * args[1][0].numel()
    if func._overloadpacket is torch.ops.aten.convolution_backward:
        # Of the input and of the weight. PyTorch's formula takes depthwise convolutions for full ones.
        return 2 * args[0].numel() * args[2][0].numel() * sum(args[10][:2])
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:
    """Positions and names of the arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return [(at, arg.name) for at, arg in arguments if arg.alias_info is not None and arg.alias_info.is_write]


def _changed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Arguments that the operation writes to."""
    found = []
    for number, name in _written_arguments(func):
        found += _tensors(args[number] if number < len(args) else kwargs.get(name))
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Bytes by storage; an expanded dimension is read once."""
    found: dict[int, int] = {}
    for tensor in tensors:
        size = tensor.element_size()
        for count, stride in zip(tensor.shape, tensor.stride(), strict=True):
            size *= count if stride else 1
        found[_storage(tensor)] = max(found.get(_storage(tensor), 0), size)
    return found


@dataclass(frozen=True)
class StepKernels:
    """The kernels of one micro-batch's forward and backward, in order, and of the update."""

    batch: int
    kernels: list[Kernel]
    update: list[Kernel]

    def fused(self) -> "StepKernels":
        """The same, compiled."""
        return StepKernels(self.batch, fuse(self.kernels), self.update)

    def seconds(self, device: Device, accumulation: int = 1) -> float:
        """Of one micro-batch, with its share of the update; at least what the host takes to start it."""
        own = max(sum(device.seconds(kernel) for kernel in self.kernels), device.launch * len(self.kernels))
        return own + sum(device.seconds(kernel) for kernel in self.update) / accumulation


def record_step(
    config: UniFormerV2Config,
    batch: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = False,
    ranks: int = 1,
    fp8: bool = False,
    on_cpu: bool = False,
) -> StepKernels:
    """The kernels of a training step in bf16 with master weights in float32, or in float32.

    Each micro-batch adds its gradient to the sum in float32. The update is that of one of `ranks`, which
    share the optimiser state. on_cpu: blocks compute the inputs of their linear layers again, as on a CPU.
    """
    with torch.device("meta"):
        model = UniFormerV2(config).to(dtype).train()
        side = config.resolution
        clips = torch.empty(batch, 3, config.frames, side, side, dtype=dtype)
        keys = torch.empty(batch, dtype=torch.int64)
        labels = torch.empty(batch, dtype=torch.int64)
    if fp8:
        use_fp8(model)
    if compiled or on_cpu:
        for block in model.blocks:
            assert isinstance(block, LocalUniBlock)
            block.recomputes_inputs = not compiled  # `linear` computes no inputs again there
    # DeepSpeed replaces `F.linear` for the rest of a process when it partitions weights (stage 3).
    with (
        KernelRecorder() as recorder,
        patch.object(F, "linear", torch._C._nn.linear),
        patch.object(F, "scaled_dot_product_attention", _fused_attention),
    ):
        F.cross_entropy(model(clips, keys).float(), labels).backward()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    element = dtype.itemsize
    added = Kernel(ELEMENTWISE, 0, {-1: (4 + element) * trained}, {-2: 4 * trained})
    kernels = fuse(recorder.kernels) if compiled else recorder.kernels
    return StepKernels(batch, [*kernels, added], [update_kernel(trained // ranks, element)])


def update_kernel(trained: int, element: int) -> Kernel:
    """AdamW of so many weights, each with a copy of `element` bytes that the products read.

    It reads the summed gradient in float32, both moments and the master weights, and writes all but the
    gradient, and the copy where that is not the master weight itself.
    """
    written = 12 if element == 4 else 12 + element
    return Kernel(OPTIMISER, 0, {-3: 16 * trained}, {-4: written * trained})


@dataclass
class _Group:
    level: int
    members: list[int] = field(default_factory=list)


def fuse(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The kernels after compilation, see above."""
    producer: dict[int, int] = {}
    levels: list[int] = []
    group_of: dict[int, _Group] = {}
    for number, kernel in enumerate(kernels):
        sources = {producer[storage] for storage in kernel.read if storage in producer}
        alone = kernel.kind in _ALONE
        # Kernels of one level have none of those that stay alone between them.
        level = max((levels[source] + (kernels[source].kind in _ALONE) for source in sources), default=0)
        levels.append(level)
        group = _Group(level)
        if not alone:
            near = [group_of[s] for s in sources if s in group_of and group_of[s].level == level]
            group = near[0] if near else group
            for other in near[1:]:
                if other is not group:
                    group.members += other.members
                    for member in other.members:
                        group_of[member] = group
                    other.members = []
            group.members.append(number)
            group_of[number] = group
        for storage in kernel.written:
            producer[storage] = number
    return _merged(kernels, group_of)


def _merged(kernels: Sequence[Kernel], group_of: Mapping[int, _Group]) -> list[Kernel]:
    readers: dict[int, list[int]] = {}
    for number, kernel in enumerate(kernels):
        for storage in kernel.read:
            readers.setdefault(storage, []).append(number)
    result, done = [], set()
    for number, kernel in enumerate(kernels):
        group = group_of.get(number)
        if group is None:
            result.append(kernel)
        elif id(group) not in done:
            done.add(id(group))
            result.append(_one_kernel(kernels, set(group.members), readers))
    return result


def _one_kernel(kernels: Sequence[Kernel], members: set[int], readers: Mapping[int, Sequence[int]]) -> Kernel:
    if len(members) == 1:
        return kernels[next(iter(members))]
    read: dict[int, int] = {}
    written: dict[int, int] = {}
    for number in sorted(members):
        for storage, size in kernels[number].read.items():
            if storage not in written:
                read[storage] = max(read.get(storage, 0), size)
        written.update(kernels[number].written)
    kept = {}
    for storage, size in written.items():
        using = readers.get(storage, ())
        if not using or any(reader not in members for reader in using):
            kept[storage] = size
    return Kernel(FUSED, sum(kernels[number].flops for number in members), read, kept)


def totals_by_kind(
    kernels: Sequence[Kernel], seconds: Callable[[Kernel], float]
) -> dict[str, tuple[int, float, float, float]]:
    """Kernels, FLOPs, bytes and seconds of each kind, the longest first."""
    found: dict[str, tuple[int, float, float, float]] = {}
    for kernel in kernels:
        count, flops, moved, spent = found.get(kernel.kind, (0, 0.0, 0.0, 0.0))
        found[kernel.kind] = (
            count + 1,
            flops + kernel.flops,
            moved + kernel.bytes,
            spent + seconds(kernel),
        )
    return dict(sorted(found.items(), key=lambda item: -item[1][3]))

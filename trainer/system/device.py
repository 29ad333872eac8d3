"""The device of a rank: its GPU, the precision of its products, determinism."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.errors import RunError

Precision = Literal["fp32", "bf16", "autocast"]
"""`bf16`: of weights in bf16. `autocast`: bf16 products of weights in float32. `fp32`."""

FP8_CAPABILITY = 8, 9
"""The first compute capability with products in FP8."""


def set_device(device: torch.device) -> None:
    """Make this GPU the process's current one; nothing for a CPU. Raises RunError where it cannot be used."""
    if device.type == "cpu":
        return
    try:
        torch.cuda.set_device(device)
    except RuntimeError as error:
        raise RunError(
            f"{device} cannot be used: {str(error).splitlines()[0]} (if it is the driver: this PyTorch is "
            f"built for CUDA {torch.version.cuda}; CUDA 13 needs version 580 or newer, CUDA 12 525)"
        ) from error


def set_numerics(*, deterministic: bool) -> None:
    """Disable TF32; `deterministic` makes every result on a GPU the same bits each time.

    To be called before the first product: cuBLAS reads its workspace once.
    """
    # cuDNN's convolutions would round their inputs to TF32, 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """Resolve `auto`: bf16 on a GPU, fp32 on a CPU, where a bf16 product is a hundred times slower.

    Raises RunError for bf16 on a CPU: its batch norm takes no bf16 weights there; autocast does.
    """
    if wanted == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if wanted == "bf16" and device.type == "cpu":
        raise RunError(
            "engine.precision bf16 needs a GPU; on a CPU use fp32 (fast) or autocast (bf16 products)"
        )
    return wanted  # type: ignore[return-value]


def check_fp8(device: torch.device) -> None:
    """Raises RunError for a GPU that does not multiply in FP8."""
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < FP8_CAPABILITY:
        raise RunError(
            f"engine.fp8 needs a GPU of compute capability {_version(FP8_CAPABILITY)} or newer (Ada, Hopper, "
            f"Blackwell); this {torch.cuda.get_device_name(device)} has {_version(found)}: set it to false"
        )


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@contextmanager
def restored_buffers(model: nn.Module) -> Iterator[None]:
    """At the end, the model's buffers, such as running statistics, hold what they held at the beginning."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)


def compute_logits(
    precision: Precision, model: nn.Module, clips: Tensor, keys: Tensor | None = None
) -> Tensor:  # B 3 T H W, B -> B K
    """A model's logits in float32, without DeepSpeed. keys: seeds of the clips' dropout masks."""
    clips = clips.to(torch.bfloat16) if precision == "bf16" else clips
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=precision == "autocast"):
        return model(clips, keys).float()

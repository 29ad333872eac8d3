"""How a rank's device computes, beside the recipe's precision."""

import os

import torch

from trainer.errors import RunError


def set_device(device: torch.device) -> None:
    """Make this GPU the process's own; nothing for a CPU. Raises RunError where it cannot be used."""
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
    """Let products in fp32 be those of fp32, and on demand every result on a GPU the same bits each time.

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

"""The health of a GPU: what nvidia-smi reports, and whether it multiplies exactly."""

import shutil
import subprocess

import torch

SMI_TIMEOUT = 30.0  # seconds for nvidia-smi, which hangs where a driver does


def query_smi(query: str, fields: tuple[str, ...], uuid: str) -> dict[str, str]:
    """Values of one GPU from nvidia-smi by field; empty where it is missing or does not know a field."""
    if shutil.which("nvidia-smi") is None:
        return {}
    names = ",".join(("gpu_uuid", *fields))
    command = ["nvidia-smi", f"--query-{query}={names}", "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT)
    for line in result.stdout.splitlines() if result.returncode == 0 else ():
        first, *values = (value.strip() for value in line.split(","))
        if first == uuid:
            return dict(zip(fields, values, strict=True))
    return {}


def multiplies_exactly(device: torch.device) -> bool:
    """Multiply matrices of -1, 0 and 1 in fp32 and bf16, in which sums of 256 such products are exact."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1024, 256), (256, 1024)
    left, right = (torch.randint(-1, 2, shape, generator=generator).float() for shape in shapes)
    products = [left.to(device, dtype) @ right.to(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return all(torch.equal(product.float().cpu(), left @ right) for product in products)

"""What is set is for a GPU; that it is set is seen anywhere, in processes of their own: it is for good."""

import subprocess
import sys
from unittest import mock

import pytest
import torch

from trainer.errors import RunError
from trainer.system.device import set_device

SETTINGS = """
import os
import torch
from trainer.system.device import set_numerics
set_numerics(deterministic={deterministic})
cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
print(cudnn.allow_tf32, matmul.allow_tf32)
print(torch.are_deterministic_algorithms_enabled(), cudnn.deterministic)
print("CUBLAS_WORKSPACE_CONFIG" in os.environ)
layer = torch.nn.Conv3d(3, 4, 3)
layer(torch.randn(2, 3, 4, 8, 8)).sum().backward()
"""


@pytest.mark.parametrize("deterministic", [False, True])
def test_fp32_is_fp32_and_bits_are_repeated_on_demand(deterministic: bool) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", SETTINGS.format(deterministic=deterministic)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "False False",
        f"{deterministic} {deterministic}",
        f"{deterministic}",
    ]


def test_a_gpu_that_cannot_be_used_is_named_with_its_driver() -> None:
    too_old = RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nPlease ...")
    with (
        mock.patch("torch.cuda.set_device", side_effect=too_old),
        pytest.raises(RunError, match=r"cuda:1 cannot be used: .*too old \(found version 12040\)\. .*580"),
    ):
        set_device(torch.device("cuda", 1))


def test_a_cpu_is_not_set() -> None:
    with mock.patch("torch.cuda.set_device") as on_gpu:
        set_device(torch.device("cpu"))
    on_gpu.assert_not_called()

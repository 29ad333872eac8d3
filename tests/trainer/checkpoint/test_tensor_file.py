"""Files of tensors: permissions, flushing and errors."""

import errno
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from trainer.checkpoint.weights import save_weights
from trainer.errors import RunError
from trainer.resilience.nan_replay import BatchOrigin, write_replay_file


def test_weights_have_the_permissions_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    save_weights(tmp_path / "w.safetensors", {"a": torch.zeros(3)}, {"model": {}})
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_weights_are_flushed_before_they_are_renamed(tmp_path: Path) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def flushing(handle: int) -> None:
        done.append(f"flushed {os.path.basename(os.readlink(f'/proc/self/fd/{handle}'))}")
        fsync(handle)

    def replacing(path: Path, target: Path) -> Path:
        done.append("named")
        return replace(path, target)

    with mock.patch.object(os, "fsync", flushing), mock.patch.object(Path, "replace", replacing):
        save_weights(tmp_path / "w.safetensors", {"a": torch.zeros(3)}, {"model": {}})
    assert done == ["flushed .w.safetensors.partial", "named", f"flushed {tmp_path.name}"]


def test_an_interrupt_leaves_no_file(tmp_path: Path) -> None:
    with (
        mock.patch.object(os, "fsync", mock.Mock(side_effect=KeyboardInterrupt)),
        pytest.raises(KeyboardInterrupt),
    ):
        save_weights(tmp_path / "w.safetensors", {"a": torch.zeros(3)}, {"model": {}})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_has_its_errno(tmp_path: Path) -> None:
    clips = torch.zeros(2, 3)
    batch = mock.Mock(clips=clips, labels=clips[0], ids=clips[1], valid=clips[0] > 0, keys=clips[1].clone())
    failing = mock.Mock(side_effect=_safetensors_error("I/O error: No space left on device (os error 28)"))
    with mock.patch("safetensors.torch.save_file", failing):
        with pytest.raises(OSError) as failure:
            write_replay_file(tmp_path / "clips", batch, BatchOrigin(1, 0, 0, "fp32", "a reason", ["v.mp4"]))
        assert failure.value.errno == errno.ENOSPC
        with pytest.raises(RunError, match="w cannot be written: No space left on device"):
            save_weights(tmp_path / "w", {"a": clips}, {})
    assert not list(tmp_path.glob(".w*"))


def _safetensors_error(message: str) -> Exception:
    from safetensors import SafetensorError

    error: Exception = SafetensorError(message)
    return error

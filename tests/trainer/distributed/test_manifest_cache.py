"""Manifests that one rank of a node reads, and copies, for the others."""

import os
import pickle
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from pipelines.dataset.manifest import Manifest, ManifestRow, write_manifest
from pipelines.errors import DataError
from trainer.distributed import manifest_cache
from trainer.distributed.environment import Environment
from trainer.distributed.manifest_cache import open_manifest, prefetch_manifests
from trainer.errors import RunError


def place(local_rank: int = 0, node_rank: int = 0) -> Environment:
    return Environment(
        rank=2 * node_rank + local_rank,
        local_rank=local_rank,
        world_size=20_000,
        local_world_size=2,
        device=torch.device("cpu"),
        node=f"n{node_rank}",
        launcher="srun",
        starter="srun",
        node_rank=node_rank,
    )


def made(path: Path, label: int = 0, count: int = 3) -> Manifest:
    rows = [ManifestRow(f"videos/{i}.mp4", 0, 0, label, 10, 25.0, 64, 48, "vp9") for i in range(count)]
    return write_manifest(path, rows, ("jump", "run"))


def own(node: Path) -> Path:
    """The folder of copies."""
    return node / f"manifests-{os.geteuid()}"


def copies(node: Path) -> list[Path]:
    return sorted(path for path in own(node).iterdir() if not path.name.startswith("."))


def test_nodes_come_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "train.arrow")
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for node_rank in (0, 1, 100, 5000):
        prefetch_manifests([tmp_path / "train.arrow"], place(0, node_rank), None)
        prefetch_manifests([tmp_path / "none.arrow"], place(1, node_rank), None)  # not even looked for
    assert slept == pytest.approx([0, 0.02, 2, 10])


def test_what_is_wrong_with_a_manifest_is_found_by_the_first_to_read_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no manifest at"):
        prefetch_manifests([tmp_path / "none.arrow"], place(), None)
    made(tmp_path / "empty.arrow", count=0)
    with pytest.raises(DataError, match="lists no video"):
        prefetch_manifests([tmp_path / "empty.arrow"], place(), tmp_path / "node")
    assert not (tmp_path / "node").exists()


def test_a_copy_stands_for_the_original(tmp_path: Path) -> None:
    train, val = made(tmp_path / "a" / "part.arrow"), made(tmp_path / "b" / "part.arrow", label=1)
    node = tmp_path / "node" / "own"
    prefetch_manifests([train.path, val.path], place(), node)
    assert len(copies(node)) == 2
    for original in (train, val):
        copy = open_manifest(original.path, node)
        assert copy.path in copies(node)
        assert copy.fingerprint == original.fingerprint
        assert copy.absolute_path(copy.row(1)) == original.absolute_path(original.row(1))
        there = pickle.loads(pickle.dumps(copy))  # as it travels to the processes that read
        assert (there.path, there.absolute_path(there.row(1))) == (
            copy.path,
            original.absolute_path(original.row(1)),
        )


def test_the_other_ranks_need_the_copy_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    original = made(tmp_path / "train.arrow")
    prefetch_manifests([Path("train.arrow")], place(), Path("node"))
    original.path.unlink()
    copy = open_manifest(Path("train.arrow"), Path("node"))
    assert copy.absolute_path(copy.row(0)) == tmp_path / "videos" / "0.mp4"


def test_a_copy_is_made_once_and_again_when_the_manifest_is_another(tmp_path: Path) -> None:
    path, node = tmp_path / "train.arrow", tmp_path / "node"
    made(path)
    prefetch_manifests([path], place(), node)
    (copy,) = copies(node)
    first = copy.stat()
    prefetch_manifests([path], place(), node)
    assert copy.stat().st_mtime_ns == first.st_mtime_ns
    other = made(path, label=1)
    assert path.stat().st_size == first.st_size
    prefetch_manifests([path], place(), node)
    assert copies(node) == [copy]
    assert open_manifest(path, node).fingerprint == other.fingerprint


def test_a_copy_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    path, node = tmp_path / "train.arrow", tmp_path / "node"
    made(path)
    prefetch_manifests([path], place(), node)
    (copy,) = copies(node)
    (own(node) / f".{copy.name}.partial").write_bytes(b"of a run that was killed")
    copy.write_bytes(copy.read_bytes()[:-100])
    prefetch_manifests([path], place(), node)
    open_manifest(path, node).verify()
    assert [file.name for file in sorted(own(node).iterdir())] == [f".{copy.name}.lock", copy.name]


def test_a_damaged_original_is_named_and_not_its_copy(tmp_path: Path) -> None:
    path, node = tmp_path / "train.arrow", tmp_path / "node"
    made(path)
    content = path.read_bytes()
    assert content.count(b"videos/1.mp4") == 1
    path.write_bytes(content.replace(b"videos/1.mp4", b"videos/7.mp4"))
    for _ in range(2):  # the second one finds the first one's copy
        with pytest.raises(DataError, match=r"its content has fingerprint .* Make it again") as refusal:
            prefetch_manifests([path], place(), node)
        assert str(refusal.value).startswith(f"{path} is damaged: ")
    path.write_bytes(content)
    prefetch_manifests([path], place(), node)
    open_manifest(path, node).verify()


def test_an_original_that_changes_while_it_is_copied_is_said_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, node = tmp_path / "train.arrow", tmp_path / "node"
    made(path)
    write = manifest_cache._write

    def change_and_write(*arguments) -> None:
        made(path, label=1)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(manifest_cache, "_write", change_and_write)
        with pytest.raises(RunError, match="was changed while n0 copied it: start again"):
            prefetch_manifests([path], place(), node)
    prefetch_manifests([path], place(), node)


def test_a_copy_that_cannot_be_made_is_refused_with_the_node_s_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, node = tmp_path / "train.arrow", tmp_path / "node"
    made(path)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
        with pytest.raises(RunError, match=r"node/manifests-\d+ on n0 has 0 MiB free"):
            prefetch_manifests([path], place(), node)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest_cache.shutil, "copyfileobj", fail)
        with pytest.raises(RunError, match=r"cannot be copied into .*node on n0 \(No space left on device\)"):
            prefetch_manifests([path], place(), node)
    assert copies(node) == []
    assert [file.suffix for file in own(node).iterdir()] == [".lock"]
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="name another folder, or set it to null"):
        prefetch_manifests([path], place(), tmp_path / "file")


def test_a_copy_that_somebody_made_up_is_not_used(tmp_path: Path) -> None:
    """Its header has the right fingerprint; paths and labels are others."""
    path, node = tmp_path / "train.arrow", tmp_path / "node"
    original = made(path)
    prefetch_manifests([path], place(), node)
    (copy,) = copies(node)
    false = made(tmp_path / "false.arrow", label=1)
    content = false.path.read_bytes()
    assert false.fingerprint.encode() in content
    copy.write_bytes(content.replace(false.fingerprint.encode(), original.fingerprint.encode()))
    assert Manifest.open(copy).fingerprint == original.fingerprint
    prefetch_manifests([path], place(), node)
    assert open_manifest(path, node).row(0) == original.row(0)
    assert copy.read_bytes() == path.read_bytes()


def test_no_link_is_followed(tmp_path: Path) -> None:
    path, node, victim = tmp_path / "train.arrow", tmp_path / "node", tmp_path / "victim"
    made(path)
    victim.write_text("precious")
    prefetch_manifests([path], place(), node)
    (copy,) = copies(node)
    lock, partial = (copy.with_name(f".{copy.name}.{kind}") for kind in ("lock", "partial"))
    for link in (partial, copy):
        link.unlink(missing_ok=True)
        link.symlink_to(victim)
    with pytest.raises(RunError, match="delete it"):
        open_manifest(path, node)
    prefetch_manifests([path], place(), node)
    assert not copy.is_symlink() and not partial.is_symlink()
    open_manifest(path, node).verify()
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(RunError, match="cannot be copied"):
        prefetch_manifests([path], place(), node)
    lock.unlink()
    own(node).rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"cannot be read \(No such file or directory\)"):
        open_manifest(path, node)
    own(node).symlink_to(tmp_path / "elsewhere")
    for use in (lambda: prefetch_manifests([path], place(), node), lambda: open_manifest(path, node)):
        with pytest.raises(RunError, match="symbolic link"):
            use()
    assert victim.read_text() == "precious"


def test_the_folder_of_copies_is_this_user_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, node = tmp_path / "train.arrow", tmp_path / "node"
    made(path)
    own(node).mkdir(parents=True)
    own(node).chmod(0o777)
    prefetch_manifests([path], place(), node)
    assert own(node).stat().st_mode & 0o777 == 0o700
    (copy,) = copies(node)
    assert copy.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    own(node).mkdir()  # by whom this test runs
    for use in (lambda: prefetch_manifests([path], place(), node), lambda: open_manifest(path, node)):
        with pytest.raises(RunError, match=r"user .*54321"):
            use()

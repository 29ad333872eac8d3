"""The files of a checkpoint: reading, checksums and damage."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint.metadata import TrainState, read_state, shard_name, shards, write_state
from trainer.checkpoint.shards import ShardReader, Snapshot, find_damage, read_index, write_checksum
from trainer.engine.state_shards import StateShard, owned_shards
from trainer.errors import RunError

SHAPES = {"weight/a": (7, 3), "exp_avg/a": (7, 3), "weight/b": (50,), "buffer/n": (), "buffer/m": (5,)}
KINDS = {"buffer/n": torch.int64, "weight/b": torch.bfloat16}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        key: (100 * torch.randn(shape, generator=generator)).to(KINDS.get(key, torch.float32))
        for key, shape in SHAPES.items()
    }


def whole(key: str, tensor: Tensor) -> StateShard:
    return StateShard(key, 0, tensor.view(-1), tuple(tensor.shape), replicated=True)


def write(folder: Path, world_size: int = 3) -> list[Path]:
    """The shards and the metadata of a checkpoint, from ranks that all hold the whole state."""
    everything = [whole(key, tensor) for key, tensor in tensors().items()]
    for rank in range(world_size):
        snapshot = Snapshot(owned_shards(everything, rank, world_size))
        snapshot.capture()
        snapshot.write(folder / shard_name(rank))
    state = TrainState(
        step=3, updates=3, world_size=world_size, zero_stage=0, settings={}, clips=0, bad=0, spent={},
        saved_at=0.0, description={},
    )  # fmt: skip
    write_state(folder, state)
    return shards(folder, state)


@pytest.mark.parametrize("world_size", [1, 3, 200])
def test_the_shards_of_all_ranks_together_hold_the_state(tmp_path: Path, world_size: int) -> None:
    reader = ShardReader(read_index(write(tmp_path, world_size)))
    assert set(reader.index) == set(SHAPES)
    for key, tensor in tensors().items():
        found = reader.whole(key)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(found, tensor), key


@pytest.mark.parametrize(("begin", "end"), [(0, 21), (5, 6), (6, 8), (3, 20), (20, 21)])
def test_a_slice_is_read_into_its_piece_only(tmp_path: Path, begin: int, end: int) -> None:
    reader = ShardReader(read_index(write(tmp_path)))
    assert len(reader.index["exp_avg/a"]) == 2, "it is to be cut somewhere"
    around = torch.full((40,), -1.0)
    reader.fill(StateShard("exp_avg/a", begin, around[10 : 10 + end - begin], (7, 3), replicated=False))
    assert torch.equal(around[10 : 10 + end - begin], tensors()["exp_avg/a"].view(-1)[begin:end])
    assert (around[:10] == -1).all() and (around[10 + end - begin :] == -1).all()


def test_only_the_shards_of_a_slice_are_opened(tmp_path: Path) -> None:
    """All headers are read once; of a thousand shards each rank then opens a few."""
    files = write(tmp_path)
    reader = ShardReader(read_index(files))
    files[0].unlink()
    files[1].unlink()
    assert torch.equal(reader.whole("buffer/m"), tensors()["buffer/m"])


def test_a_snapshot_keeps_the_values_at_its_capture(tmp_path: Path) -> None:
    values = torch.arange(6.0)
    snapshot = Snapshot([whole("weight/a", values)])
    assert snapshot.bytes == 24
    for first in (0.0, 10.0):
        values.copy_(torch.arange(6.0) + first)
        snapshot.capture()
        values.zero_()
        snapshot.write(tmp_path / "shard")
        assert torch.equal(
            ShardReader(read_index([tmp_path / "shard"])).whole("weight/a"), torch.arange(6.0) + first
        )


def test_a_missing_or_different_tensor_is_named(tmp_path: Path) -> None:
    files = write(tmp_path)
    reader = ShardReader(read_index(files))
    with pytest.raises(RunError, match=re.escape("holds no weight/c: it is of another model")):
        reader.fill(StateShard("weight/c", 0, torch.zeros(3), (3,), replicated=False))
    with pytest.raises(RunError, match=re.escape("weight/a has the shape [7, 3], the model's [3, 7]")):
        reader.fill(StateShard("weight/a", 0, torch.zeros(21), (3, 7), replicated=False))
    with pytest.raises(RunError, match="only 11 of 21 elements of exp_avg/a"):
        cut = next(part for part in reader.index["exp_avg/a"] if part.start == 0)
        assert cut.count == 11
        ShardReader(read_index([cut.file])).whole("exp_avg/a")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


def problem(folder: Path) -> str | None:
    """The first damage that the check finds, or None."""
    try:
        found = [find_damage(file) for file in shards(folder, read_state(folder))]
    except RunError as error:
        assert str(folder) in str(error)
        return str(error)
    return next((text for text in found if text), None)


def test_one_flipped_bit_is_found_anywhere(tmp_path: Path) -> None:
    write(tmp_path)
    assert problem(tmp_path) is None
    for path in sorted(tmp_path.iterdir()):
        size = path.stat().st_size
        named = path.name.removesuffix(".sha256")
        for position in {*range(0, size, max(1, size // 40)), size - 1}:
            flip(path, position)
            assert named in (problem(tmp_path) or ""), (path.name, position)
            flip(path, position)
    assert problem(tmp_path) is None


def test_missing_and_cut_files_are_named(tmp_path: Path) -> None:
    for number, path in enumerate(write(tmp_path)):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert problem(tmp_path) == f"{path.name} is damaged: its checksum does not fit"
        path.write_bytes(b"")
        assert problem(tmp_path) == f"{path.name} is damaged: its checksum does not fit"
        path.unlink()
        assert problem(tmp_path) == f"shard-0000{number}.safetensors is missing"
        path.write_bytes(content)
        beside = path.with_name(f"{path.name}.sha256")
        line = beside.read_bytes()
        beside.unlink()
        assert (problem(tmp_path) or "").startswith(f"{path.name} cannot be checked")
        beside.write_bytes(line)
    assert problem(tmp_path) is None
    (tmp_path / "state.json").unlink()
    assert problem(tmp_path) == f"checkpoint {tmp_path} cannot be used: state.json is missing"


def test_an_earlier_or_later_format_is_refused_as_such(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such folder"):
        read_state(tmp_path / "nowhere")
    write(tmp_path)
    (tmp_path / "engine").mkdir()
    with pytest.raises(RunError, match="an earlier version of this program"):
        read_state(tmp_path)
    (tmp_path / "engine").rmdir()
    path = tmp_path / "state.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    digest = subprocess.run(["sha256sum", path.name], cwd=tmp_path, capture_output=True, check=True).stdout
    (tmp_path / "state.json.sha256").write_bytes(digest)
    with pytest.raises(RunError, match="of another version of this program"):
        read_state(tmp_path)


def test_a_wrong_description_with_a_right_checksum_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    described = json.loads((tmp_path / "state.json").read_text())
    del described["format"]
    for content in ("[]", "no JSON", json.dumps(described)):
        (tmp_path / "state.json").write_text(content)
        write_checksum(tmp_path / "state.json")
        with pytest.raises(RunError, match=f"checkpoint {tmp_path} cannot be used: state.json"):
            read_state(tmp_path)


def test_a_shard_without_its_header_is_named(tmp_path: Path) -> None:
    first, second, third = write(tmp_path)
    save_file({"float32": torch.zeros(3)}, first)
    second.write_bytes(second.read_bytes()[:20])
    third.unlink()
    for path in (first, second, third):
        with pytest.raises(RunError, match=f"{path.name} cannot be read"):
            read_index([path])


def test_sha256sum_accepts_a_complete_checkpoint_and_finds_damage(tmp_path: Path) -> None:
    files = write(tmp_path)
    command = "sha256sum -c *.sha256"
    checked = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0
    assert checked.stdout.count(": OK") == 4
    flip(files[1], 100)
    checked = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode != 0 and f"{files[1].name}: FAILED" in checked.stdout


def test_the_files_have_the_permissions_of_other_files(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "ordinary").write_text("")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_shards_are_plain_numbers_behind_a_readable_header(tmp_path: Path) -> None:
    """Nothing is pickled: a shard is a length, JSON, and the bytes of the tensors to its end."""
    for path in write(tmp_path):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        pieces = json.loads(header.pop("__metadata__")["pieces"])
        assert all(key in SHAPES for key, *_ in pieces)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        assert max(ends) == len(content) - 8 - length
        sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()]
        assert sum(sizes) == max(ends)

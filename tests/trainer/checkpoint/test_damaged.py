"""Checkpoints with right checksums and wrong contents: refused with a message, before memory is allocated."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import launch.export
from models import create_model
from trainer.checkpoint.export import export
from trainer.checkpoint.metadata import (
    STATE,
    CheckpointError,
    TrainState,
    find_problem,
    read_state,
    shard_name,
    write_state,
)
from trainer.checkpoint.retention import Retention, read_accuracies
from trainer.checkpoint.shards import Snapshot, find_damage, read_index, write_checksum
from trainer.checkpoint.weights import load_weights
from trainer.engine.state_shards import StateShard
from trainer.errors import RunError

SIZES = {"resolution": 16, "width": 16, "depth": 1, "heads": 2, "frames": 2, "num_classes": 3}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of one rank, with weights and buffers, as a run writes it."""
    folder = tmp_path / "run" / "checkpoints" / "step-0000003"
    folder.mkdir(parents=True)
    model = create_model("tiny", form="temporal", **SIZES)
    buffers = dict(model.named_buffers())
    pieces = [
        StateShard(
            f"{'buffer' if name in buffers else 'weight'}/{name}",
            0,
            tensor.reshape(-1),
            tuple(tensor.shape),
            True,
        )
        for name, tensor in model.state_dict().items()
    ]
    snapshot = Snapshot(pieces)
    snapshot.capture()
    snapshot.write(folder / shard_name(0))
    description = {
        "model": dataclasses.asdict(model.config),
        "class_names": ["a", "b", "c"],
        "preprocessing": {},
        "recipe": {},
    }
    state = TrainState(
        step=3, updates=3, world_size=1, zero_stage=0, settings={}, clips=6, bad=0, spent={"step": 1.5},
        saved_at=1e9, description=description,
    )  # fmt: skip
    write_state(folder, state)
    return folder


def with_state(folder: Path, **fields: Any) -> Path:
    state = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps({**state, **fields}))
    write_checksum(folder / STATE)
    return folder


def with_shard(folder: Path, pieces: object = None, **tensors: Tensor) -> Path:
    path = folder / shard_name(0)
    with safe_open(path, framework="pt") as file:
        text = file.metadata()["pieces"]
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if pieces is not None:
        text = pieces if isinstance(pieces, str) else json.dumps(pieces)
    save_file(held | tensors, path, metadata={"pieces": text})
    write_checksum(path)
    return folder


def pieces_of(folder: Path) -> list[list[Any]]:
    with safe_open(folder / shard_name(0), framework="pt") as file:
        return json.loads(file.metadata()["pieces"])


def refusal(folder: Path) -> str:
    out = folder.parent / "w.safetensors"
    with pytest.raises(RunError) as caught:
        export(folder, out)
    assert not out.exists() and folder.name in str(caught.value)
    return str(caught.value)


def test_a_good_checkpoint_is_exported(checkpoint: Path, tmp_path: Path) -> None:
    assert export(checkpoint, tmp_path / "w.safetensors").step == 3
    assert load_weights(tmp_path / "w.safetensors").class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "3"),
        ("step", -1),
        ("step", True),
        ("updates", 1.5),
        ("world_size", 0),
        ("world_size", 10**12),
        ("zero_stage", 4),
        ("settled", []),
        ("clips", None),
        ("bad", 2**70),
        ("spent", {"step": "x"}),
        ("spent", {"step": float("nan")}),
        ("saved_at", float("inf")),
        ("description", []),
    ],
)
def test_a_wrong_state_is_named(checkpoint: Path, name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"state.json is damaged: {name} is "):
        read_state(with_state(checkpoint, **{name: value}))
    assert name in str(find_problem(checkpoint))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[" * 100_000, '{"step": ' + "9" * 5000 + "}", '{"format": 2}']
)
def test_a_state_that_cannot_be_parsed_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / STATE).write_text(text)
    write_checksum(checkpoint / STATE)
    with pytest.raises(CheckpointError, match=r"state\.json (cannot be read|is of another version)"):
        read_state(checkpoint)


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"model": None}, "its model is not a mapping"),
        ({"model": {}}, "the model's field resolution is missing"),
        ({"class_names": "abc"}, "its class_names is not a list"),
        ({"class_names": [1]}, "its class_names are not all text"),
        ({"recipe": "left out"}, "its description has no recipe"),
    ],
)
def test_an_invalid_description_is_not_exported(
    checkpoint: Path, description: dict[str, Any], words: str
) -> None:
    full = {**read_state(checkpoint).description, **description}
    with_state(checkpoint, description={name: value for name, value in full.items() if value != "left out"})
    assert words in refusal(checkpoint)


def test_a_model_of_another_size_is_not_exported(checkpoint: Path) -> None:
    description = read_state(checkpoint).description
    for change, words in (
        ({"num_classes": 4}, "expected is (4, 16)"),
        ({"width": 10**9}, "width is 1000000000"),
    ):
        model = {**description["model"], **change}
        assert words in refusal(with_state(checkpoint, description={**description, "model": model}))


@pytest.mark.parametrize(
    "pieces",
    [
        "{",
        "[" * 100_000,
        "3",
        [3],
        [["weight/a", 0, 1, "float32"]],
        [["weight/a", 0, "1", "float32", [1]]],
        [["weight/a", -1, 1, "float32", [1]]],
        [["weight/a", 0, 2, "float32", [1]]],
        [["weight/a", 0, 1, "float31", [1]]],
        [["weight/a", 0, 1, "load", [1]]],
        [[["weight/a"], 0, 1, "float32", [1]]],
        [["weight/a", 0, 1, "float32", [10**15]]],
        [["weight/a", 0, 10**15, "float32", [10**15]]],
    ],
    ids=lambda pieces: json.dumps(pieces)[:40],
)
def test_pieces_that_are_not_in_the_shard_are_refused(checkpoint: Path, pieces: object) -> None:
    with_shard(checkpoint, pieces)
    with pytest.raises(RunError, match=r"shard-00000\.safetensors cannot be read"):
        read_index([checkpoint / shard_name(0)])
    assert "cannot be used" in refusal(checkpoint)


def test_a_tensor_with_missing_or_duplicate_parts_is_refused(checkpoint: Path) -> None:
    pieces = pieces_of(checkpoint)
    held = next(piece for piece in pieces if piece[0] == "weight/head.weight")
    held[4] = [10**6, 10**6]
    assert "only 48 of 1000000000000 elements of weight/head.weight" in refusal(
        with_shard(checkpoint, pieces)
    )
    at = pieces.index(held)
    pieces[at : at + 1] = [[held[0], 0, 24, held[3], [3, 16]], [held[0], 12, 24, held[3], [3, 16]]]
    assert "elements of weight/head.weight" in refusal(with_shard(checkpoint, pieces))


def test_weights_that_are_not_finite_are_not_exported(checkpoint: Path) -> None:
    with safe_open(checkpoint / shard_name(0), framework="pt") as file:
        values = file.get_tensor("float32")
    values[:2] = float("nan")
    first = next(piece[0] for piece in pieces_of(checkpoint) if piece[3] == "float32").partition("/")[2]
    assert f"not finite in {first}: 2 of " in refusal(with_shard(checkpoint, float32=values))
    values[:2] = float("inf")
    assert f"not finite in {first}: 2 of " in str(find_problem(with_shard(checkpoint, float32=values)))


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_a_state_that_is_not_finite_is_not_written(tmp_path: Path, number: float) -> None:
    values = torch.ones(5)
    pieces = [
        StateShard("buffer/count", 0, torch.ones(3, dtype=torch.int64), (3,), True),
        StateShard("exp_avg/head", 5, values, (10,), False),
    ]
    snapshot = Snapshot(pieces)
    values[4] = number
    snapshot.capture()
    with pytest.raises(RunError, match="exp_avg/head holds numbers that are not finite"):
        snapshot.write(tmp_path / "shard")
    assert not list(tmp_path.iterdir())
    values[4] = 0.0
    snapshot.capture()
    snapshot.write(tmp_path / "shard")
    assert find_damage(tmp_path / "shard") is None


def test_a_pipe_or_folder_in_place_of_a_file_does_not_block(checkpoint: Path) -> None:
    beside = checkpoint / f"{STATE}.sha256"
    beside.unlink()
    os.mkfifo(beside)
    assert "state.json.sha256 is missing" in str(find_damage(checkpoint / STATE))
    beside.unlink()
    write_checksum(checkpoint / STATE)
    shard = checkpoint / shard_name(0)
    shard.unlink()
    os.mkfifo(shard)
    assert f"{shard.name} is missing" in refusal(checkpoint)


def test_odd_names_and_accuracies_beside_checkpoints_are_ignored(checkpoint: Path) -> None:
    folder = checkpoint.parent
    for name in ("step-²", "step-٣", "step-", "step-x", "step--1"):
        (folder / name).mkdir()
    assert Retention(folder, keep_last=1, keep_best=True).visible() == [checkpoint]
    for text in ("[" * 100_000, '{"1": 1' + "0" * 400 + "}", '{"x": 1}', '{"1": {}}', "3", "\0"):
        (folder / "accuracy.json").write_text(text)
        assert read_accuracies(folder) == {}


def test_the_program_ends_with_code_2_and_one_message(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_state(checkpoint, description={"class_names": ["a"]})
    monkeypatch.setattr(sys, "argv", ["export.py", str(checkpoint), "--out", str(tmp_path / "w.safetensors")])
    assert launch.export.main() == 2
    message = capsys.readouterr().err
    assert message.startswith("error: checkpoint ") and "no model" in message and message.count("\n") == 1

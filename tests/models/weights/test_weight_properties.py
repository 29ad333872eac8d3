"""Whatever bytes a file of weights has, it is read, or refused in one message."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

pytest.importorskip("hypothesis", reason="part of the extra `dev`")
from hypothesis import given, settings
from hypothesis import strategies as st

from models import ModelError
from models.uniformerv2 import UniFormerV2
from models.weights.files import read_state
from models.weights.image_backbones import load_image_weights
from models.weights.released import load_released
from tests.models.weights.test_image_backbones import video_model


def clip_file(width: int = 32) -> dict[str, torch.Tensor]:
    state = {"visual.conv1.weight": torch.ones(width, 3, 8, 8), "visual.class_embedding": torch.ones(width)}
    state["visual.positional_embedding"] = torch.ones(17, width)
    state["visual.transformer.resblocks.0.ln_1.weight"] = torch.ones(width)
    return state


@pytest.fixture(scope="module")
def model() -> UniFormerV2:
    return video_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def is_read_or_refused(path: Path, model: UniFormerV2) -> None:
    try:
        assert all(tensor.isfinite().all() for tensor in read_state(path).values())
    except ModelError as error:
        assert 0 < len(str(error)) < 3000
    for load in (lambda: load_image_weights(model, path), lambda: load_released(path, frames=4)):
        try:
            load()
        except ModelError as error:
            assert 0 < len(str(error)) < 3000


SMALL = st.one_of(
    st.integers(-2, 2**65), st.floats(), st.text(max_size=4), st.none(), st.lists(st.integers(0, 9))
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_header_with_anything_in_it(data: st.DataObject, folder: Path, model: UniFormerV2) -> None:
    content = save(clip_file())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        entry = header[name]
        match data.draw(st.integers(0, 4)):
            case 0:
                header[name] = data.draw(SMALL)
            case 1 if isinstance(entry, dict):
                entry[data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(SMALL)
            case 2 if isinstance(entry, dict) and isinstance(entry.get("shape"), list):
                entry["shape"] = entry["shape"][::-1]
            case 3:
                header[data.draw(st.text(max_size=30))] = header.pop(name)
            case _:
                header["__metadata__"] = data.draw(SMALL)
    text = json.dumps(header).encode()
    (folder / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    is_read_or_refused(folder / "w.safetensors", model)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), suffix=st.sampled_from(["safetensors", "pt"]))
def test_changed_and_cut_files(data: st.DataObject, suffix: str, folder: Path, model: UniFormerV2) -> None:
    path = folder / f"w.{suffix}"
    path.write_bytes(save(clip_file(4)))
    if suffix == "pt":
        torch.save(clip_file(4), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content) - 1, 2000)))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    is_read_or_refused(path, model)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(content=st.binary(max_size=100), suffix=st.sampled_from(["safetensors", "pt"]))
def test_any_bytes(content: bytes, suffix: str, folder: Path, model: UniFormerV2) -> None:
    path = folder / f"any.{suffix}"
    path.write_bytes(content)
    is_read_or_refused(path, model)

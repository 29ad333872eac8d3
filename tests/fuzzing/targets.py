"""The targets of the fuzzer: for each kind of input some valid ones and the function that reads them.

A reader accepts an input or raises an error with a message for the user. Any other exception, a crash, a hang
and excessive memory are findings. The readers run in a separate process.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SMALL = {"resolution": 16, "width": 16, "depth": 1, "heads": 2, "frames": 2, "num_classes": 3}


@dataclass(frozen=True)
class Target:
    """A kind of input."""

    name: str
    """File name of a damaged input."""
    make: Callable[[Path], list[Path]]
    """Writes valid inputs into a folder."""
    read: Callable[[Path], None]
    """Reads an input."""
    beside: Callable[[Path], object] | None = None
    """Writes the other files that an input needs in its folder."""


def make_recipes(folder: Path) -> list[Path]:
    root = Path(__file__).parents[2]
    copy_recipes(folder)
    shutil.copy(root / "tests" / "integration" / "small.yaml", folder)
    return [path for path in sorted(folder.glob("*.yaml")) if not path.name.startswith("_")]


def copy_recipes(folder: Path) -> None:
    """Copy the recipes, which a damaged recipe may inherit from."""
    for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"):
        shutil.copy(path, folder)


def read_recipe(path: Path) -> None:
    from trainer.config.load import load_recipe

    load_recipe(path).to_yaml()


def make_manifests(folder: Path) -> list[Path]:
    from pipelines.dataset.manifest import Manifest  # noqa: F401 - what reads them is imported before any is damaged
    from pipelines.synthetic.motion import render

    render(folder, train_clips=24, val_clips=12, seed=0, workers=1, progress=None)
    return sorted(folder.glob("*.arrow"))


def read_manifest(path: Path) -> None:
    from pipelines.dataset.manifest import Manifest
    from pipelines.errors import DataError

    manifest = Manifest.open(path)
    for index in range(min(len(manifest), 200)):
        with contextlib.suppress(DataError):
            manifest.absolute_path(manifest.row(index))
    list(manifest.wrong_rows())
    manifest.verify()


def small_model() -> tuple[Any, dict[str, Any]]:
    """A model, and what a file of weights records about it."""
    from models import create_model
    from trainer.inference.preprocessing import Preprocessing

    model = create_model("tiny", form="temporal", **SMALL)
    config = model.config
    preprocessing = Preprocessing(config.frames, config.resolution, (0.45,) * 3, (0.225,) * 3)
    return model, {
        "model": dataclasses.asdict(model.config),
        "class_names": ["a", "b", "c"],
        "preprocessing": preprocessing.as_metadata(),
        "recipe": {},
    }


def make_weights(folder: Path) -> list[Path]:
    from trainer.checkpoint.weights import save_weights

    model, description = small_model()
    path = folder / "weights.safetensors"
    save_weights(path, dict(model.state_dict()), description)
    return [path]


def read_weights(path: Path) -> None:
    import torch

    from models.weights.files import open_weights
    from trainer.checkpoint.weights import load_weights
    from trainer.inference.predictor import Predictor

    weights = open_weights(path)
    weights.read(list(weights.shapes)[:5])
    Predictor(load_weights(path), torch.device("cpu"))


def make_videos(folder: Path) -> list[Path]:
    from tests.pipelines.videos import Kind, make_video

    kinds = [
        Kind("libx264", "mp4", {"g": "12", "bf": "2"}),
        Kind("libx264", "ts", {"g": "12"}),
        Kind("libx265", "mkv", {"x265-params": "log-level=none"}),
        Kind("libvpx-vp9", "webm", {"deadline": "realtime"}),
        Kind("libvpx", "webm", {"deadline": "realtime"}),
        Kind("mpeg4", "avi"),
        Kind("mjpeg", "avi", pixels="yuvj420p"),
        Kind("mpeg2video", "mpg"),
        Kind("gif", "gif", pixels="rgb8"),
    ]
    made = []
    for number, kind in enumerate(kinds):
        place = folder / str(number)
        place.mkdir()
        made.append(make_video(place, dataclasses.replace(kind, frames=20)))
    return made


def read_video(path: Path) -> None:
    from pipelines.dataset.probe import probe_video
    from pipelines.decode.pyav import decode_frames
    from pipelines.errors import VideoError

    defects = []
    for source in (path, path.read_bytes()):
        try:
            probed = probe_video(source, deep=True)
            wanted = np.linspace(0, probed.frames - 1, 4).astype(np.int32)
            pixels = decode_frames(source, wanted, size=(probed.height, probed.width))
            assert pixels.shape == (4, probed.height, probed.width, 3)
        except VideoError as defect:
            defects.append(defect)
    assert len(defects) != 1, f"from a path and from bytes it is not the same: {defects}"
    if defects:
        raise defects[0]


def make_kept_steps(folder: Path) -> list[Path]:
    import torch

    from pipelines.loader import ClipBatch
    from trainer.resilience.nan_replay import BatchOrigin, write_replay_file

    path = folder / "rank-00000.safetensors"
    numbers = torch.arange(2)
    clips, valid = torch.randn(2, 3, 2, 16, 16), torch.ones(2, dtype=torch.bool)
    batch = ClipBatch(clips, numbers, numbers + 4, valid, numbers + 7)
    about = BatchOrigin(step=3, rank=0, micro_batch=0, precision="fp32", words="x", paths=["a", "b"])
    write_replay_file(path, batch, about)
    return [path]


def read_kept_step(path: Path) -> None:
    from trainer.resilience.nan_replay import replay

    with contextlib.redirect_stdout(io.StringIO()):
        replay(path)


SETTINGS = {"seed": 3, "model.frames": 2, "data.train (class names)": ["a", "b", "c"], "model.weights": None}


def make_states(folder: Path) -> list[Path]:
    from trainer.checkpoint.metadata import STATE, TrainState, write_state

    _, description = small_model()
    state = TrainState(
        step=7, clips=56, bad=1, spent={"step": 2.5, "evaluation": 1}, updates=6, world_size=2, zero_stage=1,
        settings=SETTINGS, saved_at=1.7e9, description=description,
    )  # fmt: skip
    write_state(folder, state)
    return [folder / STATE]


def read_state(path: Path) -> None:
    """With a checksum that fits: the damage is older than it."""
    from trainer.checkpoint import metadata
    from trainer.checkpoint.shards import write_checksum
    from trainer.errors import UserError
    from trainer.inference.model_source import build_model

    write_checksum(path)
    state = metadata.read_state(path.parent)
    metadata.shards(path.parent, state)
    model, _ = small_model()
    with contextlib.suppress(UserError):
        metadata.check_settings(path, state.settings, SETTINGS, ())
    build_model(state, dict(model.state_dict()))


def make_locks(folder: Path) -> list[Path]:
    from trainer.resilience.lock_record import LockRecord

    own = LockRecord.own("token", flock=True, variables={})
    job = {"job": "12", "step": "0", "cluster": "c", "array_job": "11", "array_task": "3"}
    paths = []
    for number, record in enumerate(
        (own, dataclasses.replace(own, **job), dataclasses.replace(own, boot="b"))
    ):
        paths.append(folder / f"{number}.lock")
        paths[-1].write_text(record.text(), encoding="utf-8")
    return paths


def read_lock_file(path: Path) -> None:
    from trainer.resilience import lock_record

    record, _ = lock_record.read_lock(path)
    if record is None:
        return
    assert lock_record.LockRecord.read(record.text()) == record
    assert record.description and record.advice
    if record.job is None:  # of others, SLURM is asked
        record.state(path, {})


def make_scripts(folder: Path) -> list[Path]:
    import torch

    layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2).half())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(layers), str(folder / "model.pt"))
    return [folder / "model.pt"]


def read_script(path: Path) -> None:
    from models.weights.files import open_weights

    weights = open_weights(path)
    weights.read(weights.shapes)


def make_pickles(folder: Path) -> list[Path]:
    (script,) = make_scripts(folder)
    with zipfile.ZipFile(script) as archive:
        (folder / "data.pkl").write_bytes(archive.read(f"{script.stem}/data.pkl"))
    return [folder / "data.pkl"]


def read_pickle(path: Path) -> None:
    """In an archive that is otherwise whole, with a checksum that fits."""
    script = path.with_name("model.pt")
    with zipfile.ZipFile(script) as archive, zipfile.ZipFile(path.with_name("other.pt"), "w") as other:
        for member in archive.infolist():
            is_damaged = member.filename.endswith("/data.pkl")
            other.writestr(member.filename, path.read_bytes() if is_damaged else archive.read(member))
    read_script(path.with_name("other.pt"))


TARGETS = {
    "recipe": Target("recipe.yaml", make_recipes, read_recipe, copy_recipes),
    "manifest": Target("train.arrow", make_manifests, read_manifest),
    "weights": Target("weights.safetensors", make_weights, read_weights),
    "video": Target("clip.mp4", make_videos, read_video),
    "state": Target("state.json", make_states, read_state),
    "lock": Target("0.lock", make_locks, read_lock_file),
    "torchscript": Target("model.pt", make_scripts, read_script),
    "torchscript-objects": Target("data.pkl", make_pickles, read_pickle, make_scripts),
    "replay": Target("rank-00000.safetensors", make_kept_steps, read_kept_step, make_weights),
}


def serve(connection: Any) -> None:
    """Read inputs one after another. Answers with the traceback of an error, or None, and the peak memory in
    bytes.
    """
    import resource
    import traceback

    from models import ModelError
    from pipelines.errors import DataError
    from trainer.errors import UserError

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # messages of FFmpeg and other libraries about damage
    while True:
        try:
            name, path = json.loads(connection.recv_bytes())
        except EOFError:
            return
        found = None
        try:
            with contextlib.suppress(UserError, DataError, ModelError):
                TARGETS[name].read(Path(path))
        except BaseException:
            found = traceback.format_exc()
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        connection.send_bytes(json.dumps([found, peak]).encode())

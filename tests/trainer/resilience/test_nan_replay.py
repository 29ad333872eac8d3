"""What a run keeps of a step that went wrong is shown once more to the weights it met."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from models import UniFormerV2, create_model
from pipelines.augment.mixing import MixedLabels
from pipelines.loader import ClipBatch
from trainer.checkpoint.weights import save_weights
from trainer.errors import RunError
from trainer.resilience.nan_replay import FORMAT, WEIGHTS, BatchOrigin, replay, write_replay_file
from trainer.system.device import Precision

PATHS = ["/videos/[a]/one.mp4", "/videos/[/b]/two.mp4"]  # as rich's markup these would vanish, or raise


def model() -> UniFormerV2:
    torch.manual_seed(0)
    small = {"resolution": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "global_layers": (1,)}
    made = create_model("tiny", form="temporal", frames=4, num_classes=5, head_dropout=0.5, **small)
    with torch.no_grad():
        made.head.weight.mul_(20)  # so that a loss tells one precision, and one dropout mask, from another
    return made.train()


def batch(**changes: torch.Tensor) -> ClipBatch:
    """Two clips, the second of which is a stand-in."""
    torch.manual_seed(1)
    fields: dict[str, Any] = {
        "clips": torch.randn(2, 3, 4, 16, 16),
        "labels": torch.tensor([3, -1]),
        "ids": torch.tensor([17, 23]),
        "valid": torch.tensor([True, False]),
        "keys": torch.tensor([5, 2**62]),
    }
    return ClipBatch(**{**fields, **changes})


def kept(
    folder: Path,
    made: UniFormerV2,
    seen: ClipBatch,
    precision: Precision = "fp32",
    label_smoothing: float = 0.0,
) -> Path:
    """What a run leaves in its folder."""
    file = folder / "not-finite/step-0000008/rank-00001.safetensors"
    about = BatchOrigin(8, 1, 2, precision, "the output of [head] is NaN", PATHS, label_smoothing)
    write_replay_file(file, seen, about)
    description = {
        "model": dataclasses.asdict(made.config),
        "class_names": list("abcde"),
        "preprocessing": {},
        "recipe": {},
    }
    save_weights(file.parent / WEIGHTS, made.state_dict(), description)
    return file


def with_nan() -> ClipBatch:
    clips = batch().clips
    clips[1, 0, 2, 3, 4] = float("nan")
    return batch(clips=clips)


def test_clips_that_hold_a_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(kept(tmp_path, model(), with_nan()))
    shown = capsys.readouterr().out
    assert "step 8, rank 1, micro-batch 2, fp32" in shown
    assert "reason: the output of [head] is NaN" in shown
    assert "fp32: the clips themselves" in shown
    rows = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert all(path in shown for path in PATHS)
    assert rows["17"].split()[1] == "nan", "batch norm mixes the clips"
    assert "patch_embedding" in rows


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_a_module_that_overflows_is_named_in_the_runs_precision_too(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = model()
    with torch.no_grad():
        made.blocks[1].attention.qkv.weight.fill_(3e38)
    assert replay(kept(tmp_path, made, batch(), precision))
    shown = capsys.readouterr().out
    for said in {"fp32", precision}:
        assert f"{said}: the output of blocks.1.attention.qkv is" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith("blocks.1.attention.qkv")]
    assert len(rows) == len({"fp32", precision})
    assert all("3e+38" in row for row in rows), "the largest weight"


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_what_does_not_happen_again_is_said(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, seen = model(), batch()
    assert not replay(kept(tmp_path, made, seen, precision))
    shown = capsys.readouterr().out
    assert f"{precision}: all is finite" in shown
    assert "not reproduced" in shown
    clips = seen.clips
    if precision == "bf16":
        made, clips = made.bfloat16(), clips.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        logits = made(clips, seen.keys).float()
    expected = float(torch.nn.functional.cross_entropy(logits[:1], torch.tensor([3])))
    last = [line.split() for line in shown.splitlines() if ".mp4" in line][-2:]  # of the run's precision
    assert [(sample, loss) for sample, loss, _ in last] == [("17", f"{expected:.4g}"), ("23", "0")]


def test_the_loss_of_mixed_clips_has_both_labels_and_the_smoothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = model()
    second, weights = torch.tensor([1, -1]), torch.tensor([0.25, 1.0])
    seen = dataclasses.replace(batch(), mixed=MixedLabels(second, weights))
    file = kept(tmp_path, made, seen, label_smoothing=0.2)
    assert not replay(file)
    targets = torch.tensor([0.04, 0.8 * 0.75 + 0.04, 0.04, 0.8 * 0.25 + 0.04, 0.04])
    with torch.no_grad():
        expected = -float((targets * made(seen.clips, seen.keys)[0].log_softmax(0)).sum())
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("17 ")]
    assert float(row[1]) == pytest.approx(expected, rel=1e-3)  # four digits are printed


def test_what_is_no_kept_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"gone\.safetensors.*cannot be read"):
        replay(tmp_path / "gone.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors at all")
    with pytest.raises(RunError, match="cannot be read"):
        replay(tmp_path / "text.safetensors")
    save_file({"clips": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(RunError, match="not a replay file"):
        replay(tmp_path / "foreign.safetensors")
    file = kept(tmp_path, model(), batch())
    with pytest.raises(RunError, match="not a replay file"):
        replay(file.parent / WEIGHTS)
    (file.parent / WEIGHTS).unlink()
    with pytest.raises(RunError, match=r"weights\.safetensors is missing"):
        replay(file)


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    file = kept(tmp_path, model(), batch())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RunError, match="cannot be read"):
        replay(file)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": torch.tensor([3.0, 1.0])}, "labels are [2] of float32; the 2 videos it names"),
        (
            {"labels": torch.tensor([3, 5])},
            "a label is 5, and the model of weights.safetensors has 5 classes",
        ),
        ({"valid": torch.ones(2, 2, dtype=torch.bool)}, "valid are [2, 2] of bool"),
        ({"keys": torch.zeros(0, dtype=torch.int64)}, "keys are [0] of int64"),
        ({"clips": torch.zeros(2, 3, 4, 16, 17)}, "clips are [2, 3, 4, 16, 17] of float32"),
        ({"clips": torch.zeros(3, 3, 4, 16, 16)}, "the 2 videos it names and the model"),
    ],
)
def test_what_no_run_wrote_is_refused_before_it_is_shown(
    tmp_path: Path, changes: dict[str, torch.Tensor], words: str
) -> None:
    with pytest.raises(RunError, match=re.escape(words)):
        replay(kept(tmp_path, model(), batch(**changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "8"}, {"rank": True}, {"micro_batch": 1.5}, {"precision": []}, {"precision": "fp8"},
        {"words": 3}, {"paths": []}, {"paths": [1, 2]}, {"paths": {}},
    ],
)  # fmt: skip
def test_what_no_run_said_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = kept(tmp_path, model(), batch())
    with safe_open(file, framework="pt") as stored:
        about = json.loads(stored.metadata()["about"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
    save_file(tensors, file, metadata={"format": FORMAT, "about": json.dumps(about | changes)})
    with pytest.raises(RunError, match="damaged"):
        replay(file)


def test_what_is_shown_commands_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = kept(tmp_path, model(), batch())
    with safe_open(file, framework="pt") as stored:
        about = json.loads(stored.metadata()["about"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
    about |= {"words": "\x1b[2Jgone", "paths": ["\x1b]0;title\x07", "a\nb"]}
    save_file(tensors, file, metadata={"format": FORMAT, "about": json.dumps(about)})
    replay(file)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown and r"\x1b[2Jgone" in shown

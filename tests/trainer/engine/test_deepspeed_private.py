"""The contract with DeepSpeed: its private members that are used exist, and one file alone uses them."""

import ast
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import trainer.engine.deepspeed_engine as engine_module
from tests.trainer.checkpoint.training import make_engine, train
from tests.trainer.ranks import Ranks
from trainer.engine import deepspeed_private as private

ENGINE = Path(private.__file__).parent


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    with Ranks(1) as ranks:
        yield ranks


def use_all_members(stage: int, precision: str) -> list[str]:
    """The error for a member that DeepSpeed lacks, if any. Importing DeepSpeed uses the other members."""
    missing = []
    try:
        with mock.patch.object(engine_module, "choose_precision", lambda *_: precision):
            engine = make_engine(stage, precision=precision, form="scene")
        train(engine, 0, 1)
        deepspeed = engine.deepspeed
        private.use_group(dist.group.WORLD)
        for parameter in engine.model.parameters():
            private.find_master_part(deepspeed, stage, parameter)
        private.sync_model_weights(deepspeed, stage)
        assert private.base_optimizer(deepspeed).state
        private.set_counters(deepspeed, private.read_counters(deepspeed))
        if stage:
            assert private.gradient_norm(deepspeed).isfinite()
    except RuntimeError as error:
        missing.append(str(error))
    return missing


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32")]
)
def test_this_version_of_deepspeed_has_all_members_that_are_used(
    alone: Ranks, stage: int, precision: str
) -> None:
    """In bf16, stage 1 has an optimiser of its own class."""
    assert alone.run(use_all_members, stage, precision) == [[]]


def test_a_missing_member_is_named_with_its_owner_and_the_version() -> None:
    with pytest.raises(RuntimeError, match=r"DeepSpeed 0\.19\.\d+: Linear has no member _hp_mapping"):
        private._member(torch.nn.Linear(1, 1), "_hp_mapping")
    with pytest.raises(RuntimeError, match="_WORLD_GROUP_OF_OLD"):
        private._replace(private, "_WORLD_GROUP_OF_OLD", None)  # type: ignore[arg-type]


def attributes(path: Path) -> set[str]:
    """Names of attributes that a file reads or sets, except those of `self` and private ones of torch."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "torch")
        ):
            found.add(node.attr)
    return found


def test_no_other_file_uses_them() -> None:
    tree = ast.parse(Path(private.__file__).read_text(encoding="utf-8"))
    members = {
        argument.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("_member", "_replace")
        for argument in node.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }
    assert "_hp_mapping" in members and "is_invalid_grad_norm" in members
    for path in ENGINE.glob("*.py"):
        if path.name != "deepspeed_private.py":
            used = attributes(path)
            assert not used & {*members, *private._COUNTERS}, path
            if path.name == "step_kernels.py":  # counts operations of torch, by names that are torch's
                continue
            assert not {name for name in used if name.startswith("_") and not name.startswith("__")}, path

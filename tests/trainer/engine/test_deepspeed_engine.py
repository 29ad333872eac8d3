"""The engine under a real DeepSpeed, one rank; two ranks are in tests/integration."""

import importlib
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import trainer.engine.deepspeed_engine as engine_module
from models import create_model
from models.local_block import use_fp8
from tests.trainer.ranks import MEETING_MINUTES, Ranks, free_port
from trainer.config.schema import Recipe
from trainer.distributed.environment import Environment, find_environment
from trainer.engine import deepspeed_private, process_group
from trainer.engine.batch_plan import BatchPlan
from trainer.engine.deepspeed_engine import Engine
from trainer.engine.process_group import connect, disconnect
from trainer.errors import RunError, StartAgain
from trainer.system.device import check_fp8, choose_precision, set_numerics

SMALL = {"resolution": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "global_layers": (1,)}


@pytest.fixture(scope="module")
def alone(device: torch.device) -> Iterator[Environment]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # so that what is set meanwhile is gone again afterwards
            patch.delenv(name)
        environment = find_environment(device.type)  # type: ignore[arg-type]
        if device.type == "cuda":  # bits are compared
            set_numerics(deterministic=True)
        connect(environment)
        yield environment
        disconnect()
        torch.use_deterministic_algorithms(False)


def test_a_gpu_without_products_in_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    for capability, text in (((8, 0), "8.0"), ((7, 5), "7.5")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        with pytest.raises(RunError, match=rf"engine\.fp8 needs .* 8\.9 .*A100 has {text}"):
            check_fp8(gpu)
    for newer in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=newer: found)
        check_fp8(gpu)
    check_fp8(torch.device("cpu"))


def test_a_package_is_unavailable_only_inside_and_only_if_it_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("new_package", "known_package"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("known_package")
    with deepspeed_private._unavailable("new_package"), deepspeed_private._unavailable("known_package"):
        importlib.import_module("known_package")
        with pytest.raises(ImportError):
            importlib.import_module("new_package")
    importlib.import_module("known_package")
    importlib.import_module("new_package")


def engine(
    alone: Environment, *, stage: int, precision: str = "fp32", accumulation: int = 1, **fields: Any
) -> Engine:
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "model": {"preset": "tiny", "form": "temporal", "frames": 4},
            "data": {"train": "a", "val": "b"},
            "optimisation": {
                "global_batch": 4 * accumulation,
                "steps": 5,
                "learning_rate": 1e-2,
                "clip_norm": 1,
            },
            "engine": {"zero_stage": stage, "precision": precision, **fields},
        }
    )
    torch.manual_seed(0)
    model = create_model("tiny", form="temporal", frames=4, num_classes=4, head_dropout=0.3, **SMALL)
    made = Engine(model, recipe, alone, BatchPlan(stage, 4, accumulation, recomputed_blocks=0))
    made.train()
    return made


def clips(seed: int) -> torch.Tensor:
    """On the CPU, the same for every device."""
    return torch.randn(4, 3, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def loss_of(made: Engine, seed: int) -> torch.Tensor:
    """Of fixed clips, with dropout."""
    return F.cross_entropy(made.forward(clips(seed).to(made.device)), torch.arange(4, device=made.device))


def steps(made: Engine, count: int) -> list[float]:
    """Train on fixed clips, with dropout; returns the losses."""
    losses = []
    for seed in range(count * made.accumulation):
        loss = loss_of(made, seed)
        made.backward(loss)
        made.step(1e-2)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_products_are_in_fp8_where_the_recipe_asks_for_it(alone: Environment, stage: int) -> None:
    made, plain = engine(alone, stage=stage, fp8=True), engine(alone, stage=stage)
    torch.manual_seed(0)
    model = create_model("tiny", form="temporal", frames=4, num_classes=4, head_dropout=0.3, **SMALL)
    use_fp8(model.to(made.device))
    keys = torch.arange(4, device=made.device)
    logits, expected = (module(clips(0).to(made.device), keys) for module in (made.forward, model.train()))
    torch.testing.assert_close(logits, expected)
    assert not torch.allclose(logits, plain.forward(clips(0).to(made.device), keys), atol=1e-3)
    before = made.gather_weights()
    steps(made, 2)
    after = made.gather_weights()
    assert not torch.equal(before["blocks.0.mlp.expand.weight"], after["blocks.0.mlp.expand.weight"])
    made.eval()
    model.eval()
    with torch.no_grad():
        model.load_state_dict(after)
        assert torch.allclose(
            made.forward(clips(1).to(made.device)), model(clips(1).to(made.device)), atol=1e-5
        )


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_inside_preserved_state_change_nothing(alone: Environment, stage: int, precision: str) -> None:
    def run(dry_run: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        made = engine(alone, stage=stage, precision=precision, accumulation=2)
        if dry_run:
            with made.preserved_state():
                for _ in range(2):
                    made.backward(loss_of(made, 99) * 0.0)
                    made.step(0.0)
        return steps(made, 3), made.gather_weights()

    (plain_losses, plain), (losses, weights) = run(False), run(True)
    assert losses == plain_losses
    assert losses[-1] != losses[0]
    for name, tensor in plain.items():
        assert torch.equal(tensor, weights[name]), name


def test_stages_agree_and_keep_the_gradient_norm(alone: Environment) -> None:
    results = {}
    for stage in range(4):
        made = engine(alone, stage=stage)
        losses = steps(made, 4)
        norm = made.gradient_norm()
        assert norm is not None
        results[stage] = (losses, float(norm))
        assert {group["lr"] for group in made.deepspeed.optimizer.param_groups} == {1e-2}
    for stage in (1, 2, 3):
        torch.testing.assert_close(results[stage][0], results[0][0], atol=1e-5, rtol=0)
        assert results[stage][1] == pytest.approx(results[0][1], rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_starts_with_the_exact_weights(alone: Environment, stage: int) -> None:
    """Not with the rounded ones, from which DeepSpeed makes its master copy."""
    torch.manual_seed(0)
    model = create_model("tiny", form="scene", frames=4, num_classes=4, **SMALL)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert any(not torch.equal(weight, weight.bfloat16()) for weight in before.values())
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "model": {"preset": "tiny", "form": "scene", "frames": 4},
            "data": {"train": "a", "val": "b"},
            "optimisation": {"global_batch": 4, "steps": 5, "learning_rate": 1e-2, "ema_decay": 0.9},
            "engine": {"zero_stage": stage},
        }
    )
    with mock.patch.object(engine_module, "choose_precision", lambda *_: "bf16"):
        made = Engine(model, recipe, alone, BatchPlan(stage, 4, 1, recomputed_blocks=0))
    for averaged in (nullcontext, made.ema_weights):
        with averaged():
            for name, weight in made.gather_weights().items():
                assert torch.equal(weight, before[name]), name
    made.eval()
    model = create_model("tiny", form="scene", frames=4, num_classes=4, **SMALL).bfloat16().eval()
    model.load_state_dict(before)
    model.to(made.device)
    with torch.no_grad():
        expected = model(clips(0).bfloat16().to(made.device), None).float()
        found = made.forward(clips(0).to(made.device))
        assert torch.equal(found, expected), "what it computes with follows"


def timeout_of_deepspeed() -> float:
    made = engine(find_environment("cpu"), stage=1)
    group = made.deepspeed.data_parallel_group
    assert group is not None
    assert group is not dist.group.WORLD
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_deepspeeds_collectives_have_the_timeout_of_the_group() -> None:
    """Its own group would have torch's, which for NCCL is shorter than the watchdog's."""
    with Ranks(2) as ranks:
        assert ranks.run(timeout_of_deepspeed) == [60 * MEETING_MINUTES] * 2


def connect_without_an_answer() -> str:
    with (
        mock.patch.object(process_group, "_join", lambda *_: time.sleep(60)),
        pytest.raises(StartAgain) as refusal,
    ):
        disconnect()
        os.environ["MASTER_PORT"] = str(free_port())
        connect(find_environment("cpu"), rendezvous=0.01)
    return str(refusal.value)


def test_ranks_that_do_not_get_connected_end_in_time() -> None:
    with Ranks(1) as ranks:
        said = ranks.run(connect_without_an_answer)[0]
    assert "all 1 ranks met, but gloo did not connect them within 0.01 minutes" in said


def connect_while_a_node_dies() -> str:
    died = dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1\nLast error:\nconnection reset")
    with (
        mock.patch.object(process_group, "_join", side_effect=died),
        pytest.raises(StartAgain) as refusal,
    ):
        disconnect()
        os.environ["MASTER_PORT"] = str(free_port())
        connect(find_environment("cpu"))
    return str(refusal.value)


def test_a_node_that_dies_while_all_connect_has_the_run_started_again() -> None:
    with Ranks(1) as ranks:
        said = ranks.run(connect_while_a_node_dies)[0]
    assert "all 1 ranks met, but gloo could not connect them: NCCL error" in said
    assert "Last error: connection reset" in said


def number_of_the_gpu() -> str:
    os.environ["LOCAL_RANK"] = "3"
    deepspeed_private.import_deepspeed(torch.device("cuda", 0))
    return os.environ["LOCAL_RANK"]


def test_deepspeed_gets_the_number_of_the_gpu_and_not_the_rank() -> None:
    """A task that sees its own GPU only has number 0 of it, whatever its rank."""
    with Ranks(1) as ranks:
        assert ranks.run(number_of_the_gpu) == ["0"]


def test_precision_follows_the_device() -> None:
    assert choose_precision("auto", torch.device("cuda")) == "bf16"
    assert choose_precision("auto", torch.device("cpu")) == "fp32"
    with pytest.raises(RunError, match="bf16 needs a GPU"):
        choose_precision("bf16", torch.device("cpu"))

"""Measures one implementation of one model: `measure_model`, in a process of its own."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.plain import PlainUniFormerV2, load_weights
from models import UniFormerV2, UniFormerV2Config
from trainer.benchmark.timing import OtherPrograms, mapped_tensors, measure_costs, peak_bytes
from trainer.engine.optimizer import SkippableAdamW

THIS, PLAIN, PLAIN_FROZEN = "this model", "plain", "plain, no gradient of the backbone"
COMPILED = "this model, compiled"
IMPLEMENTATIONS = (THIS, COMPILED, PLAIN, PLAIN_FROZEN)


def measure_model(
    implementation: str,
    config: dict[str, Any],
    batch: int,
    device: str,
    precision: str,
    threads: int,
    seconds: float,
) -> dict[str, Any]:
    """The costs of forward passes without gradients and of training steps, and the peak memory of a step.

    A step is forward, cross-entropy, backward and AdamW, from no gradients on. All implementations have the
    same weights and clips, and hand back the logits of each clip. seconds: of forward passes and of steps,
    each; at least one of both is measured.
    """
    torch.set_num_threads(threads)
    place = torch.device(device)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(1)
    side = config["resolution"]
    with mapped_tensors():
        model = build(implementation, UniFormerV2Config(**config), place, precision)
        clips = torch.randn(batch, 3, config["frames"], side, side, generator=generator).to(place, kind)
        labels = torch.arange(batch, device=place) % config["num_classes"]
        optimiser = _create_optimiser(model, of_trainer=implementation in (THIS, COMPILED))

        def forward() -> Tensor:
            model.eval()
            with torch.no_grad():
                return model(clips)

        def step() -> None:
            model.train()
            F.cross_entropy(model(clips).float(), labels).backward()
            optimiser.step()
            model.zero_grad(set_to_none=True)

        logits = forward().float().tolist()
        step()  # makes the moments
        peak = peak_bytes(step, place)
    others = OtherPrograms()
    forwards = measure_costs(forward, place, seconds)
    steps = measure_costs(step, place, seconds)
    return {
        "forward": [asdict(cost) for cost in forwards],
        "step": [asdict(cost) for cost in steps],
        "others": others.cores(),
        "peak_bytes": peak,
        "logits": logits,
    }


def build(implementation: str, config: UniFormerV2Config, device: torch.device, precision: str) -> nn.Module:
    """The model with weights drawn from a fixed seed, equal for all implementations."""
    torch.manual_seed(0)
    with device:
        ours = UniFormerV2(config)
    with torch.no_grad():
        # Layers that are zero in a new model would make parts of it cheaper to differentiate.
        for parameter in ours.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    model: nn.Module = ours
    if implementation in (PLAIN, PLAIN_FROZEN):
        with device:
            plain = PlainUniFormerV2(config, through_frozen=implementation == PLAIN)
        load_weights(plain, ours.state_dict())
        del ours
        model = plain
    if precision == "bf16":
        model.bfloat16()
    if implementation == COMPILED:
        model.forward = torch.compile(model.forward, fullgraph=True)
    return model


def _create_optimiser(model: nn.Module, *, of_trainer: bool) -> torch.optim.AdamW:
    """The trainer's, or else torch's by default."""
    trained = _trained(model)
    if not of_trainer:
        return torch.optim.AdamW(trained, lr=1e-6)
    is_finite = torch.ones((), dtype=torch.bool, device=trained[0].device)
    return SkippableAdamW(trained, lambda: is_finite, lr=1e-6, fused=True)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    if isinstance(model, PlainUniFormerV2):
        return model.trained_parameters()
    return [parameter for parameter in model.parameters() if parameter.requires_grad]

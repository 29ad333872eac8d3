"""From a recipe to a DeepSpeed engine: precision, ZeRO stage, accumulation, clipping, optimiser.

Only this file and `checkpoint.py` know DeepSpeed. What the loop sees is `Engine`: forward, backward, step.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer import RunError
from trainer.engine.layout import Layout
from trainer.engine.optim import parameter_groups
from trainer.environment import Environment
from trainer.recipe.schema import Recipe

Precision = Literal["fp32", "bf16", "autocast"]

COLLECTIVE_LIMIT = timedelta(minutes=30)  # how long ranks wait for one another, rendering included


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """Resolve `auto`: bf16 on a GPU, fp32 on a CPU, where a bf16 product is a hundred times slower.

    Raises RunError for bf16 on a CPU: its batch norm takes no bf16 weights there; autocast does that work.
    """
    if wanted == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if wanted == "bf16" and device.type == "cpu":
        raise RunError(
            "engine.precision bf16 needs a GPU; on a CPU use fp32 (fast) or autocast (bf16 products)"
        )
    return wanted  # type: ignore[return-value]


def connect(environment: Environment) -> None:
    """Join the process group of all ranks; the environment's `env://` variables are set already.

    Raises RunError when the ranks cannot meet, as when another run has their port.
    """
    deepspeed = _import_deepspeed(environment.device)
    if not dist.is_initialized():
        backend = "nccl" if environment.device.type == "cuda" else "gloo"
        try:
            deepspeed.init_distributed(dist_backend=backend, timeout=COLLECTIVE_LIMIT, verbose=False)
        except dist.DistNetworkError as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise RunError(
                f"the ranks cannot meet at {place}: {str(error).splitlines()[0]}. If another run of this "
                "machine uses that port, name a free one: deepspeed --master_port 29501 launch/train.py ..."
            ) from error


def disconnect() -> None:
    """Leave the process group, where one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Engine:
    """A model under DeepSpeed, with the optimiser of the recipe.

    micro_batch: clips per rank and forward pass. accumulation: micro-batches per optimiser step. zero_stage:
    what is partitioned over the ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        environment: Environment,
        layout: Layout,
    ) -> None:
        self.micro_batch = layout.micro_batch
        self.accumulation = layout.accumulation
        self.device = environment.device
        self.precision = choose_precision(recipe.engine.precision, environment.device)
        self.zero_stage = layout.zero_stage
        # Without ZeRO and without bf16, DeepSpeed clips the gradients but does not keep their norm.
        self._keeps_no_norm = self.zero_stage == 0 and self.precision != "bf16"
        self._norm: Tensor | None = None
        deepspeed = _import_deepspeed(environment.device)
        if environment.device.type == "cuda" and environment.world_size > 1:
            # Only CUDA has it, and it must be there before the parameters are partitioned.
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        optimisation = recipe.optimisation
        optimiser = torch.optim.AdamW(
            parameter_groups(model, optimisation.weight_decay),
            lr=optimisation.learning_rate,
            betas=optimisation.betas,
            eps=optimisation.eps,
        )
        # Handing over torch's own AdamW: a configured one would compile DeepSpeed's at start.
        self.deepspeed, *_ = deepspeed.initialize(
            model=model.to(environment.device), optimizer=optimiser, config=self._config(recipe)
        )
        if recipe.engine.compile:
            self.deepspeed.compile()

    def _config(self, recipe: Recipe) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": recipe.optimisation.clip_norm or 0.0,
            "zero_optimization": {"stage": self.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": self.precision == "bf16"},
            "torch_autocast": {"enabled": self.precision == "autocast", "dtype": "bfloat16"},
            "steps_per_print": 2**31 - 1,  # the trainer prints
        }

    @property
    def model(self) -> nn.Module:
        return self.deepspeed.module

    def forward(self, clips: Tensor) -> Tensor:  # B 3 T H W -> B K
        """Logits in float32; the clips are cast to what the precision computes in."""
        clips = clips.to(torch.bfloat16) if self.precision == "bf16" else clips
        return self.deepspeed(clips).float()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch; `loss` is its mean, DeepSpeed divides by accumulation."""
        self.deepspeed.backward(loss)

    def step(self, learning_rate: float | None = None) -> None:
        """To be called after each micro-batch; the last of an accumulation changes the weights."""
        if learning_rate is not None:
            for group in self.deepspeed.optimizer.param_groups:
                group["lr"] = learning_rate
        if self._keeps_no_norm and self.deepspeed.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self._norm = nn.utils.get_total_norm(gradients)
        self.deepspeed.step()

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    def gradient_norm(self) -> Tensor | float | None:
        """Norm of the whole gradient before clipping, at the last step; None before the first.

        A tensor may still be on its way to being computed: turning it into a number waits for it.
        """
        return self._norm if self._keeps_no_norm else self.deepspeed.get_global_grad_norm()

    def average_statistics(self) -> None:
        """Make the batch norms' running statistics the same on all ranks, their mean.

        They drift apart where each rank's batch norm sees its own clips only.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        for buffer in self.model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()

    def weights(self) -> dict[str, Tensor]:
        """All weights in float32, the optimiser's master copy where there is one, on the CPU.

        To be called on all ranks; only rank 0 gets them, the others an empty dictionary.
        """
        self.average_statistics()
        keep = not dist.is_initialized() or dist.get_rank() == 0
        state = {}
        for name, parameter in self.model.named_parameters():
            full = self._full_weight(parameter)
            if keep:
                state[name] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
        if keep:
            for name, buffer in self.model.named_buffers():
                kind = torch.float32 if buffer.is_floating_point() else buffer.dtype
                state[name] = buffer.detach().to("cpu", kind, copy=True)
        return state

    def _full_weight(self, parameter: nn.Parameter) -> Tensor:
        if self.precision == "bf16" or self.zero_stage == 3:
            from deepspeed.utils import safe_get_full_fp32_param

            full = safe_get_full_fp32_param(parameter)
            if full is not None:
                return full
        if self.zero_stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        return parameter

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """What happens inside leaves weights, optimiser, counters, statistics and random states as they were.

        The one condition: the gradients of any step inside are zero and its learning rate is 0, so that
        AdamW allocates its moments and leaves them at zero. Only the step counts are then set back.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        devices = [self.device] if self.device.type == "cuda" else []
        counters = {name: getattr(self.deepspeed, name) for name in _COUNTERS}
        with torch.random.fork_rng(devices=devices):
            yield
        for buffer, saved in buffers:
            buffer.copy_(saved)
        for name, value in counters.items():
            setattr(self.deepspeed, name, value)
        optimiser = self.deepspeed.optimizer
        for state in getattr(optimiser, "optimizer", optimiser).state.values():
            if "step" in state:
                state["step"].zero_()


_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed (seconds, so late) for this device, with nothing compiled at start."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed 0.19 calls collectives by names that torch 2.14 is about to drop, thousands of times a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    import deepspeed.ops

    # `init_distributed` would compile a shared-memory collective for CPUs, which takes over a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed

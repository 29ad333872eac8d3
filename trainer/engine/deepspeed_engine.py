"""`Engine`: a model under DeepSpeed, with the optimiser, precision and ZeRO stage of a recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.batch_norm import convert_batch_norm
from models.local_block import use_fp8
from trainer.config.schema import Recipe
from trainer.distributed.async_copy import AsyncCopy
from trainer.distributed.environment import Environment
from trainer.engine.batch_plan import BatchPlan
from trainer.engine.deepspeed_private import (
    gradient_norm,
    import_deepspeed,
    read_counters,
    set_counters,
    sync_model_weights,
)
from trainer.engine.ema import Ema
from trainer.engine.optimizer import SkippableAdamW, parameter_groups
from trainer.engine.state_shards import StateShard, find_state_shards, set_update_count
from trainer.system.device import choose_precision, compute_logits, restored_buffers


class Engine:
    """A model under DeepSpeed, with the optimiser of the recipe."""

    def __init__(self, model: nn.Module, recipe: Recipe, environment: Environment, plan: BatchPlan) -> None:
        self.micro_batch = plan.micro_batch
        """Clips per rank and forward pass."""
        self.accumulation = plan.accumulation
        """Micro-batches per optimiser step."""
        self.zero_stage = plan.zero_stage
        """What DeepSpeed partitions over the ranks, see `engine.zero_stage` of a recipe."""
        self.updates = 0
        """How often the weights were changed, by the steps up to the last `finish_step`."""
        self.device = environment.device
        self.precision = choose_precision(recipe.engine.precision, environment.device)
        self._norm: Tensor | None = None  # at stage 0, where DeepSpeed clips but does not keep the norm
        self._finite: Tensor | None = None  # whether the current step's gradient is, on the device
        self._in_step = False  # whether a forward pass of a step has run, and its update has not
        self._pending: AsyncCopy | None = None  # whether the gradient of the last step was finite
        self._changed: bool | None = None  # whether the last step changed the weights
        if recipe.engine.fp8:
            use_fp8(model)
        deepspeed = import_deepspeed(environment.device)
        # Before the parameters are partitioned.
        model = convert_batch_norm(model, environment.device, compiled=recipe.engine.compile)
        # DeepSpeed rounds the weights to bf16 before it makes its master copy of them.
        exact = {}
        if self.precision == "bf16":
            exact = {name: weight.detach().float().cpu() for name, weight in model.named_parameters()}
        optimisation = recipe.optimisation
        optimiser = SkippableAdamW(
            parameter_groups(model, optimisation.weight_decay, optimisation.layer_decay),
            self._gradient_is_finite,
            lr=optimisation.learning_rate,
            betas=optimisation.betas,
            eps=optimisation.eps,
            fused=recipe.engine.fused is not False,
        )
        # torch's own AdamW: one named in the configuration would compile DeepSpeed's at start.
        self.deepspeed, *_ = deepspeed.initialize(
            model=model.to(environment.device), optimizer=optimiser, config=self._config(recipe)
        )
        if exact:
            self._set_weights(exact)
        if recipe.engine.compile:
            # The forward alone: not every version of torch can trace DeepSpeed's hooks around it. A graph
            # break in a recomputed block would count batch norms' statistics twice, so it is an error.
            self.model.forward = torch.compile(self.model.forward, fullgraph=True)
        # With the batch counts, which are restored too when a step is skipped.
        self._statistics = list(self.model.buffers())
        self._statistics_before = [buffer.clone() for buffer in self._statistics]
        self._clip_norm = optimisation.clip_norm
        self._decay = optimisation.ema_decay
        self.ema: Ema | None = None
        self.start_ema()

    def _set_weights(self, weights: dict[str, Tensor]) -> None:
        for shard in find_state_shards(self.deepspeed, self.zero_stage):
            kind, _, name = shard.key.partition("/")
            if kind == "weight":
                shard.values.copy_(weights[name].view(-1)[shard.start : shard.start + shard.count])
        sync_model_weights(self.deepspeed, self.zero_stage)

    def _config(self, recipe: Recipe) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": (recipe.optimisation.clip_norm or 0.0) if self.zero_stage else 0.0,
            "zero_optimization": {"stage": self.zero_stage},
            "zero_allow_untested_optimizer": True,
            # Its check for gradients that are not finite waits for the device.
            "bf16": {"enabled": self.precision == "bf16", "check_grad_overflow": False},
            # Many small gradients added up in bf16 would lose most of each.
            "data_types": {"grad_accum_dtype": "fp32" if self.precision == "bf16" else None},
            "torch_autocast": {"enabled": self.precision == "autocast", "dtype": "bfloat16"},
            "steps_per_print": 2**31 - 1,  # the trainer prints
            # This timer waits for the GPU twice a micro-batch.
            "timers": {"throughput": {"enabled": False}},
        }

    @property
    def model(self) -> nn.Module:
        return self.deepspeed.module

    def forward(self, clips: Tensor, keys: Tensor | None = None) -> Tensor:  # B 3 T H W, B -> B K
        """Logits in float32; the clips are cast to what the precision computes in.

        keys: seeds of the clips' dropout masks; only needed in training.
        """
        if self.model.training and not self._in_step:
            self._save_statistics()
            self._in_step = True
        return self._logits(clips, keys)

    def _logits(self, clips: Tensor, keys: Tensor | None) -> Tensor:
        clips = clips.to(torch.bfloat16) if self.precision == "bf16" else clips
        return self.deepspeed(clips, keys).float()

    def _save_statistics(self) -> None:
        if self._statistics:
            torch._foreach_copy_(self._statistics_before, self._statistics)

    def forward_outside_step(self, clips: Tensor, keys: Tensor) -> Tensor:
        """Logits as in training, but part of no step: DeepSpeed does not see a backward that follows.

        At stage 3 only DeepSpeed can gather the weights, and it would see it: no backward may follow there.
        """
        if self.zero_stage == 3:
            return self._logits(clips, keys)
        return compute_logits(self.precision, self.model, clips, keys)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch; `loss` is its mean, DeepSpeed divides by accumulation."""
        self.deepspeed.backward(loss)

    def step(self, learning_rate: float) -> None:
        """To be called after each micro-batch; the last of an accumulation changes the weights.

        Where the gradient over all ranks is not finite, weights, moments and statistics of batch norms stay
        as they were before the step. The device decides that, and `finish_step` returns it later. The only
        wait is for the step before this one.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        ends = self.deepspeed.is_gradient_accumulation_boundary()
        if ends:
            self._finish_last_step()  # before its weights change: the EMA needs them
            self._finite = None
            if self.zero_stage == 0:
                self._clip_gradients()
        self.deepspeed.step()
        if not ends:
            return
        finite = self._gradient_is_finite()
        for now, before in zip(self._statistics, self._statistics_before, strict=True):
            torch.where(finite, now, before, out=now)
        self._in_step = False
        self._pending = AsyncCopy(finite)

    def _clip_gradients(self) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self._norm = nn.utils.get_total_norm(gradients)
        if self._clip_norm is not None:
            torch._foreach_mul_(gradients, (self._clip_norm / (self._norm + 1e-6)).clamp(max=1.0))

    def _gradient_is_finite(self) -> Tensor:
        """Whether the gradient over all ranks is, on the device."""
        if self._finite is None:
            norm = gradient_norm(self.deepspeed) if self.zero_stage else self._norm
            assert norm is not None
            self._finite = norm.isfinite() & (norm >= 0)
        return self._finite

    def _finish_last_step(self) -> None:
        """Wait for the last step, where that is not done, and count it if it changed the weights."""
        if self._pending is None:
            return
        self._changed = bool(self._pending.values())
        self._pending = None
        if not self._changed:
            return
        self.updates += 1
        if self.ema is not None:
            if not self._in_step:  # within a step, those saved are those after the last one
                self._save_statistics()
            self.ema.update(self.updates)

    def finish_step(self) -> bool | None:
        """Wait for the last step. Returns whether it changed the weights, the same on all ranks.

        None where an earlier call returned that. To be called after each step, before the next one ends.
        """
        self._finish_last_step()
        changed, self._changed = self._changed, None
        return changed

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    def gradient_norm(self) -> Tensor | float | None:
        """Norm of the whole gradient before clipping, at the last step; None before the first.

        The device may not have computed a tensor yet: turning it into a number waits for it.
        """
        return self.deepspeed.get_global_grad_norm() if self.zero_stage else self._norm

    def state_shards(self) -> list[StateShard]:
        """What this rank holds of the training state, after `finish_step`; `resume` completes a write."""
        assert self._pending is None, "the last step must be finished first"
        ema = [] if self.ema is None else self.ema.shards
        return find_state_shards(self.deepspeed, self.zero_stage) + ema

    def resume(self, updates: int) -> None:
        """Continue from the values written into the state shards, after so many updates. Collective."""
        self.updates = updates
        set_update_count(self.deepspeed, updates)
        sync_model_weights(self.deepspeed, self.zero_stage)

    def start_ema(self) -> None:
        """Start the EMA, where the recipe asks for one, from the weights as they are now."""
        if self._decay is not None:
            names = (name for name, _ in self.model.named_buffers())
            kept = {
                f"buffer/{name}": before.view(-1)
                for name, before in zip(names, self._statistics_before, strict=True)
            }
            self.ema = Ema(find_state_shards(self.deepspeed, self.zero_stage), self._decay, kept)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, the model's weights are their EMA, where the recipe asks for one. Collective."""
        self._finish_last_step()
        if self.ema is None:
            yield
            return
        with self.ema.in_place():
            sync_model_weights(self.deepspeed, self.zero_stage)
            yield
        sync_model_weights(self.deepspeed, self.zero_stage)

    def gather_weights(self) -> dict[str, Tensor]:
        """All weights and statistics of batch norms after the last step, on the CPU. Collective.

        Weights are float32, from the optimiser's master copy where there is one. Only rank 0 gets them, the
        other ranks an empty dictionary.
        """
        keep = not dist.is_initialized() or dist.get_rank() == 0
        state = {}
        for name, parameter in self.model.named_parameters():
            full = self._full_weight(parameter)
            if keep:
                state[name] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
        if keep:
            # Within a step, forward passes have changed the statistics already.
            buffers = self._statistics_before if self._in_step else self._statistics
            for (name, _), buffer in zip(self.model.named_buffers(), buffers, strict=True):
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
    def preserved_state(self) -> Iterator[None]:
        """Steps inside leave weights, optimiser, counters, statistics and random states as they were.

        Their gradients must be zero and their learning rate 0, so that AdamW allocates its moments and leaves
        them at zero; this resets the step counts.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        counters = read_counters(self.deepspeed)
        with restored_buffers(self.model):
            with torch.random.fork_rng(devices=devices):
                yield
            self.finish_step()
        set_counters(self.deepspeed, counters)
        self.updates = 0
        set_update_count(self.deepspeed, 0)
        self.start_ema()  # it averaged statistics of the batches inside

"""From a recipe to a DeepSpeed engine: precision, ZeRO stage, accumulation, clipping, optimiser.

Only this folder knows DeepSpeed. What the loop sees is `Engine`: forward, backward, step.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.batch_norm import convert_batch_norm
from trainer.config.schema import Recipe
from trainer.distributed.async_copy import AsyncCopy
from trainer.distributed.environment import Environment
from trainer.distributed.rendezvous import rendezvous_address, restrict_gloo_to_loopback, wait_for_all_ranks
from trainer.engine.batch_plan import BatchPlan
from trainer.engine.deepspeed_private import keep_norms_on_device
from trainer.engine.ema import Ema
from trainer.engine.memory_estimate import Precision
from trainer.engine.optimizer import SkippableAdamW
from trainer.engine.parameter_groups import parameter_groups
from trainer.engine.state_shards import StateShard, find_state_shards, set_update_count, sync_model_weights
from trainer.errors import RunError, StartAgain
from trainer.system.precision import compute_logits
from trainer.system.timeouts import run_with_timeout

COLLECTIVE_MINUTES = 30.0  # that ranks wait for one another at least, rendering included
RENDEZVOUS_MINUTES = 10.0  # within which all ranks must have come, where the recipe is not asked


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


def connect(
    environment: Environment,
    patience: float = COLLECTIVE_MINUTES,
    rendezvous: float = RENDEZVOUS_MINUTES,
) -> None:
    """Join the process group of all ranks as `join` does, and have DeepSpeed work in it."""
    deepspeed = _import_deepspeed(environment.device)
    if dist.is_initialized():
        return
    copy = join(environment, patience, rendezvous)
    # It finds the group that there is, and makes none.
    deepspeed.init_distributed(
        dist_backend=_backend(environment), timeout=timedelta(minutes=patience), verbose=False
    )
    # Its engines work in a copy of the group, which would have torch's patience: 10 minutes with NCCL, whose
    # own watchdog then kills the process.
    from deepspeed.utils import groups

    groups._WORLD_GROUP = copy


def join(
    environment: Environment,
    patience: float = COLLECTIVE_MINUTES,
    rendezvous: float = RENDEZVOUS_MINUTES,
) -> Any:
    """Join the process group of all ranks; the environment's `env://` variables are set already.

    patience: minutes that a rank waits for the others in a collective. rendezvous: minutes within which all
    must have come, and within as many more be connected. Returns a copy of the group. Raises RunError when
    the ranks cannot meet, as when another run has their port, and StartAgain when some rank does not come, or
    they cannot be connected.
    """
    backend = _backend(environment)
    timeout = timedelta(minutes=patience)
    address, port = rendezvous_address(environment)
    restrict_gloo_to_loopback(environment)
    try:
        store = wait_for_all_ranks(environment, address, port, 60 * rendezvous)
    except (dist.DistNetworkError, OSError) as error:
        raise RunError(
            f"the ranks cannot meet at {address}:{port}: {str(error).splitlines()[0]}. If another run of "
            "this machine uses that port, name a free one: deepspeed --master_port 29501 launch/train.py ..."
        ) from error
    store.set_timeout(timeout)
    met = f"all {environment.world_size} ranks met, but {backend}"
    try:
        return run_with_timeout(
            60 * rendezvous, lambda: _join(environment, backend, store, timeout), "process group"
        )
    except TimeoutError as error:
        raise StartAgain(
            f"{met} did not connect them within {rendezvous:g} minutes (run.rendezvous_minutes); "
            "NCCL_DEBUG=INFO says where it waits, NCCL_SOCKET_IFNAME names the network to use"
        ) from error
    except RuntimeError as error:  # of many kinds, as when a node dies now
        words = " ".join(str(error).split())
        raise StartAgain(f"{met} could not connect them: {words}; NCCL_DEBUG=INFO says more") from error


def _backend(environment: Environment) -> str:
    return "nccl" if environment.device.type == "cuda" else "gloo"


def _join(environment: Environment, backend: str, store: dist.Store, timeout: timedelta) -> Any:
    """Make the group of all ranks; returns a copy of it, with the same patience."""
    on_gpu = environment.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(environment.device)  # of this thread
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("default_pg", store),
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timeout,
        # As DeepSpeed itself would: groups are then split off this one, instead of connected anew.
        device_id=environment.device if on_gpu and environment.world_size > 1 else None,
    )
    return dist.new_group(timeout=timeout)


def disconnect() -> None:
    """Leave the process group, where one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Engine:
    """A model under DeepSpeed, with the optimiser of the recipe.

    micro_batch: clips per rank and forward pass. accumulation: micro-batches per optimiser step. zero_stage:
    what is partitioned over the ranks. average: of the weights, where the recipe asks for one.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        environment: Environment,
        layout: BatchPlan,
    ) -> None:
        self.micro_batch = layout.micro_batch
        self.accumulation = layout.accumulation
        self.device = environment.device
        self.precision = choose_precision(recipe.engine.precision, environment.device)
        self.zero_stage = layout.zero_stage
        # Without ZeRO and without bf16, DeepSpeed clips the gradients but does not keep their norm.
        self._keeps_no_norm = self.zero_stage == 0 and self.precision != "bf16"
        self._norm: Tensor | None = None
        self._finite: Tensor | None = None  # whether the gradient of the step at work is, on the device
        self._at_work = False  # whether a step has begun
        self._pending: AsyncCopy | None = None  # whether the gradient of the last step was finite
        self._changed: bool | None = None  # whether the last step changed the weights
        self._updates = 0
        deepspeed = _import_deepspeed(environment.device)
        # Before the parameters are partitioned.
        model = convert_batch_norm(model, environment.device, compiled=recipe.engine.compile)
        # DeepSpeed rounds the weights to bf16 before it makes its master copy of them.
        exact = {}
        if self.precision == "bf16":
            exact = {name: weight.detach().float().cpu() for name, weight in model.named_parameters()}
        optimisation = recipe.optimisation
        fused = recipe.engine.fused
        optimiser = SkippableAdamW(
            parameter_groups(model, optimisation.weight_decay, optimisation.layer_decay),
            lr=optimisation.learning_rate,
            betas=optimisation.betas,
            eps=optimisation.eps,
            fused=environment.device.type == "cuda" if fused == "auto" else fused,
        )
        optimiser.is_finite = self._gradient_is_finite
        # Handing over torch's own AdamW: a configured one would compile DeepSpeed's at start.
        self.deepspeed, *_ = deepspeed.initialize(
            model=model.to(environment.device), optimizer=optimiser, config=self._config(recipe)
        )
        if exact:
            self._begin_with(exact)
        if recipe.engine.compile:
            # The forward alone: not every version of torch can trace DeepSpeed's hooks around it. A break of
            # the graph in a recomputed block would count batch norms' statistics twice: it is an error.
            self.model.forward = torch.compile(self.model.forward, fullgraph=True)
        # Counts of batches included: they too are as before when a step is left out.
        self._statistics = list(self.model.buffers())
        self._statistics_before = [buffer.clone() for buffer in self._statistics]
        self._clip_norm = optimisation.clip_norm
        self._decay = optimisation.ema_decay
        self.ema: Ema | None = None
        self.start_ema()

    def _begin_with(self, weights: dict[str, Tensor]) -> None:
        for piece in find_state_shards(self.deepspeed, self.zero_stage):
            kind, _, name = piece.key.partition("/")
            if kind == "weight":
                piece.values.copy_(weights[name].view(-1)[piece.start : piece.start + piece.count])
        sync_model_weights(self.deepspeed, self.zero_stage)

    def _config(self, recipe: Recipe) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.0 if self._keeps_no_norm else recipe.optimisation.clip_norm or 0.0,
            "zero_optimization": {"stage": self.zero_stage},
            "zero_allow_untested_optimizer": True,
            # Looking for gradients that are not finite, it would wait for the device.
            "bf16": {"enabled": self.precision == "bf16", "check_grad_overflow": False},
            # Many small gradients added up in bf16 would lose most of each.
            "data_types": {"grad_accum_dtype": "fp32" if self.precision == "bf16" else None},
            "torch_autocast": {"enabled": self.precision == "autocast", "dtype": "bfloat16"},
            "steps_per_print": 2**31 - 1,  # the trainer prints
            # It would wait for the GPU twice a micro-batch.
            "timers": {"throughput": {"enabled": False}},
        }

    @property
    def model(self) -> nn.Module:
        return self.deepspeed.module

    def forward(self, clips: Tensor, keys: Tensor | None = None) -> Tensor:  # B 3 T H W, B -> B K
        """Logits in float32; the clips are cast to what the precision computes in.

        keys: of the clips' dropout masks; only needed in training.
        """
        if self.model.training and not self._at_work:
            self._keep_statistics()
            self._at_work = True
        return self._logits(clips, keys)

    def _logits(self, clips: Tensor, keys: Tensor | None) -> Tensor:
        clips = clips.to(torch.bfloat16) if self.precision == "bf16" else clips
        return self.deepspeed(clips, keys).float()

    def _keep_statistics(self) -> None:
        if self._statistics:
            torch._foreach_copy_(self._statistics_before, self._statistics)

    def forward_outside_step(self, clips: Tensor, keys: Tensor) -> Tensor:
        """Logits as in training, but part of no step: DeepSpeed does not hear of a backward that follows.

        Only at stage 3, where it alone can put the weights together, it would: no backward may follow there.
        """
        if self.zero_stage == 3:
            return self._logits(clips, keys)
        return compute_logits(self.precision, self.model, clips, keys)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch; `loss` is its mean, DeepSpeed divides by accumulation."""
        self.deepspeed.backward(loss)

    def step(self, learning_rate: float) -> None:
        """To be called after each micro-batch; the last of an accumulation changes the weights.

        Where the gradient over all ranks is not finite, weights, moments and statistics of batch norms are
        left as they were before the step. That is decided on the device, and `finish_step` says it later:
        the only wait is for the outcome of the step before this one.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        ends = self.deepspeed.is_gradient_accumulation_boundary()
        if ends:
            self._settle()  # the average takes in the weights of the step before, which are about to change
            self._finite = None
            if self._keeps_no_norm:
                self._measure_and_clip()
        self.deepspeed.step()
        if not ends:
            return
        finite = self._gradient_is_finite()
        for now, before in zip(self._statistics, self._statistics_before, strict=True):
            torch.where(finite, now, before, out=now)
        self._at_work = False
        self._pending = AsyncCopy(finite)

    def _measure_and_clip(self) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self._norm = nn.utils.get_total_norm(gradients)
        if self._clip_norm is not None:
            torch._foreach_mul_(gradients, (self._clip_norm / (self._norm + 1e-6)).clamp(max=1.0))

    def _gradient_is_finite(self) -> Tensor:
        """Whether the gradient over all ranks is, on the device; where it is not, DeepSpeed writes -1 or
        infinity for its norm.
        """
        if self._finite is None:
            norm = self._norm if self._keeps_no_norm else self.deepspeed.optimizer._global_grad_norm
            assert norm is not None
            self._finite = norm.isfinite() & (norm >= 0)
        return self._finite

    def _settle(self) -> None:
        """Wait for the outcome of the last step, where it is not known yet, and count the step."""
        if self._pending is None:
            return
        self._changed = bool(self._pending.values())
        self._pending = None
        if not self._changed:
            return
        self._updates += 1
        if self.ema is not None:
            if not self._at_work:  # else they are what they were after that step
                self._keep_statistics()
            self.ema.update(self._updates)

    def finish_step(self) -> bool | None:
        """Whether the last step changed the weights, the same on all ranks; None where that was asked before.

        Waits for the device to have done that step. To be asked after each step, before the next one ends.
        """
        self._settle()
        changed, self._changed = self._changed, None
        return changed

    @property
    def updates(self) -> int:
        """How often the weights were changed; waits for the last step."""
        self._settle()
        return self._updates

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    def gradient_norm(self) -> Tensor | float | None:
        """Norm of the whole gradient before clipping, at the last step; None before the first.

        A tensor may still be on its way to being computed: turning it into a number waits for it.
        """
        return self._norm if self._keeps_no_norm else self.deepspeed.get_global_grad_norm()

    def state_shards(self) -> list[StateShard]:
        """What this rank holds of the training state. Writing into them is completed by `resume`.

        They are the state after the last step once its outcome is known, for which this waits.
        """
        self._settle()
        return find_state_shards(self.deepspeed, self.zero_stage) + (
            [] if self.ema is None else self.ema.shards
        )

    def resume(self, updates: int) -> None:
        """Go on from what was written into the pieces, after so many updates. Collective."""
        self._updates = updates
        set_update_count(self.deepspeed, updates)
        sync_model_weights(self.deepspeed, self.zero_stage)

    def start_ema(self) -> None:
        """Let the average of the weights, if there is to be one, begin as they are now."""
        if self._decay is not None:
            names = (name for name, _ in self.model.named_buffers())
            kept = {
                f"buffer/{name}": before.view(-1)
                for name, before in zip(names, self._statistics_before, strict=True)
            }
            self.ema = Ema(find_state_shards(self.deepspeed, self.zero_stage), self._decay, kept)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, the model's weights are their average, where one is kept. Collective."""
        self._settle()
        if self.ema is None:
            yield
            return
        with self.ema.in_place():
            sync_model_weights(self.deepspeed, self.zero_stage)
            yield
        sync_model_weights(self.deepspeed, self.zero_stage)

    def gather_weights(self) -> dict[str, Tensor]:
        """All weights in float32, the optimiser's master copy where there is one, and the statistics of batch
        norms, as they were after the last step, on the CPU.

        To be called on all ranks; only rank 0 gets them, the others an empty dictionary.
        """
        keep = not dist.is_initialized() or dist.get_rank() == 0
        state = {}
        for name, parameter in self.model.named_parameters():
            full = self._full_weight(parameter)
            if keep:
                state[name] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
        if keep:
            # Within a step, forward passes have counted into the statistics already.
            buffers = self._statistics_before if self._at_work else self._statistics
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
        """What happens inside leaves weights, optimiser, counters, statistics and random states as they were.

        The one condition: the gradients of any step inside are zero and its learning rate is 0, so that
        AdamW allocates its moments and leaves them at zero. Only the step counts are then set back.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        devices = [self.device] if self.device.type == "cuda" else []
        counters = {name: getattr(self.deepspeed, name) for name in _COUNTERS}
        with torch.random.fork_rng(devices=devices):
            yield
        self.finish_step()
        for buffer, saved in buffers:
            buffer.copy_(saved)
        for name, value in counters.items():
            setattr(self.deepspeed, name, value)
        self._updates = 0
        set_update_count(self.deepspeed, 0)
        self.start_ema()  # it took in statistics of the batches inside


_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed (seconds, so late) for this device, with nothing compiled at start."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        # It takes this for the number of the GPU; a task that sees its own GPU only has number 0 of it.
        os.environ["LOCAL_RANK"] = str(device.index)
    # DeepSpeed 0.19 calls collectives by names that torch 2.14 is about to drop, thousands of times a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    with _unavailable("mlflow"):  # seconds, for DeepSpeed's autotuner, which nobody uses here
        import deepspeed
    import deepspeed.runtime.bf16_optimizer
    from deepspeed.utils.logging import logger

    # "You are using ZeRO with an untested optimizer": this one is tested, in tests/trainer/engine.
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())

    # It prints five lines, and collects garbage, twice for each group of parameters.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None

    keep_norms_on_device()

    if device.type == "cpu":
        import deepspeed.ops

        # `init_distributed` would compile a shared-memory collective, which takes over a minute. Not so for
        # GPUs, where a look at this table would try out every compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _unavailable(package: str) -> Iterator[None]:
    """Inside, importing the package fails, unless it has been imported before."""
    known = package in sys.modules
    if not known:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if not known:
            del sys.modules[package]

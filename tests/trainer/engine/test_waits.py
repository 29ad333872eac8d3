"""How often a step reads a number from the device: there the host waits for all GPU work so far."""

import math
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import trainer.engine.deepspeed_engine as engine_module
from pipelines import batch_hash
from pipelines.loader import ClipBatch
from tests.trainer.checkpoint.training import Form, make_engine
from tests.trainer.ranks import Ranks
from trainer.distributed.step_sync import StepSync
from trainer.monitoring.throughput import ThroughputMeter
from trainer.resilience.nonfinite import NonfiniteDiagnosis, SkippedSteps
from trainer.trainer import Trainer

TORCH = str(Path(torch.__file__).parent)


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    with Ranks(1) as ranks:
        yield ranks


def _place() -> str:
    """The reading line: the innermost one outside torch and this file."""
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(TORCH)]
    frame = next(frame for frame in reversed(frames) if frame.filename != __file__)
    return f"{Path(frame.filename).name}: {frame.line}"


class _Reads(TorchDispatchMode):
    """Counts `.item()`, `float()`, `bool()` and `int()` of tensors: all are one operation."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.counts[_place()] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()

    def counting(name: str) -> Any:
        original = getattr(Tensor, name)

        def read(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            counts[_place()] += 1
            return original(tensor, *arguments, **options)

        return mock.patch.object(Tensor, name, read)

    # These read without an operation that a dispatch mode sees.
    with counting("tolist"), counting("cpu"), counting("numpy"), _Reads(counts):
        yield counts


def batch(seed: int, *, poisoned: bool = False) -> ClipBatch:
    clips = torch.randn(4, 3, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    if poisoned:
        clips[0, 0, 0, 0, 0] = math.nan
    numbers = torch.arange(4)
    return ClipBatch(clips, numbers, numbers + 10 * seed, torch.ones(4, dtype=torch.bool), numbers + seed)


def trainer_of(engine: Any) -> Trainer:
    """The parts of a trainer that a step needs."""
    made = object.__new__(Trainer)
    made.engine = engine
    made.step = 0
    made.schedule = mock.Mock(learning_rate=lambda step: 1e-3)
    made.meter = ThroughputMeter(device=engine.device)
    made.step_sync = StepSync(engine.device)
    for name in ("run_logger", "stop", "skipped"):
        setattr(made, name, mock.Mock())
    made.checkpointer = mock.Mock(is_due=False, is_writing=False)
    made.train_loader = mock.Mock(bad_samples=mock.Mock(pop_counts=lambda: (8, 0), new=[]))
    return made


def reads_of_a_step(stage: int, precision: str, form: Form) -> tuple[Counter[str], Counter[str]]:
    """Reads in a step of two micro-batches, and in the step sync after it."""
    with mock.patch.object(engine_module, "choose_precision", lambda *_: precision):
        engine = make_engine(stage, form=form, fused=True)
    trainer = trainer_of(engine)
    trainer.diagnosis = NonfiniteDiagnosis(engine, Path(), {}, lambda _: Path())
    batches = iter([batch(number) for number in range(6)])
    for _ in range(2):  # what is made at first is there by then
        trainer.exchange(trainer.train_step(batches))
        trainer.step += 1
    # On a GPU the clips are hashed there; on a CPU NumPy does it, which waits for nothing.
    with mock.patch.object(batch_hash, "_plane_sums_cpu", batch_hash._plane_sums), counted_reads() as step:
        loss = trainer.train_step(batches)
    with counted_reads() as exchange:
        trainer.exchange(loss)
    return step, exchange


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("precision", "form"), [("fp32", "temporal"), ("autocast", "temporal"), ("bf16", "scene")]
)
def test_a_step_reads_one_number_and_that_of_the_step_before(
    alone: Ranks, stage: int, precision: str, form: Form
) -> None:
    if (stage, precision) == (0, "bf16"):
        pytest.skip("stage 0 becomes 1 in bf16")
    ((step, exchange),) = alone.run(reads_of_a_step, stage, precision, form)
    assert step == {"deepspeed_engine.py: self._changed = bool(self._pending.values())": 1}
    assert list(exchange.values()) == [1] and next(iter(exchange)).startswith("step_sync.py"), exchange


def what_is_found(
    folder: Path, stage: int, poisoned: int, fused: bool
) -> tuple[list[Any], list[str], int, bool, list[str]]:
    """Of two steps, with a NaN in one micro-batch of the first: what is told after the first, then in the
    second; updates; whether the weights that the inquiry kept are those before; the parts of the state that
    differ from those of an engine that saw the second step alone.
    """
    engine = make_engine(stage, fused=fused)
    before = engine.gather_weights()
    trainer = trainer_of(engine)
    trainer.diagnosis = NonfiniteDiagnosis(engine, folder, {"model": {}}, lambda sample: Path(str(sample)))
    trainer.skipped = SkippedSteps(limit=1)
    batches = iter([batch(number, poisoned=number == poisoned) for number in range(4)])
    told: Any = trainer.run_logger.log_skipped_step
    trainer.train_step(batches)
    at_once = list(told.call_args_list)
    trainer.step += 1
    trainer.train_step(batches)
    trainer.step += 1
    ((step, words, file),) = [call.args for call in told.call_args_list]
    kept = load_file(file.parent / "weights.safetensors")
    trainer.finish_pending()  # the second step was taken: nothing more is told
    assert told.call_count == 1
    same = all(torch.equal(kept[name], weight) for name, weight in before.items())
    state = {piece.key: piece.values.clone() for piece in engine.state_shards()}
    other = trainer_of(make_engine(stage, fused=fused))
    other.diagnosis = NonfiniteDiagnosis(
        other.engine, folder, {"model": {}}, lambda sample: Path(str(sample))
    )
    other.train_step(iter([batch(2), batch(3)]))
    other.engine.finish_step()
    differing = [
        piece.key for piece in other.engine.state_shards() if not torch.equal(piece.values, state[piece.key])
    ]
    return at_once, [str(step), words, *map(str, drops(trainer))], engine.updates, same, differing


def drops(trainer: Trainer) -> list[Any]:
    dropped: Any = trainer.checkpointer.withdraw
    return [call.args[0] for call in dropped.call_args_list]


@pytest.mark.parametrize(
    ("stage", "poisoned", "fused"), [(0, 1, True), (1, 0, False), (1, 1, True), (2, 1, True), (3, 1, True)]
)
def test_a_nonfinite_step_is_inspected_before_the_next_changes_the_weights(
    alone: Ranks, tmp_path: Path, stage: int, poisoned: int, fused: bool
) -> None:
    """And the inspection leaves the gradient of the next step alone: the state is as without the first
    step."""
    ((at_once, (step, words, *dropped), updates, same, differing),) = alone.run(
        what_is_found, tmp_path, stage, poisoned, fused
    )
    assert at_once == []
    assert step == "0" and words.startswith("step 1 changed nothing, because the clips themselves")
    assert ", ".join(str(10 * poisoned + sample) for sample in range(4)) in words
    assert dropped == ["the gradient of step 1, which met its weights, is not finite"]
    assert updates == 1
    assert same
    assert differing == []

"""Writes `weights.safetensors` from a checkpoint."""

import logging
from pathlib import Path

from torch import Tensor

from models import ModelError
from trainer.checkpoint.metadata import STATE, CheckpointError, TrainState, find_problem, read_state, shards
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.shards import ShardReader, read_index
from trainer.checkpoint.weights import check_finite, described_model, save_weights
from trainer.errors import RunError

_log = logging.getLogger(__name__)


def export(source: Path, out: Path, *, best: bool = False, average: bool = True) -> TrainState:
    """Write the weights of a checkpoint in float32, with the metadata that using them needs.

    Arguments as for `read_checkpoint`. Returns the metadata. Raises RunError as that function, and where the
    file cannot be written.
    """
    state, tensors = read_checkpoint(source, best=best, average=average)
    save_weights(out, tensors, state.description)
    return state


def read_checkpoint(
    source: Path, *, best: bool = False, average: bool = True
) -> tuple[TrainState, dict[str, Tensor]]:
    """The metadata of a checkpoint, and its weights in float32 by their names in the model.

    source: folder of a checkpoint or of a run. Of a run, the newest undamaged checkpoint is read, or with
    `best` the most accurate one. average: whether to read the moving average of the weights if there is one.

    Raises RunError for a folder without checkpoints, a damaged checkpoint, weights that are not finite or do
    not fit the described model, and a checkpoint that a running training deletes meanwhile.
    """
    if not source.is_dir():
        what = "it is a file, not a folder" if source.exists() else "there is no such folder"
        raise RunError(f"{source}: {what}; name the folder of a run, or one of its checkpoints/step-...")
    checkpoint = source if (source / STATE).exists() else _choose(source, best)
    try:
        problem = find_problem(checkpoint)
        if problem is not None:
            raise CheckpointError(checkpoint, problem)
        state = read_state(checkpoint)
        reader = ShardReader(read_index(shards(checkpoint, state)))
        tensors = _tensors(reader, average)
        described_model(state.description, tensors)
        check_finite(tensors, "it")
    except (ModelError, RunError) as error:
        reason = "it was deleted while it was read, because its run keeps newer ones; choose one of those"
        if checkpoint.is_dir():
            reason = error.reason if isinstance(error, CheckpointError) else str(error)
        raise CheckpointError(checkpoint, reason) from error
    return state, tensors


def _choose(run: Path, best: bool) -> Path:
    retention = Retention(run / "checkpoints")
    if best:
        found = retention.best()
        if found is None:
            raise RunError(f"{run} holds no checkpoint that was evaluated; leave out --best for the newest")
        return found[0]
    for path in reversed(retention.visible()):
        problem = find_problem(path)
        if problem is None:
            return path
        _log.warning("checkpoint %s is passed over: %s", path, problem)
    raise RunError(f"{run} is no checkpoint, and has no undamaged one in checkpoints/")


def _tensors(reader: ShardReader, average: bool) -> dict[str, Tensor]:
    tensors = {}
    for key in reader.index:
        if not key.startswith(("weight/", "buffer/")):
            continue
        kept = f"average/{key}"
        tensor = reader.whole(kept if average and kept in reader.index else key)
        tensors[key.partition("/")[2]] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors

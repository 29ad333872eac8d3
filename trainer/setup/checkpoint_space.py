"""The disk space that the checkpoints of a recipe need."""

from pathlib import Path

from models.cost import parameter_count
from pipelines.dataset.manifest import Manifest
from trainer.checkpoint.retention import Retention
from trainer.config.schema import Recipe
from trainer.monitoring.run_dir import RunDir
from trainer.setup.preparation import model_config

STATE_BYTES = 12  # per parameter of a checkpoint: the weight and AdamW's two moments, in fp32
AVERAGE_BYTES = 4  # per parameter, in addition, with a moving average


def checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes of one checkpoint of the recipe's model. Without the manifest, the head has one class."""
    path = recipe.data.train_manifests[0].manifest
    classes = len(Manifest.open(path).class_names) if path.exists() else 1
    each = STATE_BYTES + (AVERAGE_BYTES if recipe.optimisation.ema_decay is not None else 0)
    return parameter_count(model_config(recipe, classes)) * each


def checkpoints_to_come(recipe: Recipe, run_dir: Path) -> int:
    """Checkpoints that the run adds: those kept, the best, and one written before an older is deleted."""
    kept = Retention(RunDir(run_dir).checkpoints, keep_last=recipe.run.keep_last, keep_best=False).visible()
    return max(1, recipe.run.keep_last + 2 - len(kept))

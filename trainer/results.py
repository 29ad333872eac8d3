"""What a finished training writes: its weights, the best weights and the summary."""

from models.cost import multiply_accumulates, parameter_count
from trainer.checkpoint.best_weights import BestWeights, write_best
from trainer.checkpoint.weights import check_finite, save_weights
from trainer.config.schema import Recipe
from trainer.distributed.collectives import run_on_all_ranks
from trainer.monitoring.run_dir import RunDir
from trainer.setup.preparation import Preparation
from trainer.trainer import Trainer


def write_results(
    trainer: Trainer, recipe: Recipe, prepared: Preparation, folder: RunDir, *, is_main: bool
) -> None:
    """Collective; rank 0 writes. Raises AgreedError where weights or summary cannot be written."""
    with trainer.engine.ema_weights():
        weights = trainer.engine.gather_weights()

    def save_final() -> None:
        if is_main:
            check_finite(weights, "the trained weights are not written: the model")
            save_weights(folder.weights, weights, trainer.checkpointer.description)

    def save_best() -> BestWeights | None:
        return write_best(folder, trainer.checkpointer.retention, trainer.step) if is_main else None

    run_on_all_ranks(save_final)
    best = run_on_all_ranks(save_best)
    final, totals = trainer.validator.result, trainer.meter.spent
    summary = {
        "top1": None if final is None else final.top1,
        "top5": None if final is None else final.top5,
        "loss": None if final is None else final.loss,
        "ece": None if final is None else final.ece,
        "videos": None if final is None else final.videos,
        "bad_videos": None if final is None else final.bad,
        "best_top1": None if best is None else best.top1,
        "best_step": None if best is None else best.step,
        "best_weights": None if best is None else best.file,
        "steps": trainer.step,
        "clips_per_second": totals.clips_per_second,
        "data_wait_share": totals.data_wait_share,
        "seconds": totals.seconds,
        "lost_seconds": totals.lost,
        "starts": totals.starts,
        "spent": totals.time_breakdown,
        "gpu_hours": trainer.meter.device_seconds / 3600,
        "mfu": trainer.meter.mfu(totals.clips_per_second),
        "quarantined": trainer.run_logger.quarantined,
        "parameters": parameter_count(prepared.config),
        "gmacs": multiply_accumulates(prepared.config) / 1e9,
    }
    run_on_all_ranks(lambda: trainer.run_logger.write_summary(summary))
    if is_main and final is not None and folder.scores.exists():
        trainer.run_logger.log_examples(prepared.val)
    if recipe.tracking.register_as is not None:
        trainer.run_logger.register_weights(recipe.tracking.register_as)

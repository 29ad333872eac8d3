"""Records the start of a run in MLflow: the run's description, its data sets, and node metrics."""

from pathlib import Path

import torch

from models.cost import parameter_count
from pipelines.dataset.concat import Dataset
from trainer.config.schema import Recipe
from trainer.distributed.environment import Environment
from trainer.setup.preparation import Preparation
from trainer.tracking.mlflow_tracker import DatasetUse, MlflowTracker
from trainer.tracking.run_description import RunDescription
from trainer.tracking.system_metrics import NodeMonitor


def run_description(
    recipe: Recipe, prepared: Preparation, environment: Environment, run_dir: Path, starts: int
) -> RunDescription:
    """The description of a run in MLflow. starts: number of starts, including this one."""
    config = prepared.config
    manifests = [*prepared.train.manifests, *prepared.val.manifests]
    on_gpu = environment.device.type == "cuda"
    return RunDescription(
        recipe=recipe.name,
        model=f"{recipe.model.preset} {recipe.model.form}, {config.frames} frames of {config.resolution} x "
        f"{config.resolution}, {parameter_count(config) / 1e6:,.4g} M parameters",
        data=[
            (field.removeprefix("data."), str(path), len(manifest), len(manifest.class_names))
            for (field, path), manifest in zip(recipe.data.manifest_fields, manifests, strict=True)
        ],
        run_dir=run_dir,
        launcher=environment.launcher,
        ranks=environment.world_size,
        nodes=_nodes(environment),
        device=torch.cuda.get_device_name(environment.device) if on_gpu else "cpu",
        starts=starts,
    )


def record_datasets(tracker: MlflowTracker, prepared: Preparation) -> None:
    """Record the manifests of the run as MLflow datasets."""
    contexts: dict[DatasetUse, Dataset] = {"training": prepared.train, "validation": prepared.val}
    for context, dataset in contexts.items():
        for manifest in dataset.manifests:
            profile = {"rows": len(manifest), "classes": len(manifest.class_names)}
            tracker.record_dataset(manifest.path, context, digest=manifest.fingerprint, profile=profile)


def monitor_node(environment: Environment, run_dir: Path, tracker: MlflowTracker) -> NodeMonitor:
    """The monitor of a node, for the node's first rank. tracker: used on rank 0 only."""
    gpus = range(torch.cuda.device_count()) if environment.device.type == "cuda" else ()
    return NodeMonitor(
        run_dir,
        node=environment.node_rank,
        nodes=_nodes(environment),
        gpus=[f"GPU-{torch.cuda.get_device_properties(gpu).uuid}" for gpu in gpus],
        report=tracker.record_system_metrics if environment.is_main else None,
    )


def _nodes(environment: Environment) -> int:
    return max(1, environment.world_size // environment.local_world_size)

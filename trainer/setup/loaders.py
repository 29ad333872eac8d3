"""A run's two loaders, for training and for evaluation, on all ranks."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from pipelines.autotune import LoaderOptions
from pipelines.dali.shared_memory import SharedMemoryNeed
from pipelines.loader import ClipLoader, train_loader, view_loader
from pipelines.sampling.sampler import ViewSampler
from trainer.config.schema import Recipe
from trainer.distributed.collectives import broadcast_from_main, run_on_all_ranks
from trainer.distributed.environment import Environment, cores_per_rank
from trainer.lr_schedule import Schedule
from trainer.monitoring.run_dir import RunDir
from trainer.resilience.decoder_crashes import LoaderInput, find_crashed_videos, in_flight_file
from trainer.setup.preparation import Preparation
from trainer.setup.shared_memory import check_shared_memory


def open_loaders(
    recipe: Recipe,
    environment: Environment,
    prepared: Preparation,
    folder: RunDir,
    *,
    first_step: int,
    stack: ExitStack,
) -> tuple[ClipLoader, ClipLoader, tuple[str, ...]]:
    """The loader of training clips from this step on, that of evaluation, and notes on them. Collective.

    Who decodes a video shows in its colours. So where decoding is split, DALI's share is measured once in a
    run, by rank 0, and kept in its folder: all ranks go by it, and so does the run when it goes on.

    stack: closes them.

    Raises AgreedError where what a loader needs cannot be had on some rank, as too small a /dev/shm.
    """
    options = _options(recipe, environment)
    colours = recipe.augmentation
    view_plan = ViewSampler(len(prepared.val), recipe.evaluation.batch, environment.world_size)
    readings = [
        LoaderInput("train", prepared.train, prepared.sampler, prepared.train_clip),
        LoaderInput("val", prepared.val, view_plan, prepared.view_clip),
    ]
    share = read_kept_share(folder, environment) if options.splits else None
    options = replace(options, graph_share=share)
    crashed, notes = find_crashed_videos(readings, folder, environment, options)

    def training() -> ClipLoader:
        loader = train_loader(
            prepared.train,
            prepared.sampler,
            prepared.train_clip,
            mean=colours.mean,
            std=colours.std,
            micro_batch=prepared.layout.micro_batch,
            rank=environment.rank,
            world_size=environment.world_size,
            first_step=first_step,
            options=options,
            crashed=crashed.get("train"),
            in_flight=in_flight_file(folder, "train", environment.rank),
        )
        stack.callback(loader.close)
        return loader

    def evaluation() -> ClipLoader:
        loader = view_loader(
            prepared.val,
            view_plan,
            prepared.view_clip,
            mean=colours.mean,
            std=colours.std,
            rank=environment.rank,
            options=options,
            crashed=crashed.get("val"),
            in_flight=in_flight_file(folder, "val", environment.rank),
        )
        stack.callback(loader.close)
        return loader

    first: ClipLoader | None = None
    if options.splits and share is None:
        first = run_on_all_ranks(lambda: measure_graph_share(training, folder, environment))
        options = replace(
            options, graph_share=broadcast_from_main(None if first is None else first.graph_share)
        )
    train, val = (
        run_on_all_ranks(lambda: training() if first is None else first),
        run_on_all_ranks(evaluation),
    )
    # Nothing lies there yet: the first batches are made when they are asked for.
    train_need, val_need = run_on_all_ranks(train.shared_memory), SharedMemoryNeed(0, 0)
    if Schedule.of(recipe, prepared.sampler.steps_per_epoch).evaluates:
        val_need = run_on_all_ranks(val.shared_memory)
    note = check_shared_memory(environment, train_need, val_need)
    return train, val, notes if note is None else (*notes, note)


def read_kept_share(folder: RunDir, environment: Environment) -> float | None:
    """DALI's share of the decoding as rank 0 finds it in the folder. Collective."""
    return broadcast_from_main(folder.read_graph_share() if environment.is_main else None)


def measure_graph_share(
    make: Callable[[], ClipLoader], folder: RunDir, environment: Environment
) -> ClipLoader | None:
    """The loader with which rank 0 has measured DALI's share of the decoding, which is kept in the folder."""
    if not environment.is_main:
        return None
    loader = make()
    folder.write_graph_share(loader.graph_share)
    return loader


def _options(recipe: Recipe, environment: Environment) -> LoaderOptions:
    data = recipe.data
    return LoaderOptions(
        device=environment.device,
        decoder=data.decoder,
        workers=None if data.workers == "auto" else data.workers,
        threads=None if data.threads == "auto" else data.threads,
        prefetch=None if data.prefetch == "auto" else data.prefetch,
        cores=cores_per_rank(environment),
    )

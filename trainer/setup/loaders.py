"""The loaders of a run and of a separate evaluation, on all ranks."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from pipelines.autotune import LoaderOptions
from pipelines.dali.shared_memory import SharedMemoryNeed
from pipelines.loader import ClipLoader, train_loader, view_loader
from pipelines.sampling.sampler import ViewSampler
from trainer.config.schema import Recipe
from trainer.distributed.collectives import broadcast_from_main, run_on_all_ranks
from trainer.distributed.environment import Environment, cores_per_rank
from trainer.monitoring.run_dir import RunDir
from trainer.resilience.decoder_crashes import LoaderInput, find_crashed_videos, in_flight_file
from trainer.setup.preparation import Preparation, mixing
from trainer.setup.shared_memory import check_shared_memory


def open_loaders(
    recipe: Recipe,
    environment: Environment,
    prepared: Preparation,
    folder: RunDir,
    *,
    first_step: int,
    evaluates: bool,
    stack: ExitStack,
) -> tuple[ClipLoader, ClipLoader, tuple[str, ...]]:
    """The loader of training clips from `first_step` on, the evaluation loader, and notes. Collective.

    evaluates: whether the run evaluates at all. stack: closes the loaders. Raises AgreedError where a rank
    lacks a resource that a loader needs, such as space in /dev/shm.
    """
    mean, std = recipe.augmentation.mean, recipe.augmentation.std
    sampler = ViewSampler(len(prepared.val), recipe.evaluation.batch, environment.world_size)
    open_train = partial(
        train_loader,
        mean=mean,
        std=std,
        micro_batch=prepared.layout.micro_batch,
        world_size=environment.world_size,
        first_step=first_step,
        mixing=mixing(recipe),
        hashes=True,
    )
    open_val = partial(view_loader, mean=mean, std=std)
    opened: list[tuple[LoaderInput, Callable[..., ClipLoader]]] = [
        (LoaderInput("train", prepared.train, prepared.sampler, prepared.train_clip), open_train),
        (LoaderInput("val", prepared.val, sampler, prepared.view_clip), open_val),
    ]
    (train, val), notes = _open_all(opened, _options(recipe, environment), folder, environment, stack)
    # /dev/shm is still empty: a loader makes its first batches when it is iterated.
    train_need, val_need = run_on_all_ranks(train.shared_memory), SharedMemoryNeed(0, 0)
    if evaluates:
        val_need = run_on_all_ranks(val.shared_memory)
    note = check_shared_memory(environment, train_need, val_need)
    return train, val, notes if note is None else (*notes, note)


def open_view_loader(
    reading: LoaderInput,
    open_val: Callable[..., ClipLoader],
    options: LoaderOptions,
    environment: Environment,
    folder: RunDir,
    *,
    run: RunDir,
    stack: ExitStack,
) -> tuple[ClipLoader, tuple[str, ...]]:
    """The loader of an evaluation's single pass, and notes on it. Collective.

    folder: of the evaluation. It holds the same files for the next start as a run folder. run: folder of the
    evaluated run, whose decoder share the evaluation uses. stack: closes the loader. Raises AgreedError where
    a rank lacks a resource that the loader needs, such as space in /dev/shm.
    """
    if options.splits:
        run_on_all_ranks(partial(_copy_share, run, folder, environment))
    (loader,), notes = _open_all([(reading, open_val)], options, folder, environment, stack)
    note = check_shared_memory(environment, SharedMemoryNeed(0, 0), run_on_all_ranks(loader.shared_memory))
    return loader, notes if note is None else (*notes, note)


def _open_all(
    opened: Sequence[tuple[LoaderInput, Callable[..., ClipLoader]]],
    options: LoaderOptions,
    folder: RunDir,
    environment: Environment,
    stack: ExitStack,
) -> tuple[list[ClipLoader], tuple[str, ...]]:
    """The loaders, which `stack` closes, and notes. Collective.

    Decoding is split as an earlier start recorded, and DALI is not given videos over which it crashed.
    """
    if options.splits:
        share = broadcast_from_main(folder.read_graph_share() if environment.is_main else None)
        options = replace(options, graph_share=share)
    crashed, notes = find_crashed_videos([reading for reading, _ in opened], folder, environment, options)
    loaders = []
    for reading, open_loader in opened:
        make = partial(
            open_loader,
            reading.dataset,
            reading.sampler,
            reading.clip,
            rank=environment.rank,
            crashed=crashed.get(reading.kind),
            in_flight=in_flight_file(folder, reading.kind, environment.rank),
        )
        loader, options = _open(make, options, folder, environment, stack)
        loaders.append(loader)
    return loaders, notes


def _open(
    open_loader: Callable[..., ClipLoader],
    options: LoaderOptions,
    folder: RunDir,
    environment: Environment,
    stack: ExitStack,
) -> tuple[ClipLoader, LoaderOptions]:
    """A loader on each rank, and the options that it was opened with. Collective.

    Decoders round colours differently. Where decoding is split, rank 0 therefore measures DALI's share once,
    with the first loader, and records it in the folder. All ranks and later starts use this share.
    """
    first: ClipLoader | None = None

    def opened() -> ClipLoader:
        loader = open_loader(options=options)
        stack.callback(loader.close)
        return loader

    def measured() -> ClipLoader:
        loader = opened()
        folder.write_graph_share(loader.graph_share)
        return loader

    if options.measures_share:
        first = run_on_all_ranks(lambda: measured() if environment.is_main else None)
        share = broadcast_from_main(None if first is None else first.graph_share)
        options = replace(options, graph_share=share)
    return run_on_all_ranks(lambda: opened() if first is None else first), options


def _copy_share(run: RunDir, folder: RunDir, environment: Environment) -> None:
    share = run.read_graph_share() if environment.is_main else None
    if share is not None and folder.read_graph_share() is None:
        folder.write_graph_share(share)


def _options(recipe: Recipe, environment: Environment) -> LoaderOptions:
    data = recipe.data
    return LoaderOptions(
        device=environment.device,
        decoder=data.decoder,
        workers=None if data.workers == "auto" else data.workers,
        threads=None if data.threads == "auto" else data.threads,
        prefetch=None if data.prefetch == "auto" else data.prefetch,
        cores=cores_per_rank(environment),
        storage=data.storage,
    )

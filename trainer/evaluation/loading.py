"""The loader of an evaluation's views, on all ranks."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from pipelines.autotune import LoaderOptions
from pipelines.dali.shared_memory import SharedMemoryNeed
from pipelines.loader import ClipLoader, view_loader
from pipelines.sampling.sampler import ViewSampler
from trainer.distributed.collectives import broadcast_from_main, run_on_all_ranks
from trainer.distributed.environment import Environment, cores_per_rank
from trainer.evaluation.target import EvaluationTarget
from trainer.monitoring.run_dir import RunDir
from trainer.resilience.decoder_crashes import LoaderInput, find_crashed_videos, in_flight_file
from trainer.setup.loaders import measure_graph_share, read_kept_share
from trainer.setup.shared_memory import check_shared_memory

_KIND = "val"


def open_view_loader(
    target: EvaluationTarget, folder: RunDir, environment: Environment, *, first: int, stack: ExitStack
) -> tuple[ClipLoader, tuple[str, ...]]:
    """The loader of a single pass from this batch on, and notes on it. Collective.

    folder: of the evaluation; what the loaders leave for the next start lies there, as in a run's. stack:
    closes the loader.

    Raises AgreedError where what a loader needs cannot be had on some rank, as too small a /dev/shm.
    """
    options = LoaderOptions(
        device=environment.device,
        decoder=target.decoder,
        workers=target.workers,
        cores=cores_per_rank(environment),
    )
    sampler = ViewSampler(len(target.dataset), target.batch, environment.world_size)
    share = None
    if options.splits:
        run_on_all_ranks(partial(_take_share, RunDir(target.source), folder, environment))
        share = read_kept_share(folder, environment)
        options = replace(options, graph_share=share)
    reading = LoaderInput(_KIND, target.dataset, sampler, target.view)
    crashed, notes = find_crashed_videos([reading], folder, environment, options)

    def opened() -> ClipLoader:
        loader = view_loader(
            target.dataset,
            sampler,
            target.view,
            mean=target.mean,
            std=target.std,
            rank=environment.rank,
            options=options,
            crashed=crashed.get(_KIND),
            in_flight=in_flight_file(folder, _KIND, environment.rank),
            first=first,
        )
        stack.callback(loader.close)
        return loader

    loader: ClipLoader | None = None
    if options.splits and share is None:
        loader = run_on_all_ranks(lambda: measure_graph_share(opened, folder, environment))
        options = replace(
            options, graph_share=broadcast_from_main(None if loader is None else loader.graph_share)
        )
    found = run_on_all_ranks(lambda: opened() if loader is None else loader)
    need = run_on_all_ranks(found.shared_memory)
    note = check_shared_memory(environment, SharedMemoryNeed(0, 0), need)
    return found, notes if note is None else (*notes, note)


def _take_share(run: RunDir, own: RunDir, environment: Environment) -> None:
    """Split the decoding as the run did: who decodes a video shows in its colours."""
    share = run.read_graph_share() if environment.is_main else None
    if share is not None and own.read_graph_share() is None:
        own.write_graph_share(share)

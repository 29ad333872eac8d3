"""Evaluates a trained model on a manifest with all ranks; continues an interrupted evaluation."""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeVar

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.autotune import LoaderOptions
from pipelines.dataset.spot_check import format_defects
from pipelines.loader import view_loader
from pipelines.sampling.sampler import ViewSampler
from trainer.distributed.collectives import (
    broadcast_from_main,
    check_same_on_all_ranks,
    gather_distinct,
    run_on_all_ranks,
)
from trainer.distributed.environment import Environment, cores_per_rank, find_environment
from trainer.distributed.slurm_step import find_job_end
from trainer.engine.process_group import disconnect, join
from trainer.errors import AgreedError, RunError
from trainer.evaluation.evaluation_dir import EvaluationDir
from trainer.evaluation.metrics import outcomes_of
from trainer.evaluation.multi_view import OutcomeCounts
from trainer.evaluation.report import NAMED, print_result, write_report
from trainer.evaluation.scores import ScoreFile, ScoreGatherer, ScoreMetadata, schema, tensors_of
from trainer.evaluation.target import EvaluationRequest, EvaluationTarget, resolve_target
from trainer.inference.view_scores import view_scores, views_at_once
from trainer.monitoring.progress import show_progress
from trainer.monitoring.run_dir import RunDir
from trainer.resilience.decoder_crashes import LoaderInput
from trainer.resilience.run_lock import acquire
from trainer.resilience.signals import StopRequest, exit_code
from trainer.setup.bad_video_limit import exceeds_limit
from trainer.setup.loaders import open_view_loader
from trainer.system.device import compute_logits, set_device, set_numerics

T = TypeVar("T")

SECONDS_PER_PART = 30.0  # between two parts: a killed evaluation loses no more work
TIME_TO_LEAVE = 30.0  # seconds before the end of a job at which the last part is written


@dataclass(frozen=True)
class AttemptResult:
    """The work of this start.

    videos: number of videos that it evaluated.
    seconds: time that it took.
    stop_reasons: why it stopped before the end; empty if it did not.
    """

    videos: int = 0
    seconds: float = 0.0
    stop_reasons: tuple[str, ...] = ()


def evaluate(request: EvaluationRequest, device: Literal["auto", "cpu", "cuda"], *, as_json: bool) -> int:
    """Start or continue an evaluation and print the result. Returns the exit code of the process.

    as_json: print the result as JSON, and nothing else, on standard output.

    Raises UserError, DataError or ModelError for errors that the user can fix. After any error except
    AgreedError the rank stays in the process group, and its process must end with
    `trainer.system.process_exit`.
    """
    environment = find_environment(device)
    set_device(environment.device)
    set_numerics(deterministic=False)
    torch.set_num_threads(cores_per_rank(environment))
    join(environment)
    try:
        target = run_on_all_ranks(lambda: resolve_target(request, environment))
        code = Evaluator(target, environment, as_json=as_json).evaluate(again=request.again)
    except AgreedError:
        disconnect()
        raise
    dist.barrier()  # a launcher kills the other ranks soon after one has ended
    disconnect()
    return code


@dataclass
class Evaluator:
    """The evaluation on one rank. Its methods are collective."""

    target: EvaluationTarget
    environment: Environment
    as_json: bool

    def __post_init__(self) -> None:
        self._output = sys.stderr if self.as_json else sys.stdout
        self._is_main = self.environment.is_main
        self._folder = EvaluationDir(self.target.out)

    def evaluate(self, *, again: bool) -> int:
        """Returns the exit code. again: delete an earlier evaluation."""
        identity = run_on_all_ranks(self.target.identity)
        check_same_on_all_ranks(
            "what is evaluated", "\n".join(f"{name}: {value}" for name, value in identity.items())
        )

        def is_finished() -> bool:
            return bool(broadcast_from_main(self._on_main(lambda: self._folder.is_finished(identity))))

        # A finished evaluation is printed without a write: its folder may be read-only.
        if again or not is_finished():
            with ExitStack() as stack:
                lock = self._on_main(lambda: acquire(self.target.out, option="--out"))
                if lock is not None:
                    stack.callback(lock.release)
                self._on_main(lambda: self._folder.prepare(identity, again=again))
                if not is_finished():
                    first = broadcast_from_main(self._folder.done)
                    done = self._evaluate_from(first, stack)
                    if done.stop_reasons:
                        self._print(
                            f"stopped by {' and '.join(done.stop_reasons)} after {first + done.videos:,} of "
                            f"{len(self.target.dataset):,} videos: the same command continues from there"
                        )
                        return exit_code(done.stop_reasons)
                    self._finish(identity, done)
        else:
            self._print(f"{self.target.out} holds this evaluation already; --again repeats it")
        self._on_main(lambda: print_result(self._folder, as_json=self.as_json))
        return 0

    def _evaluate_from(self, first: int, stack: ExitStack) -> AttemptResult:
        """Evaluate the videos from this one on; all ranks get the same result."""
        videos = len(self.target.dataset)
        if first == videos:
            return AttemptResult()
        if first:
            self._print(f"continuing after {first:,} of {videos:,} videos")
        target, environment = self.target, self.environment
        at_once = target.batch * environment.world_size
        first_batch = first // at_once
        options = LoaderOptions(
            device=environment.device,
            decoder=target.decoder,
            workers=target.workers,
            cores=cores_per_rank(environment),
            storage=target.storage,
        )
        sampler = ViewSampler(videos, target.batch, environment.world_size)
        loader, notes = open_view_loader(
            LoaderInput("val", target.dataset, sampler, target.view),
            partial(view_loader, mean=target.mean, std=target.std, first=first_batch),
            options,
            environment,
            RunDir(self._folder.path),
            run=RunDir(target.source),
            stack=stack,
        )
        for note in notes:
            self._print(f"warning: {note}")
        self._print(loader.resources.summary)
        stop = stack.enter_context(
            StopRequest(announce=self._is_main, job_end=find_job_end(), margin=lambda: TIME_TO_LEAVE)
        )
        forward = self._forward()
        views_per_pass = views_at_once(target.weights.model.config, environment.device, target.precision)
        gatherer = ScoreGatherer(target.dataset, target.batch, len(target.names), first)
        started = last_write = time.monotonic()
        done, rest = 0, videos - first
        with (
            show_progress("evaluating: videos", self._output) if self._is_main else nullcontext() as progress,
            torch.no_grad(),
        ):
            for number, batch in enumerate(loader, start=first_batch + 1):
                scores = view_scores(
                    forward, batch.clips, views_per_pass, reduce_by="Lower --batch, --clips or --crops"
                )
                gatherer.add(batch, scores)
                done = min(number * at_once, videos) - first
                if progress is not None:
                    progress(done, rest)
                is_due = self._is_main and time.monotonic() - last_write > SECONDS_PER_PART
                stopping, due = self._any_rank(stop.poll() is not None, is_due)
                if stopping or due or gatherer.is_due or done == rest:
                    self._write(gatherer.gather(loader.bad_samples))
                    last_write = time.monotonic()
                if stopping and done < rest:
                    return AttemptResult(done, time.monotonic() - started, gather_distinct(stop.poll()))
        return AttemptResult(done, time.monotonic() - started)

    def _forward(self) -> Callable[[Tensor], Tensor]:
        """Normalised clips, (B, 3, T, H, W), to logits of the manifest's classes, (B, K)."""
        target, device = self.target, self.environment.device
        model = target.weights.model.to(device)
        if target.precision == "bf16":
            model = model.bfloat16()
        rows = None if target.rows is None else torch.tensor(target.rows, device=device)

        def forward(clips: Tensor) -> Tensor:
            logits = compute_logits(target.precision, model, clips)
            return logits if rows is None else logits[:, rows]

        return forward

    def _write(self, rows: pa.Table | None) -> None:
        """Rank 0 writes the gathered rows as a part.

        Raises AgreedError for nonfinite scores, too many bad videos, or a full disk.
        """

        def write() -> None:
            assert rows is not None  # on rank 0
            scores, _, valid = tensors_of(rows)
            wrong = (valid & ~scores.isfinite().all(dim=1)).nonzero().flatten().tolist()
            if wrong:
                raise RunError(
                    f"the model's outputs are not finite for {len(wrong)} of {len(rows)} videos, as for "
                    f"{rows['path'][wrong[0]].as_py()}: its weights are damaged"
                    + ("" if self.target.precision == "fp32" else ", or need --precision fp32")
                )
            self._folder.write(rows)
            self._check_bad()

        self._on_main(write)

    def _check_bad(self) -> None:
        bad, share, videos = self._folder.bad, self.target.bad_share, len(self.target.dataset)
        if exceeds_limit(bad, share, videos):
            named = [(path, reason) for _, path, reason in islice(self._folder.bad_videos(), NAMED)]
            raise RunError(
                f"{bad} of {videos} videos could not be read, more than --bad-share ({share:g}) allows; "
                f"{format_defects(named)}. Repair them and evaluate with --again, or raise --bad-share"
            )

    def _finish(self, identity: dict[str, Any], attempt: AttemptResult) -> None:
        """Rank 0 merges the parts and writes the reports."""
        target = self.target
        about = ScoreMetadata(
            manifest=target.manifest.name,
            fingerprint=target.dataset.fingerprint,
            class_names=target.names,
            clips=target.view.clips,
            crops=target.view.crops,
            step=target.weights.step,
            source=str(target.source),
        )
        counts = OutcomeCounts(len(target.names), torch.device("cpu"))
        parts = self._folder.parts() if self._is_main else []
        file = self._on_main(lambda: ScoreFile(self._folder.scores, schema(len(target.names), about)))

        def merge(number: int) -> None:
            for rows in self._folder.read(parts[number]):
                scores, labels, valid = tensors_of(rows)
                counts.add(outcomes_of(scores, labels), labels, valid, torch.ones_like(valid))
                file.write(rows)

        # One collective per part, so that the other ranks do not time out while they wait for rank 0.
        for number in range(broadcast_from_main(len(parts))):
            self._on_main(partial(merge, number))

        def conclude() -> None:
            if self._folder.done != len(target.dataset):
                raise RunError(
                    f"{self._folder.path} has the scores of {self._folder.done:,} of {len(target.dataset):,} "
                    "videos: was a part deleted meanwhile? The same command evaluates the rest"
                )
            file.close(whole=True)
            write_report(
                self._folder,
                target,
                identity,
                counts.result(),
                self.environment,
                videos=attempt.videos,
                seconds=attempt.seconds,
            )
            self._folder.remove_parts()

        self._on_main(conclude)

    def _on_main(self, work: Callable[[], T]) -> Any:
        """Call `work` on rank 0 and return its result, None on the others. All ranks raise its errors."""

        def guarded() -> T | None:
            if not self._is_main:
                return None
            try:
                return work()
            except OSError as error:
                raise RunError(
                    f"{error.filename or self._folder.path} cannot be written: {error.strerror or error}; "
                    "fix this and repeat the command, or name another folder with --out"
                ) from error

        return run_on_all_ranks(guarded)

    def _any_rank(self, *values: bool) -> list[bool]:
        """For each value whether it is true on any rank."""
        counts = torch.tensor(values, dtype=torch.float32, device=self.environment.device)
        dist.all_reduce(counts)
        return [count > 0 for count in counts.tolist()]

    def _print(self, text: str) -> None:
        if self._is_main:
            print(text, file=self._output, flush=True)

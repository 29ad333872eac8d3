"""Multi-view evaluation over all ranks, with exact counts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipelines.loader import ClipLoader
from trainer import AgreedError
from trainer.engine.engine import Engine

TOP = 5


class NotFiniteError(AgreedError):
    """The weights have become useless."""


@dataclass(frozen=True)
class Evaluation:
    """What came out, over all ranks.

    confusion: (K, K) counts, row the true class, column the predicted one. top5: videos whose class is among
    the five most likely (all classes, where there are fewer). bad: videos that could not be read; they count
    nowhere else.
    """

    confusion: torch.Tensor
    top5_videos: int
    bad: int

    @property
    def videos(self) -> int:
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Share of videos whose most likely class is right; NaN where there was no video."""
        return int(self.confusion.trace()) / self.videos if self.videos else float("nan")

    @property
    def top5(self) -> float:
        return self.top5_videos / self.videos if self.videos else float("nan")


def evaluate(
    engine: Engine,
    loader: ClipLoader,
    num_classes: int,
    *,
    progress: Callable[[int], None],
    leaving: Callable[[], bool],
) -> Evaluation | None:
    """See every video of the loader once: softmax of each view, their mean, classes by likelihood.

    progress: told the number of batches that are done. leaving: whether this rank was asked to leave; when
    any was, all give up and get None, and the loader is of no more use. Collective; all get the same.

    Raises NotFiniteError where the model's outputs are not finite for some video.
    """
    engine.eval()
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=engine.device)
    # In the top five; bad; with outputs that are not finite, whose order would mean nothing.
    counts = torch.zeros(3, dtype=torch.int64, device=engine.device)
    with torch.no_grad():
        for done, batch in enumerate(loader, start=1):
            videos, views = batch.clips.shape[:2]
            logits = engine.forward(batch.clips.flatten(0, 1))  # B V 3 T H W -> BV K
            scores = logits.softmax(dim=-1).unflatten(0, (videos, views)).mean(dim=1)  # B K
            labels, scores = batch.labels[batch.valid], scores[batch.valid]
            ranked = scores.topk(min(TOP, num_classes)).indices
            flat = labels * num_classes + ranked[:, 0]
            confusion += torch.bincount(flat, minlength=num_classes**2).view_as(confusion)
            counts[0] += (ranked == labels[:, None]).sum()
            counts[1] += ((batch.ids >= 0) & ~batch.valid).sum()
            counts[2] += (~scores.isfinite().all(dim=1)).sum()
            progress(done)
            asked = torch.tensor(float(leaving()), device=engine.device)
            dist.all_reduce(asked)
            if asked:
                return None
    dist.all_reduce(confusion)
    dist.all_reduce(counts)
    engine.train()
    top5, bad, not_finite = counts.tolist()
    if not_finite:
        raise NotFiniteError(
            f"the model's outputs are not finite for {not_finite} of {int(confusion.sum())} validation "
            "videos: its weights have become useless. Lower optimisation.learning_rate or set "
            "optimisation.clip_norm, and go on from an earlier checkpoint with --resume"
        )
    return Evaluation(confusion.cpu(), top5, bad)

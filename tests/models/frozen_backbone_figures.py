"""Memory and CPU time of a training step of L/14 at 336 pixels, 8 frames, with and without frozen backbone.

    python -m tests.models.frozen_backbone_figures [--pairs 2]

Each step runs in a process of its own; the frozen and the other model alternate. A pair takes 3 minutes and
11 GiB.
"""

import argparse
import itertools
import multiprocessing
import resource
import time

import torch
from torch.nn import functional

from models import create_model


def measure(is_frozen: bool) -> None:
    """Print what one clip in float32 with AdamW costs. The sizes are those of the process at its peak."""
    torch.manual_seed(0)
    model = create_model(
        "l14_336", form="scene", frames=8, num_classes=400, frozen_backbone=is_frozen
    ).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5)
    clips, labels = torch.randn(1, 3, 8, 336, 336), torch.tensor([3])
    sizes = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    before, times = _peak(), [time.process_time()]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = functional.cross_entropy(model(clips), labels)
    times.append(time.process_time())
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = sum(size for pointer, size in sizes.items() if pointer not in own) / 2**30
    loss.backward()
    times.append(time.process_time())
    optimiser.step()
    times.append(time.process_time())
    forward, backward, update = (end - begin for begin, end in itertools.pairwise(times))
    print(
        f"{'frozen' if is_frozen else 'whole'}: {sum(p.numel() for p in trained):,} trained parameters; "
        f"autograd keeps {kept:.2f} GiB; memory {before:.2f} GiB before the step, {_peak():.2f} at most; "
        f"CPU seconds: forward {forward:.1f}, backward {backward:.1f}, optimiser {update:.1f}",
        flush=True,
    )


def _peak() -> float:
    """GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2)
    for number in range(2 * parser.parse_args().pairs):
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(number % 2 == 0,))
        process.start()
        process.join()

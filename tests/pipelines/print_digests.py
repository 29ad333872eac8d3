"""Prints the digest of each batch.

python -m tests.pipelines.print_digests MANIFEST FIRST_STEP DEVICE
"""

# DALI's worker processes import this file again, so slow imports are inside `main`.
import sys
from pathlib import Path


def main(manifest: str, first_step: str, device: str) -> None:
    import torch

    from tests.pipelines.batches import ALL, digests, loader, options

    how = options(workers=2, device=torch.device(device))
    for batch in loader(Path(manifest), ALL, first_step=int(first_step), how=how):
        print(digests([batch])[0], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Where videos are decoded: `dali` inside the graph, `pyav` in the source's worker processes.

`dali` on a GPU is NVDEC. On a CPU the graph's decoder takes VP8, VP9 and MJPEG only, which is enough to run
the same branch anywhere; `auto` therefore means `dali` on a GPU and `pyav` on a CPU.
"""

from typing import Any

from nvidia.dali import fn

from .encoded import CPU_CODECS, GPU_CODECS

DECODERS = ("auto", "dali", "pyav")


def choose_decoder(name: str, *, gpu: bool) -> tuple[str, frozenset[str]]:
    """Resolve `auto`; returns `dali` or `pyav`, and the codecs it takes (none listed for pyav: all)."""
    if name == "auto":
        name = "dali" if gpu else "pyav"
    if name == "pyav":
        return name, frozenset()
    return name, GPU_CODECS if gpu else CPU_CODECS


def decode_in_graph(encoded: Any, indices: Any, *, gpu: bool) -> Any:
    """Graph node: encoded bytes and frame numbers → uint8 frames, layout FHWC, on the pipeline's device.

    Frames out of range would be padded black in silence by default; here they are an error, and the source
    has seen to it that there are none.
    """
    return fn.decoders.video(encoded, frames=indices, pad_mode="none", device="mixed" if gpu else "cpu")

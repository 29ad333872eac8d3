"""Where videos are decoded: `dali` in the graph, `pyav` in the source's worker processes, `hybrid` in both.

`dali` on a GPU is NVDEC, which is given H.264 and HEVC (see `GraphDecoder`). On a CPU the graph's decoder
takes VP8, VP9 and MJPEG, enough to run the same branch anywhere. `auto` means `pyav` on a CPU and `hybrid` on
a GPU: there, NVDEC and PyAV split the videos that NVDEC takes by measured speed.

Both give the same frames. Their pixels differ where colours change sharply in videos of 4:2:0: DALI
interpolates the colour of neighbours, PyAV repeats it, 3 to 5 levels on average in pictures of nothing but
edges.
"""

from typing import Any

from nvidia.dali import fn, math, types

from pipelines.decode.color import IDENTITY


def choose_decoder(name: str, *, gpu: bool) -> str:
    """Resolve `auto`."""
    if name != "auto":
        return name
    return "hybrid" if gpu else "pyav"


def decode_in_graph(encoded: Any, indices: Any, color: Any, orientation: Any, *, gpu: bool) -> Any:
    """Graph node: encoded bytes and frame numbers → uint8 frames, layout FHWC, on the pipeline's device.

    color: (3, 4), orientation: (3,) per sample, as `check_encoded` gives them. Frames out of range would be
    padded black in silence by default; here they are an error, and the source has seen to it that there are
    none.
    """
    frames = fn.decoders.video(encoded, frames=indices, pad_mode="none", device="mixed" if gpu else "cpu")
    return turn_upright(correct_color(frames, color), orientation)


def turn_upright(frames: Any, orientation: Any) -> Any:
    """Graph node: FHWC frames as they are shown, by `orientation`, (transpose, reverse rows, reverse columns)
    per sample; upright samples are passed on as they are. Takes a pipeline with conditionals enabled.
    """
    if orientation[0] > 0:
        transposed = fn.transpose(frames, perm=[0, 2, 1, 3], transpose_layout=False)
    else:
        transposed = frames
    if orientation[1] + orientation[2] > 0:
        upright = fn.flip(transposed, vertical=orientation[1], horizontal=orientation[2])
    else:
        upright = transposed
    return upright


def correct_color(frames: Any, color: Any) -> Any:
    """Graph node: frames with `color`, (3, 4) per sample, applied to each pixel; samples whose matrix changes
    nothing are passed on as they are. Takes a pipeline with conditionals enabled.
    """
    unchanged = types.Constant(IDENTITY, device="cpu")
    if fn.reductions.max(math.abs(color - unchanged)) > 0.0:
        transformed = fn.coord_transform(frames, MT=color, dtype=types.UINT8)
        corrected = fn.reshape(transformed, layout="FHWC")
    else:
        corrected = frames
    return corrected

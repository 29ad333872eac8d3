"""Video decoding in the DALI graph, and the choice of the decoder.

`dali` decodes in the graph, `pyav` in the worker processes, `hybrid` in both. On a GPU, `dali` is NVDEC for
H.264 and HEVC (see `GraphDecoder`). On a CPU it decodes VP8, VP9 and MJPEG, so that the same code runs
anywhere. `auto` is `pyav` on a CPU and `hybrid` on a GPU, where measured speed decides which of the videos
for NVDEC go to PyAV.

Both decoders give the same frames. Pixels differ where colours change sharply in videos of 4:2:0, as DALI
interpolates chroma and PyAV repeats it: by 3 to 5 levels on average in pictures of nothing but edges.
"""

from typing import Any

from nvidia.dali import fn, math, types

from pipelines.decode.color import IDENTITY


def choose_decoder(name: str, *, gpu: bool) -> str:
    """The decoder for `name`, with `auto` resolved."""
    if name != "auto":
        return name
    return "hybrid" if gpu else "pyav"


def decode_in_graph(encoded: Any, indices: Any, color: Any, orientation: Any, *, gpu: bool) -> Any:
    """Graph node: encoded bytes and frame numbers → uint8 frames, layout FHWC, on the pipeline's device.

    color: (3, 4), orientation: (3,) per sample, as `check_encoded` gives them. Frame numbers beyond the end
    are an error here (DALI pads with black by default); the source has checked that there are none.
    """
    frames = fn.decoders.video(encoded, frames=indices, pad_mode="none", device="mixed" if gpu else "cpu")
    return turn_upright(correct_color(frames, color), orientation)


def turn_upright(frames: Any, orientation: Any) -> Any:
    """Graph node: FHWC frames as displayed. orientation: (transpose, reverse rows, reverse columns) per
    sample.

    Upright samples pass unchanged. Needs a pipeline with conditionals enabled.
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
    """Graph node: frames with the matrix `color`, (3, 4) per sample, applied to each pixel.

    Samples with the identity pass unchanged. Needs a pipeline with conditionals enabled.
    """
    unchanged = types.Constant(IDENTITY, device="cpu")
    if fn.reductions.max(math.abs(color - unchanged)) > 0.0:
        transformed = fn.coord_transform(frames, MT=color, dtype=types.UINT8)
        corrected = fn.reshape(transformed, layout="FHWC")
    else:
        corrected = frames
    return corrected

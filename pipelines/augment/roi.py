"""The region of interest (ROI) of a clip: the part of the frames that its crop depends on.

Most pixels outside the random crop never reach the model. From the crop backwards through the operations,
the box of each output gives the box of its input. The decoder returns, and every operation processes, no
more than that; the pixels of the crop are those computed from full frames. Pure NumPy; boxes are in pixels
of the full frame.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.augment.rand_augment import DrawnOperation, Operation

WARP_MARGIN = 3  # pixels around the source positions: bicubic needs 2, rounding may move them by 1
SHIFT_MARGIN = 2  # pixels on both sides that a shift by a fraction of a pixel needs
TAPS = 2 * SHIFT_MARGIN + 1
SMOOTHING_KERNEL = np.array([1, 1, 1, 1, 5, 1, 1, 1, 1]) / 13  # PIL's 3 x 3 kernel for sharpness
IDENTITY_KERNEL = np.array([0, 0, 0, 0, 1, 0, 0, 0, 0])
MASK_SLOPE = 512.0  # of a line in levels that gives a mask: 0 below a threshold, 255 from it on
CUBIC = -1.0  # the free parameter of Keys' bicubic kernel, as in PIL's transforms

# Places in the array of an operation's parameters, see `operation_parameters`.
CODE = 0
REGION = slice(1, 5)
SIZE = slice(3, 5)
CUT_MATRIX = slice(5, 14)
ARGUMENT = 14  # the only one, of most operations
MATRIX = slice(14, 23)
SHIFT_KERNEL = slice(14, 14 + TAPS * TAPS)
PARAMETER_COUNT = SHIFT_KERNEL.stop

WHOLE_FRAME = {Operation.AUTO_CONTRAST, Operation.EQUALIZE, Operation.CONTRAST}
SHARPNESS = {Operation.SHARPNESS, Operation.SHARPNESS_AT_EDGE}


class Box(NamedTuple):
    """Rows top..bottom-1 and columns left..right-1."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    def expanded(self, rows: int, columns: int) -> "Box":
        return Box(self.top - rows, self.left - columns, self.bottom + rows, self.right + columns)

    def shifted(self, rows: int, columns: int) -> "Box":
        return Box(self.top + rows, self.left + columns, self.bottom + rows, self.right + columns)

    def clamped(self, height: int, width: int) -> "Box":
        """The part inside a frame; one pixel of the frame's edge if there is none."""
        top, left = min(max(self.top, 0), height - 1), min(max(self.left, 0), width - 1)
        return Box(top, left, min(max(self.bottom, top + 1), height), min(max(self.right, left + 1), width))


class RoiOperations(NamedTuple):
    """A clip's operations, restricted to its ROI."""

    roi: Box
    """The part of the decoded frames that the first operation needs."""
    parameters: NDArray[np.float32]
    """(N, PARAMETER_COUNT), of `operation_parameters`; 0 where unused, which is NOTHING."""


def restrict_to_roi(
    drawn: Sequence[DrawnOperation], crop: Box, height: int, width: int, count: int
) -> RoiOperations:
    """Restrict the operations to the ROI so that the last one gives exactly `crop`; padded to `count`.

    height, width: of the full frame.
    """
    boxes = [crop]
    for each in reversed(drawn):
        boxes.insert(0, input_box(each, boxes[0], height, width))
    parameters = np.zeros((count, PARAMETER_COUNT), np.float32)
    for index, each in enumerate(drawn):
        parameters[index] = operation_parameters(each, boxes[index], boxes[index + 1], height, width)
    return RoiOperations(boxes[0], parameters)


def input_box(drawn: DrawnOperation, target: Box, height: int, width: int) -> Box:
    """The box of an operation's input that the box `target` of its output depends on."""
    operation, arguments = drawn
    if operation in WHOLE_FRAME:
        return Box(0, 0, height, width)
    if operation in SHARPNESS:
        return target.expanded(1, 1).clamped(height, width)
    if operation == Operation.WARP:
        return _source_of_warp(arguments, target).clamped(height, width)
    if operation == Operation.TRANSLATE_X:
        return target.shifted(0, _whole(arguments[0])).expanded(0, SHIFT_MARGIN).clamped(height, width)
    if operation == Operation.TRANSLATE_Y:
        return target.shifted(_whole(arguments[0]), 0).expanded(SHIFT_MARGIN, 0).clamped(height, width)
    return target


def operation_parameters(
    drawn: DrawnOperation, source: Box, target: Box, height: int, width: int
) -> NDArray[np.float32]:
    """The graph's parameters, (PARAMETER_COUNT,), of an operation that reads only the box `source` and gives
    the box `target`. One array for all: each array of a sample, and each node that takes one apart, costs
    time.

    CODE: of `Operation`.
    REGION: (top, left, height, width) of the target relative to the source, possibly beyond it; a warp uses
        only height and width.
    SIZE: the last two of these.
    CUT_MATRIX: 3 x 3, from positions in the target to those in the source, moved by the region's corner. On
        a CPU the warp takes it and on a GPU `slice` takes REGION; made from REGION in the graph, it would
        cost nodes.
    From ARGUMENT on: as drawn, except a 3 x 3 matrix from target to source positions (warp), a kernel of
        3 x 3 (sharpness) or 5 x 5 (translate), and the mask's offset, a share of 255 (solarize).
    """
    operation, arguments, (top, left, *size) = _to_roi_coordinates(drawn, source, target, height, width)
    parameters = np.zeros(PARAMETER_COUNT, np.float32)
    parameters[CODE], parameters[REGION] = operation, (top, left, *size)
    parameters[CUT_MATRIX] = (1, 0, left, 0, 1, top, 0, 0, 1)
    parameters[ARGUMENT : ARGUMENT + len(arguments)] = arguments
    return parameters


def _to_roi_coordinates(
    drawn: DrawnOperation, source: Box, target: Box, height: int, width: int
) -> tuple[Operation, Sequence[float] | NDArray[np.floating], tuple[int, ...]]:
    """Code, arguments and region of `operation_parameters`."""
    operation, arguments = drawn
    top, left = target.top - source.top, target.left - source.left
    region = (top, left, *target.size)
    if operation in SHARPNESS:
        edges = (target.top == 0, target.left == 0, target.bottom == height, target.right == width)
        operation = Operation.SHARPNESS_AT_EDGE if any(edges) else Operation.SHARPNESS
        sharpening = SMOOTHING_KERNEL + (IDENTITY_KERNEL - SMOOTHING_KERNEL) * arguments[0]
        return operation, sharpening, region
    if operation == Operation.SOLARIZE:
        return operation, (MASK_SLOPE * (0.5 - arguments[0]) / 255,), region
    if operation == Operation.WARP:
        matrix = _translation(source, back=True) @ _affine(arguments) @ _translation(target)
        return operation, matrix.reshape(-1), region
    if operation in (Operation.TRANSLATE_X, Operation.TRANSLATE_Y):
        whole = _whole(arguments[0])
        down, right = (0, whole) if operation == Operation.TRANSLATE_X else (whole, 0)
        fraction = _cubic(np.arange(-SHIFT_MARGIN, SHIFT_MARGIN + 1) - (arguments[0] - whole))
        kernel = np.zeros((TAPS, TAPS))
        if operation == Operation.TRANSLATE_X:
            kernel[SHIFT_MARGIN] = fraction
        else:
            kernel[:, SHIFT_MARGIN] = fraction
        return operation, kernel.reshape(-1), (top + down, left + right, *target.size)
    return operation, arguments, region


def _whole(offset: float) -> int:
    """The nearest whole number of pixels, halves rounded up: the remainder is in [-0.5, 0.5).

    So a pixel comes from inside the frame exactly if it does so after the shift by whole pixels.
    """
    return int(np.floor(offset + 0.5))


def _source_of_warp(matrix: Sequence[float], target: Box) -> Box:
    """The box of the source positions of all pixels of `target`, with its margin."""
    (top, left), (bottom, right) = (
        (target.top + 0.5, target.left + 0.5),
        (target.bottom - 0.5, target.right - 0.5),
    )
    corners = np.array([[left, right, left, right], [top, top, bottom, bottom], [1, 1, 1, 1]])
    x, y, _ = np.floor(_affine(matrix) @ corners).astype(int).tolist()
    return Box(min(y), min(x), max(y) + 1, max(x) + 1).expanded(WARP_MARGIN, WARP_MARGIN)


def _affine(arguments: Sequence[float]) -> NDArray[np.float64]:
    """(6,), row-major → 3 x 3."""
    return np.vstack([np.reshape(arguments, (2, 3)), [0, 0, 1]])


def _translation(box: Box, back: bool = False) -> NDArray[np.float64]:
    """The matrix (3 x 3) from positions in `box` to positions in the frame, or back."""
    sign = -1 if back else 1
    return np.array([[1, 0, sign * box.left], [0, 1, sign * box.top], [0, 0, 1]], np.float64)


def _cubic(distance: NDArray[np.floating]) -> NDArray[np.floating]:
    """Keys' bicubic kernel (1981, equation 4): the weight of a pixel at `distance` pixels."""
    t = np.abs(distance)
    near = ((CUBIC + 2) * t - (CUBIC + 3)) * t * t + 1
    far = CUBIC * (((t - 5) * t + 8) * t - 4)
    return np.where(t < 1, near, np.where(t < 2, far, 0.0))

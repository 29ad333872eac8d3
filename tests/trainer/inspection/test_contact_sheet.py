"""Contact sheets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.errors import RunError
from trainer.inspection.contact_sheet import SheetRow, draw_sheet, save_sheet, written_atomically


def picture(value: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_a_sheet_of_pictures_and_texts_of_any_size(tmp_path: Path) -> None:
    long = "a_path_without_a_space/" * 20
    rows = [
        SheetRow(["$x^2$ \u202e name\n", long, long], [picture(0), picture(90, 300, 50)]),
        SheetRow(["short"], [picture(200)]),
    ]
    save_sheet(tmp_path / "sheet.png", draw_sheet("a title", rows, ["frame 1", "frame 2"]))
    with Image.open(tmp_path / "sheet.png") as sheet:
        sheet.load()
        assert sheet.width > 2 * 128 and sheet.height > 2 * 128
        colours = {pixel for _, pixel in sheet.getcolors(2**20)}
    assert {(0, 0, 0), (90, 90, 90), (200, 200, 200)} <= colours
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_a_row_is_as_high_as_its_text() -> None:
    few, many = (draw_sheet("t", [SheetRow(["a"] * lines, [picture(0)])], ["1"]) for lines in (1, 30))
    assert many.height > few.height + 200


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), written_atomically(tmp_path / "s.mp4", "--video") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_named_with_the_option(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "sheet.png"
    with pytest.raises(RunError, match=r"nowhere.*--out"):
        save_sheet(path, draw_sheet("t", [], []))
    with pytest.raises(RunError, match="nowhere") as caught:
        save_sheet(path, draw_sheet("t", [], []), option=None)
    assert "--out" not in str(caught.value)

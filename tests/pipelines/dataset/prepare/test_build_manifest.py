import gc
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.dataset import manifest as manifest_module
from pipelines.dataset.manifest import Manifest, ManifestRow, write_manifest
from pipelines.dataset.prepare.build import _defect, build_manifest, check_manifest
from pipelines.dataset.prepare.class_balance import balance
from pipelines.dataset.prepare.class_names import read_class_names
from pipelines.dataset.prepare.folder import read_folder
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.table import read_table
from pipelines.errors import DataError, VideoError
from pipelines.synthetic.motion import CLASS_NAMES
from tests.pipelines.damaged_manifests import change_rows

ROOT = Path(__file__).parents[4]


def files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_a_folder_per_class(tmp_path):
    root = files(
        tmp_path, "b/2.mp4", "b/1.MKV", "a/deep/3.webm", "a/notes.txt", "a/._4.mp4", ".git/5.mp4", "6.mp4"
    )
    (root / "c").mkdir()
    listing = read_folder(root)
    assert listing.class_names == ("a", "b", "c")
    assert list(listing) == [(root / "a/deep/3.webm", 0), (root / "b/1.MKV", 1), (root / "b/2.mp4", 1)]


def test_a_split_can_share_the_labels_of_another(tmp_path):
    root = files(tmp_path, "b/1.mp4")
    assert list(read_folder(root, ["a", "b"])) == [(root / "b/1.mp4", 1)]
    with pytest.raises(DataError, match=r"class 'b' is not among the class names; did you mean 'bb'"):
        read_folder(root, ["aa", "bb"])


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(DataError, match=r"no video; expected .*/CLASS/VIDEO"):
        read_folder(files(tmp_path, "1.mp4", "a/notes.txt"))


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "list.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "names", "videos"),
    [
        ("a.mp4,1\nb.mp4,0\n", ("0", "1"), [("a.mp4", 1), ("b.mp4", 0)]),
        ("path,label\na.mp4, run\n\nb.mp4,jump\n", ("jump", "run"), [("a.mp4", 1), ("b.mp4", 0)]),
        ("\ufeffPath,Label\r\na.mp4,run\r\n", ("run",), [("a.mp4", 0)]),
        ('"a, b.mp4",long jump\n', ("long jump",), [("a, b.mp4", 0)]),
        ("my video.mp4 2\nb.mp4\t0\n", ("0", "1", "2"), [("my video.mp4", 2), ("b.mp4", 0)]),
        ("path label\na.mp4 run\n", ("run",), [("a.mp4", 0)]),
    ],
)
def test_tables(tmp_path, text, names, videos):
    listing = read_table(table(tmp_path, text))
    assert listing.class_names == names
    assert list(listing) == [(tmp_path / path, label) for path, label in videos]


@pytest.mark.parametrize(
    "text",
    [
        "path,label,weight\na.mp4,run,0.5\n\nb.mp4,jump, 3\n",
        "\ufeffPath, Label, Weight\r\na.mp4,run,.5\r\nb.mp4,jump,3e0\r\n",
        "path label weight\na.mp4 run 0.5\nb.mp4\tjump\t3\n",
    ],
)
def test_weights_need_a_header(tmp_path, text):
    listing = read_table(table(tmp_path, text))
    assert listing.class_names == ("jump", "run")
    assert list(listing) == [(tmp_path / "a.mp4", 1), (tmp_path / "b.mp4", 0)]
    assert list(listing.weights) == [0.5, 3]
    assert read_table(table(tmp_path, "path,label\na.mp4,run\n")).weights is None


def test_paths_of_a_table_are_relative_to_the_given_root(tmp_path):
    listing = read_table(table(tmp_path, "a.mp4,0\n/b.mp4,0\n"), root=Path("/videos"))
    assert [path for path, _ in listing] == [Path("/videos/a.mp4"), Path("/b.mp4")]


def test_labels_may_be_names_or_indices_of_given_classes(tmp_path):
    listing = read_table(table(tmp_path, "a,run\nb,1\nc,7\n"), class_names=["7", "jump", "run"])
    assert [label for _, label in listing] == [2, 1, 0]


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("", None, "list.csv: .*no video"),
        ("path,label\n", None, "list.csv: .*no video"),
        ("a.mp4,0\nb.mp4\n", None, r"list.csv, line 2: expected a path and a label, found 1 field"),
        ("a.mp4,0\nb, c.mp4,1\n", None, r"line 2: .*found 3 fields\. .* comma"),
        ("a.mp4 0\nb.mp4\n", None, "line 2: expected a path and a label"),
        ("a.mp4,0\nb.mp4,\n", None, "line 2: expected a path and a label"),
        ("a.mp4,0\n\nb.mp4,run\n", None, "line 3: label 'run' is a name, .* an index"),
        ("a.mp4,0\nb.mp4,20230101120000\n", None, "line 2: label 20230101120000 is more than"),
        ("a.mp4,0\nb.mp4,2\n", ["run", "jump"], "line 2: label 2, but labels end at 1"),
        ("a.mp4,run\nb.mp4,jumb\n", ["run", "jump"], "line 2: class 'jumb' .* did you mean 'jump'"),
        ('a.mp4,0\n"b.mp4,1\n', None, "list.csv: cannot be read as a table"),
        ("a.mp4,0,1\n", None, r"line 1: .*found 3 field.* weights needs the header path,label,weight"),
        ("path,label,weight\na.mp4,0\n", None, "line 2: expected a path, a label and a weight, found 2"),
        ("path,label,weight\na.mp4,0,1\nb.mp4,0,-1\n", None, "list.csv, line 3: weight '-1'"),
        ("path,label,weight\na.mp4,0,nan\n", None, "line 2: weight 'nan'"),
        ("path,label,weight\na.mp4,0,inf\n", None, "line 2: weight 'inf'"),
        ("path,label,weight\na.mp4,0,often\n", None, "line 2: weight 'often'"),
        ("path,label,weight\na.mp4,0,0\nb.mp4,0,0.0\n", None, "list.csv: all weights are 0"),
    ],
)
def test_errors_name_file_and_line(tmp_path, text, names, message):
    with pytest.raises(DataError, match=message):
        read_table(table(tmp_path, text), class_names=names)


def test_a_table_that_is_missing_or_not_text(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv: cannot be read"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "video.csv").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match=r"video\.csv: cannot be read"):
        read_table(tmp_path / "video.csv")


def test_class_names_from_a_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("long jump\nrun\n")
    assert read_class_names(path) == ("long jump", "run")
    for text, message in (
        ("run\n\njump\n", "line 2: no class name"),
        ("run\njump\nrun\n", "line 3: class 'run' .* line 1"),
        ("", "no class name"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_class_names(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_class_names(tmp_path / "none.txt")


@pytest.fixture
def videos(motion_set, tmp_path) -> Path:
    """A folder per class with 16 good videos."""
    return Path(shutil.copytree(motion_set.root / "val", tmp_path / "videos"))


def test_a_manifest_is_built_and_bad_videos_are_listed(videos, motion_set):
    files(videos, "grow/empty.mp4", "shrink/empty.avi")
    calls = []
    report = build_manifest(
        videos / "m.arrow", read_folder(videos), workers=1, progress=lambda *call: calls.append(call)
    )
    assert calls[-1] == (18, 18)
    assert (len(report.manifest), report.bad) == (16, 2)
    assert report.bad_list == videos / "m.arrow.bad.txt"
    assert report.bad_list.read_text().splitlines() == [
        f"{videos}/grow/empty.mp4\tis empty (0 bytes)",
        f"{videos}/shrink/empty.avi\tis empty (0 bytes)",
    ]
    rendered = Manifest.open(motion_set.val)
    truth = {rendered.row(i).path.removeprefix("val/"): rendered.row(i) for i in range(16)}
    assert sorted(report.manifest.class_names) == sorted(CLASS_NAMES)
    for row in map(report.manifest.row, range(16)):
        expected = truth[row.path]
        assert report.manifest.class_names[row.label] == CLASS_NAMES[expected.label]
        assert row == replace(expected, path=row.path, label=row.label, fps=row.fps)
        assert row.fps == pytest.approx(expected.fps, rel=1e-3)

    (videos / "grow/empty.mp4").unlink()
    (videos / "shrink/empty.avi").unlink()
    assert build_manifest(videos / "m.arrow", read_folder(videos), workers=1).bad == 0
    assert not report.bad_list.exists()


def test_only_files_under_the_manifest_s_folder_are_written_relative(videos, tmp_path):
    inside = build_manifest(tmp_path / "m.arrow", read_folder(videos), workers=1).manifest
    outside = build_manifest(tmp_path / "other" / "m.arrow", read_folder(videos), workers=1).manifest
    assert inside.row(0).path.startswith("videos/")
    assert outside.row(0).path.startswith(str(videos))


def test_no_manifest_without_a_usable_video(tmp_path):
    listing = Listing([str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")], [0, 0], ("run",))
    with pytest.raises(DataError, match=r"no video can be used; .*m\.arrow\.bad\.txt.* 2 videos"):
        build_manifest(tmp_path / "m.arrow", listing, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["m.arrow.bad.txt"]


def test_check_compares_a_manifest_with_its_videos(videos):
    manifest = build_manifest(videos / "m.arrow", read_folder(videos), workers=1).manifest
    assert check_manifest(manifest.path, workers=1).bad == 0
    changed, gone = (manifest.absolute_path(manifest.row(i)) for i in (3, 5))
    shutil.copy(manifest.absolute_path(manifest.row(4)), changed)
    gone.unlink()
    report = check_manifest(manifest.path, workers=1)
    assert report.bad == 2
    first, second = report.bad_list.read_text().splitlines()
    assert first.startswith(f"{changed}\thas ") and "in the manifest" in first
    assert second == f"{gone}\tcannot be read: No such file or directory"
    change_rows(manifest.path, {0: {"label": -1}, 1: {"path": "a\0"}, 3: {"height": 0}})
    report = check_manifest(manifest.path, workers=1)
    assert report.bad == 4
    negative, no_path, flat, missing = report.bad_list.read_text().splitlines()
    assert negative.startswith(f"{manifest.path_at(0)}\thas label -1 in the manifest")
    assert no_path == f"row 1 of {manifest.path}\thas a NUL character in its path"
    assert flat.startswith(f"{changed}\thas frames of {manifest.row(3).width}x0 pixels")
    assert missing == second


def test_check_keeps_no_error_of_a_bad_video(tmp_path):
    """Its traceback holds the video's packets."""
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    row = ManifestRow("bad.mp4", 0, 0, 0, 9, 25.0, 32, 32, "h264")
    gc.collect()
    before = {id(kept) for kept in gc.get_objects() if isinstance(kept, VideoError)}
    assert _defect((tmp_path / "bad.mp4", row, False))
    gc.collect()
    assert not [kept for kept in gc.get_objects() if isinstance(kept, VideoError) and id(kept) not in before]


def test_check_finds_videos_inside_a_shard(videos, tmp_path):
    built = build_manifest(videos / "m.arrow", read_folder(videos), workers=1).manifest
    rows, content = [], b""
    for row in map(built.row, range(3)):
        data = built.absolute_path(row).read_bytes()
        rows.append(replace(row, path="shard", offset=len(content), length=len(data)))
        content += data
    (tmp_path / "shard").write_bytes(content)
    manifest = write_manifest(tmp_path / "sharded.arrow", rows, built.class_names)
    assert check_manifest(manifest.path, workers=1).bad == 0
    (tmp_path / "shard").write_bytes(content[: rows[2].offset])
    said = check_manifest(manifest.path, workers=1).bad_list.read_text()
    assert said.endswith(f"\tshard ends after 0 of {rows[2].length} bytes\n")


def test_the_manifest_has_the_weights_of_the_usable_videos(videos, tmp_path):
    good = sorted(videos.rglob("*.webm"))[:3]
    lines = [
        f"{path},0,{weight}\n"
        for path, weight in zip([videos / "none.mp4", *good], (9, 0.5, 0, 3), strict=True)
    ]
    listing = read_table(table(tmp_path, "path,label,weight\n" + "".join(lines)))
    manifest = build_manifest(tmp_path / "m.arrow", listing, workers=1).manifest
    assert [manifest.row(index).weight for index in range(3)] == [0.5, 0, 3]
    assert manifest.total_weight == 3.5
    listing = Listing([str(videos / "none.mp4"), str(good[0])], [0, 0], ("0",), weights=[1, 0])
    with pytest.raises(DataError, match="the weights of all 1 videos are 0"):
        build_manifest(tmp_path / "m.arrow", listing, workers=1)


def unbalanced(path: Path) -> Manifest:
    """9 videos of class a, 4 of b, none of c, 1 of d."""
    labels = [0] * 5 + [1] * 4 + [0] * 4 + [3]
    rows = [
        ManifestRow(f"videos/{i}.mp4", 0, 0, label, 10, 25.0, 64, 48, "vp9") for i, label in enumerate(labels)
    ]
    return write_manifest(path, rows, ("a", "b", "c", "d"))


@pytest.mark.parametrize(
    ("power", "shares"), [(0, (9, 4, 1)), (0.5, (3, 2, 1)), (1, (1, 1, 1)), (2, (1 / 9, 1 / 4, 1))]
)
def test_balanced_classes_are_drawn_by_a_power_of_their_size(tmp_path, monkeypatch, power, shares):
    monkeypatch.setattr(manifest_module, "ROWS_PER_BATCH", 4)
    source = unbalanced(tmp_path / "m.arrow")
    made = balance(source.path, tmp_path / "balanced.arrow", power)
    weights = np.zeros(4)
    for row, original in zip(map(made.row, range(14)), map(source.row, range(14)), strict=True):
        assert row == replace(original, weight=row.weight)
        weights[row.label] += row.weight
    np.testing.assert_allclose(weights[[0, 1, 3]], shares)
    assert made.total_weight == pytest.approx(sum(shares))
    again = balance(made.path, made.path, 0)  # in place, and over weights that were there
    assert {again.row(index).weight for index in range(14)} == {1}
    again.verify()


def test_a_balanced_manifest_in_another_folder_finds_the_same_videos(tmp_path):
    inside = unbalanced(tmp_path / "überall" / "m.arrow")
    rows = [
        replace(row, path=f"/far/{row.path}") if i % 3 else row
        for i, row in enumerate(map(inside.row, range(14)))
    ]
    source = write_manifest(inside.path, rows, inside.class_names)
    above = balance(source.path, tmp_path / "m.arrow", 1)
    below = balance(source.path, source.path.parent / "videos" / "m.arrow", 1)
    beside = balance(source.path, tmp_path / "other" / "m.arrow", 1)
    assert [made.row(0).path for made in (above, below)] == ["überall/videos/0.mp4", "0.mp4"]
    assert beside.row(0).path == str(tmp_path / "überall/videos/0.mp4")
    for made in (above, below, beside):
        assert [made.absolute_path(made.row(i)) for i in range(14)] == [
            source.absolute_path(source.row(i)) for i in range(14)
        ]


def test_balancing_refuses_an_invalid_power_and_an_empty_manifest(tmp_path):
    source = unbalanced(tmp_path / "m.arrow")
    for power in (-1.0, float("nan")):
        with pytest.raises(DataError, match=r"power .*give a number from 0"):
            balance(source.path, tmp_path / "out.arrow", power)
    with pytest.raises(DataError, match=r"empty\.arrow has no video"):
        balance(write_manifest(tmp_path / "empty.arrow", [], ["a"]).path, tmp_path / "out.arrow", 1)


def test_the_command_balances_a_manifest(tmp_path):
    source = unbalanced(tmp_path / "m.arrow")
    out = tmp_path / "balanced.arrow"
    command = [
        sys.executable,
        str(ROOT / "launch" / "prepare.py"),
        "balance",
        str(source.path),
        "--out",
        str(out),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote {out}: 14 videos of 4 classes\n"
    assert Manifest.open(out).row(13).weight == 1
    assert Manifest.open(out).row(0).weight == pytest.approx(1 / 9)

"""Published annotations of Kinetics, Moments in Time and Something-Something, with their known
irregularities."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dataset import kinetics710
from pipelines.dataset.prepare import annotations, kinetics, video_index
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.kinetics import Clip, Span, list_kinetics, read_annotations
from pipelines.dataset.prepare.kinetics710_union import list_kinetics710, merge_training_splits
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.moments_in_time import list_moments
from pipelines.dataset.prepare.something_something import list_something
from pipelines.errors import DataError

HEADER = "label,youtube_id,time_start,time_end,split,is_cc\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def videos_of(listing: Listing, folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): listing.class_names[label] for path, label in listing}


def counted(listing: Listing) -> dict[str, int]:
    return {kind: listing.findings.counted(kind) for kind in listing.findings.kinds()}


def test_kinetics_finds_each_clip_by_its_name_and_lists_what_it_leaves_out(tmp_path: Path) -> None:
    rows = [
        "abseiling,AAAAAAAAAAA,10,20,train,0",
        "abseiling,BBBBBBBBBBB,0,10,train,0",
        "air drumming,-_-_-_-_-_-,3,13,train,1",  # an id may begin with a dash
        "air drumming,DDDDDDDDDDD,5.0,15.0,train,0",  # times as floats
        "archery,EEEEEEEEEEE,1,11,train,0",  # two clips of one video, one file without times
        "archery,EEEEEEEEEEE,30,40,train,0",
        "archery,FFFFFFFFFFF,1,11,train,0",  # no file
        "archery,AAAAAAAAAAA,10,20,train,0",  # two labels
        "archery,GGGGGGGGGGG,1,11,train,0",
        "archery,GGGGGGGGGGG,1,11,train,0",  # listed again
    ]
    table = write(tmp_path / "train.csv", HEADER + "\n".join(rows) + "\n")
    folder = touch(
        tmp_path / "videos",
        "abseiling/AAAAAAAAAAA_000010_000020.mp4",
        "abseiling/BBBBBBBBBBB.webm",
        "-_-_-_-_-_-_000003_000013.mp4",
        "part2/DDDDDDDDDDD_5_15.mkv",
        "EEEEEEEEEEE.mp4",
        "GGGGGGGGGGG_000001_000011.mp4",
        "copy/GGGGGGGGGGG_000001_000011.mp4",
        "HHHHHHHHHHH_000001_000011.mp4",
        "notes.txt",
    )
    listing = list_kinetics(table, [folder], version="400")
    assert videos_of(listing, folder) == {
        "abseiling/BBBBBBBBBBB.webm": "abseiling",
        "-_-_-_-_-_-_000003_000013.mp4": "air drumming",
        "part2/DDDDDDDDDDD_5_15.mkv": "air drumming",
        "GGGGGGGGGGG_000001_000011.mp4": "archery",
    }
    assert listing.class_names == kinetics710.class_names("k400")
    assert counted(listing) == {
        annotations.CONTRADICTORY: 1,
        annotations.REPEATED: 1,
        kinetics.AMBIGUOUS: 2,
        annotations.MISSING: 1,
        "videos found in several places; the first is used": 1,
        # of the contradictory clip, and of none; the file without times was found
        video_index.NOT_ANNOTATED: 2,
    }
    assert any(note.startswith("4 of 7 clips") for note in listing.findings.notes)


def test_the_kinetics_version_is_found_by_its_classes(tmp_path: Path) -> None:
    names = kinetics710.class_names("k600")
    rows = [f"{name},{number:011d},0,10,train" for number, name in enumerate(names)]
    table = write(tmp_path / "train.csv", "label,youtube_id,time_start,time_end,split\n" + "\n".join(rows))
    folder = touch(tmp_path / "videos", "00000000003_000000_000010.mp4")
    assert list_kinetics(table, [folder]).class_names == names
    few = write(tmp_path / "few.csv", HEADER + "\n".join(rows[:3]))
    with pytest.raises(DataError, match="--version"):
        list_kinetics(few, [folder])
    with pytest.raises(DataError, match=r"no class of Kinetics-400: .*adjusting glasses"):
        list_kinetics(table, [folder], version="400")


def test_kinetics_as_json_has_the_same_clips(tmp_path: Path) -> None:
    entry = {"annotations": {"label": "archery", "segment": [7.0, 17.0]}, "subset": "training"}
    table = write(tmp_path / "train.json", json.dumps({"AAAAAAAAAAA": entry}))
    assert list(read_annotations(table)) == [Clip(Span("AAAAAAAAAAA", 7, 17), "archery")]


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("path,label\na.mp4,1\n", "youtube_id"),
        ("", "empty"),
        (HEADER + "archery,short,0,10,train,0\n", "line 2: 'short'"),
        (HEADER + "archery,AAAAAAAAAAA,20,10,train,0\n", "line 2: 20 to 10"),
        (HEADER + "archery,AAAAAAAAAAA,nan,10,train,0\n", "line 2"),
        (HEADER + "archery,AAAAAAAAAAA\n", "line 2: 2 fields"),
        (HEADER, "no clip"),
        (HEADER + "archery," + "A" * 200_000 + ",0,10,train,0\n", "CSV"),
        ("youtube_id,time_start,time_end,split\nAAAAAAAAAAA,0,10,test\n", "no labels"),
    ],
)
def test_wrong_annotations_are_refused_with_their_line(tmp_path: Path, text: str, token: str) -> None:
    folder = touch(tmp_path / "videos", "a.mp4")
    with pytest.raises(DataError, match=token):
        list_kinetics(write(tmp_path / "train.csv", text), [folder], version="400")


def test_kinetics_without_a_single_file_names_the_first(tmp_path: Path) -> None:
    table = write(tmp_path / "train.csv", HEADER + "archery,AAAAAAAAAAA,0,10,train,0\n")
    with pytest.raises(DataError, match=r"AAAAAAAAAAA_000000_000010\.mp4"):
        list_kinetics(table, [touch(tmp_path / "videos", "other.mp4")], version="400")


def test_kinetics710_merges_leaves_out_held_out_videos_and_maps_names(tmp_path: Path) -> None:
    header = "label,youtube_id,time_start,time_end,split\n"
    k400 = write(
        tmp_path / "k400.csv",
        header + "tying tie,AAAAAAAAAAA,0,10,train\n"  # a synonym: "tying necktie" in the union
        "archery,BBBBBBBBBBB,0,10,train\n"  # the same clip in K600
        "archery,CCCCCCCCCCC,0,10,train\n"  # in K700's validation split, at another time
        "archery,DDDDDDDDDDD,0,10,train\n",  # in a test split without labels
    )
    k600 = write(
        tmp_path / "k600.csv",
        header + "archery,BBBBBBBBBBB,0,10,train\n"
        "archery,BBBBBBBBBBB,50,60,train\n"  # another clip of the same video
        "abseiling,EEEEEEEEEEE,0,10,train\n",
    )
    # Another class than K600's.
    k700 = write(tmp_path / "k700.csv", header + "archery,EEEEEEEEEEE,0,10,train\n")
    val = write(tmp_path / "val.csv", header + "archery,CCCCCCCCCCC,90,100,validate\n")
    test = write(tmp_path / "test.csv", "youtube_id,time_start,time_end,split\nDDDDDDDDDDD,5,15,test\n")
    findings = Findings()
    union = merge_training_splits([k400, k600, k700], [val, test], findings)
    assert [(*clip.span[:2], clip.label) for clip in union.clips] == [
        ("AAAAAAAAAAA", 0, "tying necktie"),
        ("BBBBBBBBBBB", 0, "archery"),
        ("BBBBBBBBBBB", 50, "archery"),
    ]
    assert (union.rows, union.held_out, union.shared, union.contradictory) == (8, 2, 1, 2)
    folder = touch(
        tmp_path / "videos",
        "AAAAAAAAAAA_000000_000010.mp4",
        "CCCCCCCCCCC_000000_000010.mp4",  # of a training row that is left out
        "CCCCCCCCCCC_000090_000100.mp4",  # of the validation split
        "EEEEEEEEEEE_0_10.mp4",  # of a contradictory clip
        "GGGGGGGGGGG_000000_000010.mp4",
    )
    listing = list_kinetics710([k400, k600, k700], [val, test], [folder])
    assert [item for item, detail in listed(listing, tmp_path) if detail == video_index.NOT_ANNOTATED] == [
        str(folder / "GGGGGGGGGGG_000000_000010.mp4")
    ]
    assert videos_of(listing, folder) == {"AAAAAAAAAAA_000000_000010.mp4": "tying necktie"}
    assert len(listing.class_names) == 710


CLIPS = st.tuples(
    st.integers(0, 9), st.sampled_from([0, 10, 20]), st.sampled_from(["archery", "abseiling", "tying tie"])
)


@settings(max_examples=60, deadline=None)
@given(
    splits=st.lists(st.lists(CLIPS, max_size=12), min_size=3, max_size=3),
    held_out=st.lists(CLIPS, max_size=6),
)
def test_no_held_out_video_is_ever_in_training(
    tmp_path_factory: pytest.TempPathFactory,
    splits: list[list[tuple[int, int, str]]],
    held_out: list[tuple[int, int, str]],
) -> None:
    folder = tmp_path_factory.mktemp("union")

    def table(name: str, clips: list[tuple[int, int, str]]) -> Path:
        rows = [f"{label},{number:011d},{start},{start + 10},x" for number, start, label in clips]
        return write(folder / name, "label,youtube_id,time_start,time_end,split\n" + "\n".join(rows))

    paths = [table(f"{number}.csv", clips) for number, clips in enumerate(splits)]
    union = merge_training_splits(paths, [table("val.csv", held_out)], Findings())
    ids = {f"{number:011d}" for number, _, _ in held_out}
    assert not ids & {clip.span.youtube_id for clip in union.clips}
    assert union.rows == union.held_out + union.shared + union.contradictory + len(union.clips)
    # Within a file a clip with two labels is left out, too; over files it is so in the files' other rows.
    per_file = [_one_label(clips) for clips in splits]
    labels: dict[tuple[int, int], set[str]] = {}
    for found in per_file:
        for key, label in found.items():
            labels.setdefault(key, set()).add(label)
    expected = {key for key, found in labels.items() if len(found) == 1 and f"{key[0]:011d}" not in ids}
    assert sorted((int(clip.span.youtube_id), clip.span.start) for clip in union.clips) == sorted(expected)


def _one_label(clips: list[tuple[int, int, str]]) -> dict[tuple[int, int], str]:
    """Clips of one file that have one label there."""
    labels: dict[tuple[int, int], set[str]] = {}
    for number, start, label in clips:
        labels.setdefault((number, start), set()).add(label)
    return {key: next(iter(found)) for key, found in labels.items() if len(found) == 1}


def listed(listing: Listing, folder: Path) -> list[list[str]]:
    path = listing.findings.write_list(folder / "list.txt")
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_reader_counts_a_clip_once_however_many_rows_name_it(tmp_path: Path) -> None:
    """Of each format: clip 1 in three rows with one label, clip 2 in four rows with two labels."""
    rows = [("1", "a"), ("2", "a"), ("1", "a"), ("2", "b"), ("2", "b"), ("1", "a"), ("2", "a")]
    table = "".join(f"{key * 11},{10},{20},{label}rchery\n" for key, label in rows)
    kinetics_csv = write(
        tmp_path / "k.csv", "youtube_id,time_start,time_end,label\n" + table.replace("brchery", "abseiling")
    )
    videos = touch(tmp_path / "k", "11111111111_000010_000020.mp4")
    mit = write(tmp_path / "mit.csv", "".join(f"a/{key}.mp4,{label},3,0\n" for key, label in rows))
    categories = write(tmp_path / "categories.txt", "a,0\nb,1\n")
    ssv2 = write(tmp_path / "ssv2.json", json.dumps([{"id": key, "template": label} for key, label in rows]))
    labels = write(tmp_path / "labels.json", '{"a": "0", "b": "1"}')
    files = touch(tmp_path / "files", "a/1.mp4")
    for listing, places in (
        (list_kinetics(kinetics_csv, [videos], version="400"), "lines 2 4 7, 3 5 6 8"),
        (list_moments(mit, files, categories), "lines 1 3 6, 2 4 5 7"),
        (list_something(ssv2, [files], labels), "entries 0 2 5, 1 3 4 6"),
    ):
        assert counted(listing) == {annotations.REPEATED: 1, annotations.CONTRADICTORY: 1}
        details = [detail for _, detail in listed(listing, tmp_path)]
        word, numbers = places.split(" ", 1)
        one, two = (
            ", ".join(f"{'line' if word == 'lines' else 'entry'} {number}" for number in part.split())
            for part in numbers.split(",")
        )
        assert details[0].endswith(f"({one})") and details[1].endswith(f"({two})")
        assert details[1].startswith("labels '")


def test_moments_in_time(tmp_path: Path) -> None:
    categories = write(tmp_path / "moments_categories.txt", "clapping,1\npraying,2\nadult+male+singing,0\n")
    table = write(
        tmp_path / "trainingSet.csv",
        "clapping/flickr-0-1.mp4,clapping,4,0\n"
        "adult+male+singing/yt-x_1.mp4,adult+male+singing,3,1\n"
        "yt-y_7.mp4,praying,3,0\n"  # the file alone
        "praying/missing.mp4,praying,3,0\n"
        "praying/twice.mp4,praying,3,0\n"
        "praying/twice.mp4,clapping,3,0\n",
    )
    folder = touch(
        tmp_path / "training",
        "clapping/flickr-0-1.mp4",
        "adult+male+singing/yt-x_1.mp4",
        "praying/yt-y_7.mp4",
        "praying/twice.mp4",
        "praying/more.mp4",
        "walking/other.mp4",
        "walking/notes.txt",
    )
    listing = list_moments(table, folder, categories)
    assert listing.class_names == ("adult+male+singing", "clapping", "praying")
    assert videos_of(listing, folder) == {
        "adult+male+singing/yt-x_1.mp4": "adult+male+singing",
        "clapping/flickr-0-1.mp4": "clapping",
        "praying/yt-y_7.mp4": "praying",
    }
    assert counted(listing) == {
        annotations.CONTRADICTORY: 1,
        annotations.MISSING: 1,
        video_index.NOT_ANNOTATED: 3,  # of the contradictory row, and of none
    }
    wrong = write(tmp_path / "wrong.csv", "clapping/a.mp4,claping,4,0\n")
    with pytest.raises(DataError, match="line 1: 'claping'"):
        list_moments(wrong, folder, categories)


def test_something_something(tmp_path: Path) -> None:
    numbers = {"Holding something": "1", "Approaching something with your camera": "0"}
    labels = write(tmp_path / "labels.json", json.dumps(numbers))
    entries = [
        {
            "id": "78687",
            "label": "holding a cup",
            "template": "Holding [something]",
            "placeholders": ["a cup"],
        },
        {"id": "42", "template": "Approaching [something] with your camera"},
        {"id": 7, "template": "Holding [something]"},
        {"id": "42", "template": "Holding [something]"},
        {"id": "9", "template": "Holding [something]"},
    ]
    train = write(tmp_path / "train.json", json.dumps(entries))
    folder = touch(tmp_path / "videos", "78687.webm", "42.webm", "7.webm")
    listing = list_something(train, [folder], labels)
    assert listing.class_names == ("Approaching something with your camera", "Holding something")
    assert videos_of(listing, folder) == {"78687.webm": "Holding something", "7.webm": "Holding something"}
    assert counted(listing) == {
        annotations.CONTRADICTORY: 1,
        annotations.MISSING: 1,
        video_index.NOT_ANNOTATED: 1,
    }
    for text, token in [
        ('[{"id": "1"}]', "entry 0: has no template"),
        ('[{"id": "1", "template": "Flying"}]', "'Flying' is no class"),
        ("{}", "expected a list"),
        ("[", "JSON"),
    ]:
        with pytest.raises(DataError, match=token):
            list_something(write(tmp_path / "bad.json", text), [folder], labels)
    with pytest.raises(DataError, match="0 to 1"):
        list_something(train, [folder], write(tmp_path / "gap.json", '{"a": "0", "b": "2"}'))

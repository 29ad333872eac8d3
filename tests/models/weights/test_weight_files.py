"""Files of weights that are damaged or made to do harm: one message that names what is wrong."""

import json
import os
import pickle
import random
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models import ModelError
from models.weights.files import open_weights, read_state

F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def written(path: Path, header: object, data: int = 16) -> Path:
    """A safetensors file with any header. header: as JSON, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_state(path)
    message = str(caught.value)
    assert str(path) in message and len(message) < 2000 and message.isprintable()
    return message


HEADERS = {
    "no JSON": (b"{a", "JSON"),
    "no UTF-8": (b'{"\xff": 1}', "JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, "JSON"),
    "long number": (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
    "no mapping": ([1], "mapping of names"),
    "no tensors": ({}, "more than its header describes"),
    "no entry": ({"a": 3}, "wrong tensor a: the header must give"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2, 2]}}, "wrong tensor a: the header must give"),
    "unknown dtype": ({"a": {**F32, "dtype": "F31"}}, "wrong tensor a: dtype F31; known are F64, F32"),
    "dtype is a list": ({"a": {**F32, "dtype": ["F32"]}}, "wrong tensor a: dtype"),
    "negative shape": ({"a": {**F32, "shape": [-2, -2]}}, "wrong tensor a: the shape [-2, -2]"),
    "fraction": ({"a": {**F32, "shape": [4.0]}}, "wrong tensor a: the shape [4.0]"),
    "truth value": ({"a": {**F32, "shape": [True, 4]}}, "wrong tensor a: the shape"),
    "giant shape": ({"a": {**F32, "shape": [2**62, 2**62]}}, "wrong tensor a: the shape"),
    "giant and empty": ({"a": {**F32, "shape": [2**50, 0]}}, "wrong tensor a: the shape"),
    "many dimensions": ({"a": {**F32, "shape": [1] * 5000}}, "wrong tensor a: the shape"),
    "other shape": ({"a": {**F32, "shape": [3]}}, "needs 12 bytes, its offsets give 16"),
    "offsets reversed": ({"a": {**F32, "data_offsets": [16, 0]}}, "wrong tensor a: the offsets"),
    "offsets negative": ({"a": {**F32, "data_offsets": [-16, 0]}}, "wrong tensor a: the offsets"),
    "beyond the file": (
        {"a": {**F32, "shape": [2, 4], "data_offsets": [0, 32]}},
        "a ends after 32 bytes of data, the file has 16",
    ),
    "terabytes": (
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        "a ends after",
    ),
    "overlap": ({"a": F32, "b": F32}, "wrong tensor b: it overlaps"),
    "gap": ({"a": {**F32, "shape": [1], "data_offsets": [12, 16]}}, "wrong tensor a: it leaves a gap"),
    "bytes left": ({"a": {**F32, "shape": [2], "data_offsets": [0, 8]}}, "has 8 bytes more than its header"),
    "name twice": (
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
        b'"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}',
        "twice",
    ),
    "metadata": ({"__metadata__": {"model": {"a": 1}}, "a": F32}, "its metadata"),
    "metadata list": ({"__metadata__": [1], "a": F32}, "its metadata"),
    "odd name": ({"a\x1b[31m\n" * 99: 3}, r"wrong tensor a\x1b[31m\na"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_wrong_header_is_refused_with_the_tensor(tmp_path: Path, case: str) -> None:
    header, words = HEADERS[case]
    assert words in refusal(written(tmp_path / "w.safetensors", header))


def test_the_header_is_recognised_under_any_file_name(tmp_path: Path) -> None:
    for name in ("w.safetensors", "w.bin", "w"):
        state = read_state(written(tmp_path / name, {"__metadata__": {"a": "b"}, "a": F32}))
        assert torch.equal(state["a"], torch.zeros(2, 2))
    torch.save({"a": torch.ones(2)}, tmp_path / "pickled.safetensors")
    assert "*.pt" in refusal(tmp_path / "pickled.safetensors")


def test_what_is_not_a_weight_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "empty.pt").touch()
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html>" + "x" * 200)
    (tmp_path / "lfs.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"
    )
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}')
    (tmp_path / "long.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    for name, words in {
        "pipe.safetensors": "is a pipe, not a file of weights",
        "folder.pt": "is a folder, not a file of weights",
        "loop.pt": "Too many levels of symbolic links",
        "empty.safetensors": "it has 0 bytes",
        "empty.pt": "cannot be read as a file of weights",
        "page.safetensors": "it is a web page",
        "lfs.safetensors": "Git LFS pointer",
        "lfs.pt": "Git LFS pointer",
        "model.safetensors.index.json": "it is JSON",
        "long.safetensors": "9,223,372,036,854,775,808 bytes",
        "none.pt": "no weight file",
        "x" * 300: "File name too long",
    }.items():
        assert words in refusal(tmp_path / name)
    for path, words in (("/dev/zero", "is a device"), ("a\0b", "null (byte|character)")):
        with pytest.raises(ModelError, match=words):
            read_state(path)


def test_a_sparse_file_of_terabytes_is_not_read_to_compare_names(tmp_path: Path) -> None:
    path = written(
        tmp_path / "sparse.safetensors",
        {"a": {"dtype": "F32", "shape": [2**36, 8], "data_offsets": [0, 2**41]}},
        data=0,
    )
    try:
        os.truncate(path, path.stat().st_size + 2**41)
    except OSError:
        pytest.skip("this file system has no sparse files of two terabytes")
    assert open_weights(path).shapes["a"].shape == (2**36, 8)


def test_what_is_no_file_of_torch_save_is_refused_in_plain_words(tmp_path: Path) -> None:
    """Without torch's texts, which are about its own code, and without its warnings."""
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    torch.save({"a": torch.ones(200)}, tmp_path / "new.pt")
    torch.save({"a": torch.ones(200)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    new, old = ((tmp_path / name).read_bytes() for name in ("new.pt", "old.pt"))
    (tmp_path / "empty.tar").touch()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "empty.tar", "a")
    for content, words in (
        (b"hello\n", "not written by torch.save"),
        (b"\x80\x02junk", "not written by torch.save"),
        (b"\x80\x02]q\x00.", "not written by torch.save"),
        (pickle.dumps({"a": 1}, protocol=4), "not written by torch.save"),
        ((tmp_path / "a.tar").read_bytes(), "not written by torch.save"),
        ((tmp_path / "other.npz").read_bytes(), "not written by torch.save"),
        (old[:-300], "or is damaged"),
        (old[:90], "or is damaged"),
        (new[:-300], "zip archive that is cut off or damaged"),
        (b"PK\3\4 and so on", "zip archive that is cut off or damaged"),
    ):
        (tmp_path / "x.pt").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert refusal(tmp_path / "x.pt").endswith(words) or f"{words}, or" in refusal(tmp_path / "x.pt")


def test_too_little_memory_and_a_newer_format_are_not_called_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, numbers = tmp_path / "x.pt", 2**17 + 7
    torch.save({"a": torch.ones(numbers)}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    as_pickled = b"J" + numbers.to_bytes(4, "little")
    assert as_pickled in old
    path.write_bytes(old.replace(as_pickled, b"\x8a\x08" + (2**45).to_bytes(8, "little")))
    caplog.set_level("DEBUG", logger="models")
    assert "not enough memory for the tensors that it declares" in refusal(path)
    assert "allocate memory" in caplog.text
    protocol = b"M" + (1001).to_bytes(2, "little")
    path.write_bytes(old.replace(protocol, b"M" + (1002).to_bytes(2, "little"), 1))
    assert "has version 1002 of the format" in refusal(path)
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "new.pt", "w") as newer:
        for name in stored.namelist():
            newer.writestr(name, b"99\n" if name.endswith("/version") else stored.read(name))
    assert "has version 99 of the format" in refusal(tmp_path / "new.pt")


class Run:
    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("raise SystemExit('code in the file ran')",))


def test_no_code_in_a_pickle_runs(tmp_path: Path) -> None:
    for name, content in {"a.pt": {"a": Run()}, "b.pt": {"state_dict": Run()}, "c.pt": Run()}.items():
        torch.save(content, tmp_path / name)
        assert "exec, which is no tensor" in refusal(tmp_path / name)
        assert "weights_only" not in refusal(tmp_path / name)
        (tmp_path / name).write_bytes(pickle.dumps(content))
        assert "cannot be read as a file of weights" in refusal(tmp_path / name)


def test_pickles_without_plain_tensors_are_refused(tmp_path: Path) -> None:
    wrong = {
        "holds a list, not a dict": [torch.zeros(2)],
        "holds no tensors; its entries are epoch, student": {"epoch": 3, "student": {"a": torch.zeros(2)}},
        "would need 16,000,000,000,000 bytes, 4 are stored": {"a": torch.zeros(1).expand(2000000, 2000000)},
        "is sparse": {"a": torch.zeros(2, 2).to_sparse()},
    }
    for number, (words, content) in enumerate(wrong.items()):
        torch.save(content, tmp_path / f"{number}.pt")
        assert words in refusal(tmp_path / f"{number}.pt")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in stored.infolist():
            bomb.writestr(member.filename, stored.read(member))
    assert "larger than the file" in refusal(tmp_path / "bomb.pt")


class Refusing(torch.nn.Module):
    """A module whose scripted form raises when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        raise RuntimeError("the code in the archive ran")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Scripted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)])
        self.register_buffer("steps", torch.arange(4))
        values = torch.arange(12.0).view(3, 4)
        self.register_buffer("rows", values[1:])  # views of one storage
        self.register_buffer("columns", values.T)
        self.tied = self.layers[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def scripted(path: Path, module: torch.nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(module), str(path))


def test_the_tensors_of_a_torchscript_archive_are_read(tmp_path: Path) -> None:
    module = Scripted()
    module.layers.half()
    scripted(tmp_path / "clip.pt", module)
    found = open_weights(tmp_path / "clip.pt")
    read = found.read(found.shapes)
    expected = {name: value.float() for name, value in module.state_dict().items()}
    assert read.keys() == expected.keys() and found.shapes["layers.0.weight"].dtype == torch.float16
    for name, value in expected.items():
        assert torch.equal(read[name].float(), value)


def test_a_torchscript_program_is_not_run(tmp_path: Path) -> None:
    module = torch.nn.Sequential(Refusing(), torch.nn.Linear(2, 2))
    scripted(tmp_path / "clip.pt", module)
    with pytest.raises(torch.jit.Error, match="the code in the archive ran"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(str(tmp_path / "clip.pt"))
    assert set(open_weights(tmp_path / "clip.pt").shapes) == {"1.weight", "1.bias"}


class Creating:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


def test_damaged_and_hostile_torchscript_archives_are_refused(tmp_path: Path) -> None:
    scripted(tmp_path / "good.pt", torch.nn.Linear(20, 20))

    def rewritten(**changes: bytes) -> str:
        with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
            for member in good.infolist():
                name = member.filename.partition("/")[2].replace("/", "_").replace(".", "_")
                bad.writestr(member.filename, changes.get(name, good.read(member)))
        try:
            weights = open_weights(tmp_path / "bad.pt")
            weights.read(weights.shapes)
        except ModelError as error:
            return str(error)
        return "was read"

    assert rewritten() == "was read"
    assert "TorchScript" in rewritten(data_0=b"short")
    code = pickle.dumps(Creating(tmp_path / "created"), 2)
    assert "without tensors" in rewritten(data_pkl=code) and not (tmp_path / "created").exists()
    assert "has no place in it" in rewritten(data_pkl=pickle.dumps({1, 2}, 4))
    assert "TorchScript" in rewritten(data_pkl=b"\x80\x02(u.") and "TorchScript" in rewritten(data_pkl=b"")
    with zipfile.ZipFile(tmp_path / "good.pt") as good:
        described = next(good.read(name) for name in good.namelist() if name.endswith("/data.pkl"))
    enlarged = described.replace(b"K\x14K\x14\x86", b"K\xffK\x14\x86").replace(
        b"(K\x14K\x14t", b"(K\xffK\x14t"
    )
    assert enlarged != described and "larger than its values" in rewritten(data_pkl=enlarged)
    for count in (2**62, 2**70):
        assert "values of an unknown kind" in rewritten(data_pkl=module(tensor(count, count, 1)))
    assert rewritten(data_pkl=module(tensor(400, 20, 20))) == "was read"
    assert "larger than its values" in rewritten(data_pkl=module(tensor(400, 1, 2**70)))
    assert "more than 100,000 objects" in rewritten(data_pkl=shared_objects(40))


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def tensor(count: int, size: int, stride: int) -> bytes:
    """Of the pickle of a TorchScript archive: a one-dimensional tensor of a storage of `count` values."""
    numbers = [pickle.dumps(number, 2)[2:-1] for number in (count, size, stride)]
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + numbers[0] + b"tQ"
    )
    view = b"K\x00" + numbers[1] + b"\x85" + numbers[2] + b"\x85"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"\x89NtR"


def module(value: bytes) -> bytes:
    return b"\x80\x02c__torch__\nM\n)\x81}(" + text("weight") + value + b"ub."


def shared_objects(levels: int) -> bytes:
    """Objects each of which holds the one before twice: 2**levels paths to the first."""
    made = b"\x80\x02c__torch__\nM\n)\x81q\x00"
    for level in range(levels):
        inner = b"h" + bytes([level])
        fields = text("a") + inner + text("b") + inner
        made += b"c__torch__\nM\n)\x81}(" + fields + b"ubq" + bytes([level + 1])
    return made + b"."


def test_any_damage_to_a_torchscript_archive_gives_tensors_or_a_message(tmp_path: Path) -> None:
    scripted(tmp_path / "good.pt", Scripted())
    good = (tmp_path / "good.pt").read_bytes()
    drawn = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(good)
        for _ in range(drawn.randint(1, 4)):
            damaged[drawn.randrange(len(damaged))] = drawn.randrange(256)
        (tmp_path / "bad.pt").write_bytes(damaged)
        try:
            weights = open_weights(tmp_path / "bad.pt")
            weights.read(weights.shapes, finite=False)
        except ModelError as error:
            refused += "bad.pt" in str(error)
    assert refused > 100


def test_nonfinite_values_are_counted_per_tensor(tmp_path: Path) -> None:
    state = {f"t{i}": torch.full((3, 4), float("nan" if i % 2 else "inf")) for i in range(12)}
    save_file({**state, "good": torch.ones(2)}, tmp_path / "w.safetensors")
    message = refusal(tmp_path / "w.safetensors")
    assert "t0: 12 of 12 values" in message and "and 2 more" in message and "good" not in message
    unchecked = open_weights(tmp_path / "w.safetensors").read(["t0", "good"], finite=False)
    assert torch.isinf(unchecked["t0"]).all()

"""How a process ends, with real processes."""

import errno
import gc
import os
import subprocess
import sys

import pytest

from trainer.system.process_exit import exit_with

PROGRAM = """
import atexit, gc
import torch.distributed as dist
from trainer.system.process_exit import exit_with
atexit.register(lambda: print("Python's own end, frozen:", gc.get_freeze_count() > 0))
def main():
    {work}
    return 3
exit_with(main, interrupted="it was interrupted")
"""
JOINED = "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1); "


def ended(work: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM.format(work=work)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("joined", ["", JOINED])
@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        ("pass", 3, ""),
        ("raise ValueError('broken')", 1, "ValueError: broken"),
        ("raise KeyboardInterrupt", 130, "it was interrupted"),
    ],
)
def test_the_code_and_the_words_are_the_same_with_and_without_a_group(
    joined: str, work: str, code: int, said: str
) -> None:
    result = ended(joined + work)
    assert result.returncode == code
    assert said in result.stderr
    assert ("[rank0]: ValueError" in result.stderr) == (said.startswith("ValueError") and bool(joined))
    # Outside a group without a last collection of all objects; in a group it may wait for others.
    assert result.stdout == ("" if joined else "Python's own end, frozen: True\n")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "\x1bx"),
            2,
            "error: \\x1bx: File name too long; check the path and the permissions\n",
        ),
        (PermissionError(errno.EACCES, "Permission denied", b"a"), 2, "error: a: Permission denied; "),
        (
            PermissionError(errno.EACCES, "Permission denied", "a", None, b"b"),
            2,
            "error: a -> b: Permission denied; check the path",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "s3://me:word@host/a"),
            2,
            "error: s3://host/a: Permission denied; ",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), 1, "Traceback"),  # not of a path
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), 1, "Traceback"),
        (PermissionError(errno.EACCES, "Permission denied", 3), 1, "Traceback"),  # a file descriptor
    ],
)
def test_a_path_that_cannot_be_used_is_no_defect(
    error: OSError, code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> int:
        raise error

    monkeypatch.setattr("trainer.system.process_exit.has_hung_threads", lambda: False)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    for is_rank, expected, message in ((False, code, said), (True, 1, "Traceback")):
        # The node of a rank may be at fault; another one can then go on.
        monkeypatch.setattr("trainer.system.process_exit._is_rank", lambda r=is_rank: r)
        monkeypatch.setattr(os, "_exit", sys.exit)
        with pytest.raises(SystemExit) as ended:
            exit_with(fails, "")
        assert ended.value.code == expected
        # torch's hook prints the rank before it, once a test of this process had a group.
        assert capsys.readouterr().err.removeprefix("[rank0]: ").startswith(message)


def test_sigterm_during_an_import_ends_the_process() -> None:
    """Python ignores exceptions in `cb`, a callback of the import lock."""
    program = """
import os, signal, sys
from trainer.system.process_exit import exit_on_sigterm
def profile(frame, event, _):
    if event == "call" and frame.f_code.co_name == "cb":
        sys.setprofile(None)
        os.kill(os.getpid(), signal.SIGTERM)
exit_on_sigterm("it was an import")
sys.setprofile(profile)
import wave
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (143, "ended by SIGTERM; it was an import\n")


@pytest.mark.parametrize("work", ["print('much to say'); return 85", "raise KeyboardInterrupt"])
def test_a_reader_that_is_gone_changes_neither_code_nor_end(work: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = PROGRAM.format(work=JOINED + work)
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    result = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=writer, timeout=60, env=buffered
    )
    os.close(writer)
    assert result.returncode == (85 if "85" in work else 130)


def test_work_that_hangs_is_not_waited_for() -> None:
    imports = "import time; from trainer.system.timeouts import run_with_timeout"
    result = ended(f"{imports}; run_with_timeout(0.1, lambda: time.sleep(600), 'long')")
    assert result.returncode == 1
    assert "TimeoutError" in result.stderr
    assert "Python's own end" not in result.stdout

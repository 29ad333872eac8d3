"""The address that a run chooses, and addresses that are refused before it starts."""

import shlex
from pathlib import Path

import pytest

from trainer.errors import RunError
from trainer.tracking.address import choose_address, how_to_see, sqlite_path
from trainer.tracking.mlflow_tracker import check_tracking
from trainer.tracking.upload_errors import is_refusal


@pytest.mark.parametrize(
    ("uri", "token"),
    [
        ("file:./mlruns", "sqlite:///./mlruns/mlflow.db"),
        ("./mlruns", "MLflow 3"),
        ("/data/mlruns", "sqlite:////data/mlruns/mlflow.db"),
        ("file:///data/mlruns", "sqlite:////data/mlruns/mlflow.db"),
        ("htp://host:5000", "did you mean http://host:5000?"),
        ("http:/host:5000", "after http comes ://"),
        ("localhost:5000", "did you mean http://localhost:5000?"),
        ("sqlite:/mlflow.db", "after sqlite comes :///"),
        ("sqlite://mlflow.db", "names no file"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlit:///mlflow.db", "did you mean sqlite:///mlflow.db?"),
        ("http://", "names no host"),
        ("http://:5000", "names no host"),
        ("http://host:port", "'port' is no port"),
        ("http://host:99999", "'99999' is no port"),
        ("http://user@host", "without a password"),
        ("http://host/?a=b", "no ? and no #"),
        ("http://host:80/a@b", "%40"),
        ("http://host ", "blank"),
        ("ftp://host", "no scheme 'ftp'"),
        ("postgresql+nosuchdriver://host/db", "nosuchdriver"),
    ],
)
def test_an_address_that_mlflow_cannot_use_is_refused(tmp_path: Path, uri: str, token: str) -> None:
    with pytest.raises(RunError) as caught:
        check_tracking(tmp_path, uri=uri, experiment="e")
    assert token in str(caught.value) and "tracking.uri" in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    ["http://host", "https://host:5000/mlflow/", "http://[::1]:5000", "http://u:p@host", "sqlite:///x.db",
     "sqlite:////tmp/x.db", "databricks", "databricks://profile"],
)  # fmt: skip
def test_an_address_that_mlflow_can_use_is_accepted(tmp_path: Path, uri: str) -> None:
    check_tracking(tmp_path, uri=uri, experiment="実験/テスト with\nnewline")


def test_a_name_or_file_that_mlflow_cannot_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}")
    with pytest.raises(RunError, match=r"MLFLOW_TRACKING_URI.*is a folder"):
        check_tracking(tmp_path, uri=None, experiment="e")
    (tmp_path / "text.db").write_text("not a database, but some text")
    with pytest.raises(RunError, match="no SQLite database"):
        check_tracking(tmp_path, uri=f"sqlite:///{tmp_path}/text.db", experiment="e")
    for name in ("x" * 501, "a\x00b", "a\udcff"):
        with pytest.raises(RunError, match=r"tracking\.experiment"):
            check_tracking(tmp_path, uri="http://host", experiment=name)


@pytest.mark.parametrize(
    "name", ["plain", "with blank", "h#sh", "100%25", "100%", "q?x=1", "ünïcode", "a;b", "it's"]
)
def test_a_database_in_the_current_directory_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from sqlalchemy.engine import make_url

    here = tmp_path / name
    here.mkdir()
    monkeypatch.chdir(here)
    for given in (None, "sqlite:///mlflow.db", f"sqlite:///{here}/mlflow.db"):
        address, _ = choose_address(given, None, {})
        assert sqlite_path(address) == here / "mlflow.db"
        assert make_url(address).database == str(here / "mlflow.db")
        again, _ = choose_address(None, str(address), {})
        assert again == address
    command, page = how_to_see(address, "1", "a").splitlines()
    monkeypatch.chdir(tmp_path)  # the command works from any folder
    assert shlex.split(command)[1:3] == ["ui", "--backend-store-uri"]
    assert Path(make_url(shlex.split(command)[3]).database or "") == here / "mlflow.db"
    assert page == "http://127.0.0.1:5000/#/experiments/1/runs/a?workflowType=machine_learning"


def test_the_options_of_a_database_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose_address("sqlite:///a.db?timeout=30", None, {})[0] == f"sqlite:///{tmp_path}/a.db?timeout=30"


def test_only_an_error_about_the_record_is_a_refusal() -> None:
    from mlflow.exceptions import MlflowException, RestException
    from mlflow.protos.databricks_pb2 import BAD_REQUEST, INTERNAL_ERROR, TEMPORARILY_UNAVAILABLE
    from sqlalchemy import exc

    def caused(cause: Exception, code: int) -> MlflowException:
        error = MlflowException(str(cause), code)
        error.__cause__ = cause
        return error

    def answer(status: int) -> MlflowException:
        return MlflowException(
            f"API request to endpoint /x failed with error code {status} != 200. <html>", BAD_REQUEST
        )

    refusals = [
        RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "too long"}),
        caused(exc.DataError("s", {}, Exception("value too long")), BAD_REQUEST),
        *(answer(status) for status in (400, 413, 422)),
    ]
    outages = [
        RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "x"}),
        RestException({"error_code": "PERMISSION_DENIED", "message": "x"}),
        RestException({"error_code": "UNAUTHENTICATED", "message": "x"}),
        RestException({"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "x"}),
        caused(exc.OperationalError("s", {}, Exception("database is locked")), TEMPORARILY_UNAVAILABLE),
        caused(exc.DatabaseError("s", {}, Exception("disk image is malformed")), BAD_REQUEST),
        MlflowException("API request failed with exception: connection refused", INTERNAL_ERROR),
        *(answer(status) for status in (401, 403, 404, 407, 429, 500, 502, 503, 504)),
    ]
    assert [is_refusal(error) for error in refusals] == [True] * len(refusals)
    assert [is_refusal(error) for error in outages] == [False] * len(outages)

"""No user name and no password of an address reaches a file, a message or a job's script."""

import json
import pickle
import random
from pathlib import Path

import pytest

from trainer.cluster.sbatch import JobRequest, format_script
from trainer.config.load import load_recipe
from trainer.distributed.environment import describe_environment, find_environment
from trainer.errors import RecipeError
from trainer.resilience.crash_report import write_crash_report
from trainer.secrets import Address, redacted, set_job_credentials, with_credentials

ROOT = Path(__file__).parents[2]
SECRET = "s3cretpw"


@pytest.mark.parametrize(
    ("full", "shown", "user_info"),
    [
        (f"http://user:{SECRET}@host:5000/mlflow", "http://host:5000/mlflow", ("user", SECRET)),
        (f"HTTPS://us%40er:{SECRET}%2F@host", "https://host", ("us@er", f"{SECRET}/")),
        (f"http://user:{SECRET}@2@host", "http://host", ("user", f"{SECRET}@2")),
        (f"http://user:{SECRET}/#?x@host/a", "http://host/a", ("user", f"{SECRET}/#?x")),
        (f"postgresql+psycopg2://user:{SECRET}@host/db?sslmode=require",
         "postgresql+psycopg2://host/db?sslmode=require", ("user", SECRET)),
        (f"mysql://host/db?password={SECRET}&charset=utf8", "mysql://host/db?charset=utf8", None),
        (f"postgresql://host/db?user=a&sslpassword={SECRET}", "postgresql://host/db", None),
        ("postgresql://host/db?user=a&sslmode=require", "postgresql://host/db?sslmode=require", None),
        (f"mysql://host/db?user=a&password={SECRET}", "mysql://host/db", None),
        (f"mssql+pyodbc:///?odbc_connect=SERVER%3Dh%3BUID%3Da%3BPWD%3D%7Bx%3B{SECRET}%7D%3BEncrypt%3Dyes",
         "mssql+pyodbc:///?odbc_connect=SERVER%3Dh%3BEncrypt%3Dyes", None),
        (f"http:/user:{SECRET}@host", "http:/host", ("user", SECRET)),
        (f"https:///user:{SECRET}@host", "https:///host", ("user", SECRET)),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db", None),
        (f"http://user:12/{SECRET}@host", "http://host", ("user", f"12/{SECRET}")),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db", None),
    ],
)  # fmt: skip
def test_an_address_is_shown_without_what_is_secret(
    full: str, shown: str, user_info: tuple[str, str] | None
) -> None:
    address = Address(full)
    assert (str(address), address.user_info) == (shown, user_info)
    assert SECRET not in f"{address} {address!r} {json.dumps(address)}"
    assert pickle.loads(pickle.dumps(address)).full == Address(address).full == address.full
    assert SECRET not in redacted(f"cannot reach '{full}': refused")


@pytest.mark.parametrize(
    "form", ["http://u:{}@host/x", "postgresql://u:{}@h/db", "mysql+pymysql://u:{}@h:3/db?a=b"]
)
def test_no_password_survives(form: str) -> None:
    draw = random.Random(0)
    for _ in range(300):
        password = "".join(draw.choices("aB0é/?#:%&=+-._~!*();,[]{}^`", k=draw.randint(6, 30)))
        address, text = Address(form.format(password)), redacted(f"{form.format(password)}: refused")
        assert password not in address and password not in text
        assert str(address) == form.replace("u:{}@", ""), password
        assert text == f"{address}: refused", password


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////volume1/@data/mlflow.db",
        "sqlite:///home/a:b@c/mlflow.db is locked",
        "file:///home/a:b@c",
        "C:/Users/me@corp/runs and C://Users/me@corp/runs",
        "see https://docs.x/y,then@z or mail to me@z",
        "s3://bucket/me@corp/a.mp4",
        "http:/docs/me@corp",
    ],
)
def test_an_at_in_a_path_is_no_user_info(text: str) -> None:
    assert redacted(text) == text
    assert str(Address(text.split()[0])) == text.split()[0]


def test_an_address_within_another_is_searched_too() -> None:
    text = f"https://proxy/get?url=http://u:{SECRET}@host/x failed"
    assert redacted(text) == "https://proxy/get?url=http://host/x failed"
    assert redacted(f"mysql://h/db?user=me&password={SECRET}") == "mysql://h/db?user=***&password=***"


@pytest.mark.parametrize(
    ("secret", "text", "shown"),
    [
        ("mlflow", "/data/mlflow/mlflow.db of mlflows: mlflow ui", None),
        ("mlflow", "u:mlflow@host, password 'mlflow', mlflow.db", "u:***@host, password '***', mlflow.db"),
        ("trainer", "/data/trainer/x, Password: trainer", "/data/trainer/x, Password: ***"),
        ("123456", "step 123456, pwd=123456", "step 123456, pwd=***"),
        ("postgresql", "postgresql://host, /x/postgresql/y, postgresqls", None),
        ("postgresql", "login with postgresql.", "login with ***."),
        ("hunter2", "login with hunter2: /hunter2x/", "login with ***: /hunter2x/"),
        ("hunter22", "login as xhunter22x", "login as x***x"),
        ("correcthorsebatterystaple", "xcorrecthorsebatterystaplex", "x***x"),
    ],
)  # fmt: skip
def test_a_password_that_is_a_word_leaves_messages_readable(
    monkeypatch: pytest.MonkeyPatch, secret: str, text: str, shown: str | None
) -> None:
    monkeypatch.setattr("trainer.secrets._known", set())
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    for given in (f"http://user:{secret}@host", f"mysql://host/db?password={secret}"):
        Address(given)
        assert redacted(text) == (shown or text)
        assert secret not in redacted(f"cannot reach {given}")


def test_a_recipe_holds_the_password_in_memory_only(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [f"tracking.uri=http://user:{SECRET}@127.0.0.1:9"])
    assert isinstance(recipe.tracking.uri, Address)
    assert recipe.tracking.uri.user_info == ("user", SECRET)
    written = (recipe.to_yaml(), str(recipe.flattened()), recipe.model_dump_json(), repr(recipe))
    assert not any(SECRET in text for text in written)
    assert "http://127.0.0.1:9" in written[0]
    wrong = [f"tracking.url=http://user:{SECRET}@host", f"data.val=[http://user:{SECRET}@host]"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(ROOT / "recipes/quickstart.yaml", wrong)
    assert SECRET not in str(caught.value) and "tracking.url" in str(caught.value)


def test_a_job_s_script_lacks_it_and_the_job_s_environment_has_it() -> None:
    request = JobRequest("n", nodes=1, gpus_per_node=0, cpus_per_rank=1, time="1:00:00", lead=60)
    uri = f"tracking.uri=http://user:{SECRET}@host:5000"
    text = format_script(request, [["--set", uri]], Path("runs/x/slurm/job.log"), f"submit.py --set {uri}")
    assert SECRET not in text and "tracking.uri=http://host:5000" in text
    variables: dict[str, str] = {}
    set_job_credentials(Address(f"http://user:{SECRET}@host:5000"), variables)
    assert variables == {"MLFLOW_TRACKING_USERNAME": "user", "MLFLOW_TRACKING_PASSWORD": SECRET}
    variables = {}
    set_job_credentials(f"mysql://user:{SECRET}@h/db", variables)
    assert with_credentials(Address("mysql://h/db"), variables).has_credentials


def test_notes_of_failures_and_the_environment_lack_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    assert SECRET not in json.dumps(describe_environment())
    try:
        raise ConnectionError(f"http://user:{SECRET}@host does not answer")
    except ConnectionError as error:
        write_crash_report(tmp_path, find_environment("cpu", {}), error)
    (note,) = (tmp_path / "failures").iterdir()
    assert "does not answer" in note.read_text() and SECRET not in note.read_text()

"""Why MLflow does not take a record: an outage, a refusal, or a run that was deleted."""

import re
from typing import Any

from trainer.system.secrets import redacted

_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}
"""MLflow's error codes for what trying again cannot mend; any other may be an outage, a proxy, a password."""

_REFUSED_STATUS = {"400", "413", "414", "422", "431"}
"""Answers of a server, or a proxy before it, to a request that is wrong or too large."""

_DATABASE_REFUSALS = {"DataError", "IntegrityError"}
"""SQLAlchemy's errors for a value that does not fit; its others are about the database or the connection."""

_LOGIN = {"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"}
_LOGIN_HINT = (
    " (a user name and a password are taken from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
    "a token from MLFLOW_TRACKING_TOKEN)"
)

_LONGEST_REASON = 500  # characters of an error that are shown: servers answer with pages


class UploadBlocked(Exception):
    """MLflow takes nothing of this run until somebody does something; all records are kept.

    The message says what happened and what to do. Trying again costs little, and waiting at the run's end
    brings nothing.
    """


class ServerUnavailable(Exception):
    """MLflow cannot be reached, or not used, for now."""


def is_refusal(error: Any) -> bool:
    """Whether an MlflowException is about what was sent, and not about the server or the way to it."""
    status = re.search(r"failed with error code (\d{3})", str(error))
    if status is not None:
        return status[1] in _REFUSED_STATUS
    if error.error_code not in _REFUSALS:
        return False
    cause = error.__cause__
    if cause is None or not type(cause).__module__.startswith("sqlalchemy"):
        return True
    return type(cause).__name__ in _DATABASE_REFUSALS


def is_unknown_call(error: Any) -> bool:
    """Whether an MlflowException says that the server does not know the call: it is older than the call."""
    return error.error_code == "ENDPOINT_NOT_FOUND" or "failed with error code 404" in str(error)


def first_line(error: BaseException) -> str:
    """An error in one line, without passwords."""
    text = redacted(str(error)).strip().partition("\n")[0] or redacted(repr(error))
    text = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
    return text + _LOGIN_HINT if getattr(error, "error_code", None) in _LOGIN else text

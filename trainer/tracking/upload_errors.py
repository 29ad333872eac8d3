"""Classes of upload errors: an outage, a refused record, a deleted run."""

import re
from typing import Any

from trainer.secrets import redacted

_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}
"""MLflow's error codes for records that a retry cannot fix; any other code may be an outage or a login."""

_REFUSED_STATUS = {"400", "413", "414", "422", "431"}
"""HTTP statuses of a server or proxy for a request that is wrong or too large."""

_DATABASE_REFUSALS = {"DataError", "IntegrityError"}
"""SQLAlchemy's errors for an invalid value; its other errors concern the database or the connection."""

_LOGIN = {"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"}
_LOGIN_HINT = (
    " (a user name and a password are taken from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
    "a token from MLFLOW_TRACKING_TOKEN)"
)

_LONGEST_REASON = 500  # characters of an error that are logged: servers may respond with a whole page


class UploadBlocked(Exception):
    """MLflow accepts no record of this run until a person acts; all records stay in the outbox.

    The message has the cause and the action. The uploader keeps trying, but does not wait at the run's end.
    """


class ServerUnavailable(Exception):
    """The address does not respond like an MLflow server."""


def is_refusal(error: Any) -> bool:
    """Whether an MlflowException concerns the record, not the server or the connection."""
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
    """Whether an MlflowException means that the server is too old for the call."""
    return error.error_code == "ENDPOINT_NOT_FOUND" or "failed with error code 404" in str(error)


def first_line(error: BaseException) -> str:
    """The first line of an error, without passwords."""
    text = redacted(str(error)).strip().partition("\n")[0] or redacted(repr(error))
    text = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
    return text + _LOGIN_HINT if getattr(error, "error_code", None) in _LOGIN else text

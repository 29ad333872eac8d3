"""Value types that several fields of a recipe share, with their ranges."""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

MAX_RATIO = 1e12
"""Of one training manifest to the others; a number of videos is below it."""
MIN_RATIO = 1e-12
MIN_RATE = 1e-12
"""The smallest rate that is not 0."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1, max_length=1000)]
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
REGISTERED_MODEL = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,199}(@[A-Za-z][A-Za-z0-9_-]{0,99})?$"
RunName = Annotated[str, Field(pattern=RUN_NAME, max_length=200)]


def check_not_tiny(value: float) -> float:
    """Accepts 0 and rates that are large enough to change a weight."""
    if 0 < value < MIN_RATE:
        raise ValueError(f"found {value:g}; allowed: 0, or a number, at least {MIN_RATE:g}")
    return value


# Bounds are far from any training in use. They refuse typing errors, and values that would fail later, too
# large or too small for the clock, the memory or a float.
Clips = Annotated[int, Field(ge=1, le=2**20)]
Steps = Annotated[int, Field(ge=1, le=10**9)]
Epochs = Annotated[float, Field(ge=1e-6, le=10**6)]
Minutes = Annotated[float, Field(ge=0.01, le=366 * 24 * 60)]
SaveMinutes = Annotated[float, Field(ge=1e-4, le=366 * 24 * 60)]
Rate = Annotated[float, Field(ge=0, le=10), AfterValidator(check_not_tiny)]
Length = Annotated[int, Field(ge=1, le=10**7)]
Mean = Annotated[float, Field(ge=-10, le=10)]
Deviation = Annotated[float, Field(ge=1e-3, le=10)]
AspectRatio = Annotated[float, Field(ge=0.01, le=100)]


def check_alias(value: str) -> str:
    """Refuses a registered model's name with an alias that MLflow reserves."""
    alias = value.partition("@")[2]
    if re.fullmatch(r"latest|v\d+", alias, re.I):
        raise ValueError(f"the alias {alias} is MLflow's own; name another, such as best")
    return value


RegisteredModel = Annotated[
    str,
    Field(pattern=REGISTERED_MODEL),
    AfterValidator(check_alias),
]


class FieldError(ValueError):
    """An error inside a field that is a mapping. below: the names that lead to the wrong value."""

    def __init__(self, below: tuple[str, ...], message: str) -> None:
        super().__init__(message)
        self.below = below


def check_path(value: Any) -> Any:
    """Refuses a path that no file system accepts; whether the file exists is not checked."""
    if isinstance(value, str):
        parts = [len(part.encode()) for part in value.split("/")]
        if not value:
            raise ValueError("the path is empty")
        if max(parts) > 255 or sum(parts) + len(parts) > 4096:
            raise ValueError("the path is too long: a name has at most 255 bytes, and a path 4095")
    return value


FilePath = Annotated[Path, BeforeValidator(check_path)]


def check_finite(value: JsonValue, where: tuple[str, ...]) -> None:
    """Raises FieldError for NaN and infinity in a value, at any depth. where: the names that lead to it."""
    if isinstance(value, float) and not math.isfinite(value):
        raise FieldError(where, f"found {json.dumps(value)}; allowed: finite numbers")
    if isinstance(value, dict):
        for name, inner in value.items():
            check_finite(inner, (*where, name))
    for inner in value if isinstance(value, list) else []:
        check_finite(inner, where)

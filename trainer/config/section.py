"""The base of a recipe's sections."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Refuses unknown fields, changes after construction, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

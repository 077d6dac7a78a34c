"""The base of everything that is stored as JSON."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

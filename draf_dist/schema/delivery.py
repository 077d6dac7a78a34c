"""What a hospital says of the folder of raw files that it hands over: delivery.json."""

from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, Field, field_serializer, model_validator

from draf_dist.schema.record import Record

DELIVERY_FILE = "delivery.json"
# Bounds of what is read on a hospital's word: no number in the file may make a program allocate or loop without end.
MAX_FILES = 2_000_000
MAX_FILE_BYTES = 2**40
MAX_PATH_CHARACTERS = 1024


def _safe(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path or not path.isprintable() or str(pure) != path:
        raise ValueError("a path must be relative, with / between its parts, without .., backslash, colon or control characters")
    if path == DELIVERY_FILE:
        raise ValueError(f"{DELIVERY_FILE} does not list itself")
    return path


SafePath = Annotated[str, Field(min_length=1, max_length=MAX_PATH_CHARACTERS), AfterValidator(_safe)]
# It is stored in releases and shown in logs, so it must say nothing of a patient.
DeliveryId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class DeliveredFile(Record):
    """One file below the folder of the delivery, and what it held when the delivery was sealed."""

    path: SafePath
    size_bytes: int = Field(ge=0, le=MAX_FILE_BYTES)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Delivery(Record):
    """delivery.json, written last: a folder without it has not arrived.

    sites: those that the files are of, where the hospital says so; they must be those of the card. previous_delivery: the id of
    a delivery that must have been taken in before this one.
    """

    delivery_id: DeliveryId
    created_at: AwareDatetime
    sites: tuple[str, ...] = ()
    previous_delivery: DeliveryId | None = None
    files: tuple[DeliveredFile, ...] = Field(min_length=1, max_length=MAX_FILES)

    @model_validator(mode="after")
    def _every_file_once(self) -> "Delivery":
        if len({file.path for file in self.files}) != len(self.files):
            raise ValueError("a file is listed twice")
        return self

    @field_serializer("created_at")
    def _to_the_second(self, created_at: datetime) -> str:
        return created_at.isoformat(timespec="seconds")

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(file.size_bytes for file in self.files)

"""What every part of a card is made of: names, and the window before the anchor."""

import math
from typing import Annotated

from pydantic import ConfigDict, Field

from draf_dist.config.spec import Spec

# Names become parts of file names in a release (`<uid>.<modality>.png`), so they are plain.
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]

# Hours relative to the anchor, both ends included. Nothing after the anchor may ever enter, so the end is at most 0.
NotAfterAnchor = Annotated[float, Field(le=0, allow_inf_nan=False)]
WindowHours = tuple[NotAfterAnchor, NotAfterAnchor]


class CardPart(Spec):
    """Base: codes such as 220045 may be written without quotes."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


def token(text: str) -> str:
    """A text as labels and categories compare it: numbers by value (1, 1.0 and 01 are one), the rest as it stands."""
    text = text.strip()
    try:
        number = float(text)
    except ValueError:
        return text
    return repr(number) if math.isfinite(number) else text

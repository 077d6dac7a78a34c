"""Cards: one YAML file says what a raw export means, so that a new data set needs no code. Reference: docs/cards.md."""

from collections.abc import Sequence
from pathlib import Path

from draf_dist.config.spec import load_spec
from draf_dist.errors import SpecError, together
from draf_dist.sources.card_checks import problems
from draf_dist.sources.card_model import Card as Card


def load_card(path: Path | str, overrides: Sequence[str] = ()) -> Card:
    """The card in a YAML file, checked as a whole, with `dotted.key=value` overrides applied first.

    Raises:
        SpecError: all problems of the file together, one a line.
    """
    card = load_spec(path, Card, overrides)
    check_card(card, where=str(path))
    return card


def check_card(card: Card, *, where: str) -> None:
    """Checks what no field shows alone: names that must exist, times that must fit, units that must convert.

    Raises:
        SpecError: all problems together, one a line, each beginning with `where`.
    """
    found = list(problems(card))
    if found:
        raise SpecError(together(f"{where}: {problem}" for problem in found))

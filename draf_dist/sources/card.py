"""Cards: one YAML file says what a raw export means, so that a new data set needs no code. Reference: docs/cards.md."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field

from draf_dist.config.spec import apply_overrides, model_of_kind, read_yaml, validate_spec
from draf_dist.sources.card_checks import check_card
from draf_dist.sources.card_model import Card as Card
from draf_dist.sources.eicu.source import EicuCard
from draf_dist.sources.hospital_export import HospitalExportCard
from draf_dist.sources.webdataset_card import WebDatasetCard

# Every kind of source: a new one is a file of its own and a name here.
AnyCard = HospitalExportCard | EicuCard | WebDatasetCard
SourceCard = Annotated[AnyCard, Field(discriminator="kind")]
CARDS: dict[str, type[AnyCard]] = {card.model_fields["kind"].default: card for card in get_args(AnyCard)}


def load_card(path: Path | str, overrides: Sequence[str] = ()) -> AnyCard:
    """The card in a YAML file, checked as a whole, with `dotted.key=value` overrides applied first.

    A card without `kind` is one of a `hospital_export`. Its build(raw) gives the source; a card of
    kind `webdataset` has none, for its tars are no raw export (see data/foreign.py).

    Raises:
        SpecError: all problems of the file together, one a line.
    """
    tree = read_yaml(path)
    apply_overrides(tree, overrides)
    model = model_of_kind(tree.get("kind", "hospital_export"), CARDS, where=str(path), see="See docs/cards.md.")
    card = validate_spec(tree, model, where=str(path))
    if isinstance(card, HospitalExportCard):
        check_card(card, where=str(path))
    return card

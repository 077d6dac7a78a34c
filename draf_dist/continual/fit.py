"""Whether a delivery may go into a release: the same schema but for new sites, no contradiction about held-out sites."""

from collections.abc import Iterator, Sequence

from draf_dist.errors import SpecError, explain, together
from draf_dist.schema.modality import DataSchema, ModalitySpec, SeriesSpec, TableSpec
from draf_dist.sources.base import Source

SHOWN_NAMES = 20


def joined_schema(release: DataSchema, card: DataSchema, where: str) -> DataSchema:
    """The release's schema with the card's new sites at the end: indices of old sites stay.

    Raises:
        SpecError: anything else differs; every difference is named.
    """
    if problems := list(_differences(release, card)):
        remedy = "Mend the card, or prepare a new release: one release has one schema for ever."
        raise SpecError(together(explain(where, expected=had, found=has, remedy=remedy) for had, has in problems))
    new = tuple(site for site in card.sites if site not in release.sites)
    return release.model_copy(update={"sites": (*release.sites, *new)})


def joined_held_out_sites(release: DataSchema, held_out: Sequence[str], source: Source) -> frozenset[str]:
    """The release's held-out sites and those of the card that are new. A site that is held out stays so without the card's word.

    Raises:
        SpecError: the card holds out a site that the release already trains on.
    """
    if trained_on := sorted((source.held_out_sites & set(release.sites)) - set(held_out)):
        raise SpecError(
            explain(
                f"card {source.name}: split.held_out_sites",
                expected="new sites, or those that the release holds out",
                found=f"{', '.join(trained_on)}, which the release trains on",
                remedy="Take it out of held_out_sites: its subjects keep the splits that they have.",
            )
        )
    return source.held_out_sites.union(held_out)


def _differences(release: DataSchema, card: DataSchema) -> Iterator[tuple[str, str]]:
    """(what the release has, what the card has)."""
    if release.label != card.label:
        yield _label(release), _label(card)
    if release.names != card.names:
        yield f"modalities {', '.join(release.names)}", f"{', '.join(card.names)}"
        return
    for had, has in zip(release.modalities, card.modalities, strict=True):
        yield from _modality_differences(had, has)


def _modality_differences(had: ModalitySpec, has: ModalitySpec) -> Iterator[tuple[str, str]]:
    if had.kind != has.kind:
        yield f"modality {had.name} of kind {had.kind}", f"kind {has.kind}"
        return
    plain_had, plain_has = had.model_dump(exclude={"variables"}), has.model_dump(exclude={"variables"})
    for field, value in plain_had.items():
        if plain_has[field] != value:
            yield f"modality {had.name}: {field} {value}", str(plain_has[field])
    if isinstance(had, SeriesSpec | TableSpec) and isinstance(has, SeriesSpec | TableSpec):
        yield from _variable_differences(had, has)


def _variable_differences(had: SeriesSpec | TableSpec, has: SeriesSpec | TableSpec) -> Iterator[tuple[str, str]]:
    names, other = [v.name for v in had.variables], [v.name for v in has.variables]
    if names != other:
        here, there = set(names), set(other)
        lost, more = [n for n in names if n not in there], [n for n in other if n not in here]
        parts = [f"without {_shown(lost)}"] * bool(lost) + [f"with {_shown(more)}"] * bool(more)
        yield f"modality {had.name}: variables {_shown(names)}", " and ".join(parts) or "them in another order"
        return
    for one, two in zip(had.variables, has.variables, strict=True):
        mine, theirs = one.model_dump(), two.model_dump()
        for field in dict.fromkeys((*mine, *theirs)):
            if mine.get(field) != theirs.get(field):
                yield f"modality {had.name}, variable {one.name}: {field} {mine.get(field)!r}", repr(theirs.get(field))


def _shown(names: Sequence[str]) -> str:
    """Names for a message; of thousands the first."""
    return ", ".join(names[:SHOWN_NAMES]) + (f", ... ({len(names)} in all)" if len(names) > SHOWN_NAMES else "")


def _label(schema: DataSchema) -> str:
    return f"label {schema.label.name} with {', '.join(schema.label.outputs)}"

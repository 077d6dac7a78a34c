"""Cards of kind `webdataset`: what the members of tars that another program wrote mean. Reference: docs/webdataset.md.

Such tars are indexed where they lie; data/foreign.py reads them.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from pydantic import Field, model_validator

from draf_dist.config.spec import fingerprint
from draf_dist.errors import SpecError, explain
from draf_dist.schema.label import LabelSpec
from draf_dist.schema.modality import DataSchema, ImageSpec, SeriesSpec, TableSpec, VariableSpec
from draf_dist.sources.card_model import CardPart, Code, Licence, Name, SiteName, Split

# Last parts of the extensions that can be decoded; everything else, pickles above all, can't be named as an input.
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "npy")
VALUE_ENDINGS = ("npy",)
# Would run code when decoded. A card may not even name them as a word.
PICKLE_ENDINGS = ("pyd", "pkl", "pickle", "pth", "pt", "p", "joblib", "dill", "ckpt")
META_MEMBER = "json"

# What follows the first dot of a member's base name, in lower case, as WebDataset takes it: "jpg", "vitals.npy".
Extension = Annotated[str, Field(pattern=r"^[a-z0-9_-]+(\.[a-z0-9_-]+)*$", max_length=64)]
Extensions = Extension | tuple[Extension, ...]
FixedSplit = Literal["train", "val", "test"]


class WordCard(CardPart):
    """Where a word about a sample stands; exactly one of these.

    field: of the sample's json member (a list: the names on the way down). member: the extension of a member that holds the word
    alone, as `cls` does. key_until: the sample's key up to the first such separator.
    """

    field: str | tuple[str, ...] | None = None
    member: Extension | None = None
    key_until: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _stands_in_one_place(self) -> "WordCard":
        if len(self.places()) != 1:
            raise ValueError(f"exactly one of {', '.join(self.place_names())} is needed")
        if self.member is not None and ending(self.member) in (*PICKLE_ENDINGS, META_MEMBER):
            raise ValueError(f"member {self.member} is no plain text; of json name the `field`")
        return self

    @classmethod
    def place_names(cls) -> tuple[str, ...]:
        """The keys of which one is to be given."""
        return ("field", "member", "key_until")

    def places(self) -> list[str]:
        """Those that are given."""
        return [name for name in self.place_names() if getattr(self, name) is not None]

    @property
    def path(self) -> tuple[str, ...]:
        """Of the field: the names on the way down; empty where the word stands elsewhere."""
        return () if self.field is None else (self.field,) if isinstance(self.field, str) else self.field


class SitesCard(WordCard):
    """The site of a sample: constant (all are of one), or a word. groups: site -> words that mean it. other: of all other words."""

    constant: SiteName | None = None
    groups: dict[SiteName, Code] = Field(default_factory=dict)
    other: SiteName | None = None

    @model_validator(mode="after")
    def _words_mean_one_site(self) -> "SitesCard":
        words = [word for site in self.groups for word in self.words(site)]
        if repeated := repeats(words):
            raise ValueError(f"{', '.join(repeated)} in two groups")
        if (self.constant is None) != bool(self.groups) or (self.constant is not None and self.other is not None):
            raise ValueError("either a `constant` site, or `groups` of words")
        return self

    @classmethod
    def place_names(cls) -> tuple[str, ...]:
        """See WordCard."""
        return (*super().place_names(), "constant")

    def words(self, site: str) -> tuple[str, ...]:
        """The words of a group."""
        group = self.groups[site]
        return (group,) if isinstance(group, str) else tuple(group)

    def names(self) -> tuple[str, ...]:
        """Site names in the order of the card, `other` last."""
        named = tuple(self.groups) if self.constant is None else (self.constant,)
        return named if self.other is None or self.other in named else (*named, self.other)


class LabelWordCard(WordCard):
    """A class label: the word is a class, one of `values` (word -> class), or the index of a class, in this order."""

    classes: tuple[str, ...] = Field(min_length=2)
    values: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _values_are_classes(self) -> "LabelWordCard":
        if unknown := sorted(set(self.values.values()) - set(self.classes)):
            raise ValueError(f"values lead to {', '.join(unknown)}, which is none of the classes")
        if repeated := repeats(self.classes):
            raise ValueError(f"{', '.join(repeated)} twice in classes")
        return self


class TarSplit(Split):
    """files: split -> pattern(s) of tar names, where who wrote the tars has divided them; without it subjects are divided by us."""

    files: dict[FixedSplit, Code] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _something_trains(self) -> "TarSplit":
        if self.files and "train" not in self.files:
            raise ValueError("`files` needs a pattern for train")
        return self

    def patterns(self, split: FixedSplit) -> tuple[str, ...]:
        """The patterns of a split that `files` names."""
        named = self.files[split]
        return (named,) if isinstance(named, str) else tuple(named)


class TarVariable(CardPart):
    """One column of a series or table, in the unit it is stored in. A sample with a value outside the range is not used."""

    name: Name
    unit: str = ""
    range: tuple[float | None, float | None] = (None, None)
    type: Literal["numeric", "binary"] = "numeric"

    def spec(self) -> VariableSpec:
        """The variable as the release describes it."""
        low, high = self.range
        return VariableSpec(name=self.name, unit=self.unit, low=low, high=high, type=self.type)


class TarModality(CardPart):
    """Base: member is the extension of the file that holds the modality, or several of which a sample has one."""

    name: Name
    member: Extensions

    @property
    def extensions(self) -> tuple[str, ...]:
        """All that are given."""
        return (self.member,) if isinstance(self.member, str) else tuple(self.member)

    def _allow(self, endings: tuple[str, ...]) -> None:
        if refused := [name for name in self.extensions if ending(name) not in endings]:
            raise ValueError(f"member {', '.join(refused)}: only {', '.join(endings)} can be decoded")


class TarImage(TarModality):
    """8-bit images, all of this size: JPEG or PNG of 1 or 3 channels, or npy, uint8 (C, H, W)."""

    kind: Literal["image"] = "image"
    height: int = Field(ge=8)
    width: int = Field(ge=8)
    channels: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _can_be_decoded(self) -> "TarImage":
        self._allow(IMAGE_ENDINGS)
        return self

    def spec(self) -> ImageSpec:
        """The modality as the release describes it."""
        return ImageSpec(name=self.name, channels=self.channels, height=self.height, width=self.width)


class TarSeries(TarModality):
    """npy of float32 (T, F): T steps of step_h hours that end at the moment of prediction, NaN where not observed."""

    kind: Literal["series"] = "series"
    num_steps: int = Field(ge=1)
    step_h: float = Field(gt=0, allow_inf_nan=False)
    variables: tuple[TarVariable, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _can_be_decoded(self) -> "TarSeries":
        self._allow(VALUE_ENDINGS)
        return self

    def spec(self) -> SeriesSpec:
        """The modality as the release describes it."""
        variables = tuple(variable.spec() for variable in self.variables)
        return SeriesSpec(name=self.name, variables=variables, num_steps=self.num_steps, step_h=self.step_h)


class TarTable(TarModality):
    """npy of float32 (1, F), NaN where not observed."""

    kind: Literal["table"] = "table"
    variables: tuple[TarVariable, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _can_be_decoded(self) -> "TarTable":
        self._allow(VALUE_ENDINGS)
        return self

    def spec(self) -> TableSpec:
        """The modality as the release describes it."""
        return TableSpec(name=self.name, variables=tuple(variable.spec() for variable in self.variables))


TarModalityCard = Annotated[TarImage | TarSeries | TarTable, Field(discriminator="kind")]


class WebDatasetCard(CardPart):
    """What the samples of foreign WebDataset tars are.

    keys: `unique` means that a key is one sample wherever it occurs; `per_tar` that every tar counts anew. subject: who a sample is
    of; without it everyone has one sample.
    """

    kind: Literal["webdataset"] = "webdataset"
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    description: str = ""
    licence: Licence
    split: TarSplit = TarSplit()
    keys: Literal["unique", "per_tar"] = "unique"
    sites: SitesCard
    subject: WordCard | None = None
    label: Name
    labels: dict[Name, LabelWordCard] = Field(min_length=1)
    modalities: tuple[TarModalityCard, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "WebDatasetCard":
        if problems := list(self._problems()):
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        if self.label not in self.labels:
            yield f"label {self.label} is none of {', '.join(self.labels)}"
        if unknown := sorted(set(self.split.held_out_sites) - set(self.sites.names())):
            yield f"held-out sites {', '.join(unknown)} are none of {', '.join(self.sites.names())}"
        if repeated := repeats(modality.name for modality in self.modalities):
            yield f"modality {', '.join(repeated)} twice"
        if repeated := repeats(name for modality in self.modalities for name in modality.extensions):
            yield f"member {', '.join(repeated)} twice"
        places: tuple[WordCard | None, ...] = (*self.labels.values(), self.sites, self.subject)
        words = [place.member for place in places if place is not None and place.member is not None]
        if both := sorted(set(words) & {name for modality in self.modalities for name in modality.extensions}):
            yield f"member {', '.join(both)} is both a modality and a word"
        for modality in self.modalities:
            if not isinstance(modality, TarImage) and (repeated := repeats(variable.name for variable in modality.variables)):
                yield f"{modality.name}: variable {', '.join(repeated)} twice"

    @property
    def chosen_label(self) -> LabelWordCard:
        """The label that `label` names."""
        return self.labels[self.label]

    @property
    def words(self) -> tuple[WordCard, ...]:
        """Everything that is read as a word."""
        return tuple(word for word in (self.chosen_label, self.sites, self.subject) if word is not None)

    @property
    def sha256(self) -> str:
        """Fingerprint of the card with all defaults filled in and overrides applied."""
        return fingerprint(self)

    def data_schema(self) -> DataSchema:
        """What a release made with this card holds: a function of the card alone."""
        label = LabelSpec(name=self.label, classes=self.chosen_label.classes)
        return DataSchema(modalities=tuple(modality.spec() for modality in self.modalities), label=label, sites=self.sites.names())

    def build(self, raw: Path) -> NoReturn:
        """Tars are no raw export.

        Raises:
            SpecError: always.
        """
        remedy = "Give the tars with --from-webdataset."
        raise SpecError(explain(str(raw), expected="a card of a raw export", found="one of kind webdataset", remedy=remedy))


def ending(extension: str) -> str:
    """The last part of an extension."""
    return extension.rpartition(".")[2]


def repeats(names: Iterable[str]) -> list[str]:
    """Names that occur more than once, each once."""
    seen: set[str] = set()
    found: dict[str, None] = {}
    for name in names:
        if name in seen:
            found[name] = None
        seen.add(name)
    return list(found)

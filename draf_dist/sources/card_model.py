"""The card as a model: sites, tables, anchor, variables, modalities, labels. docs/cards.md shows each as a small example."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field, model_validator

from draf_dist.config.spec import fingerprint
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, SeriesSpec, TableSpec, VariableSpec
from draf_dist.sources.card_columns import ColumnsCard as ColumnsCard
from draf_dist.sources.card_labels import AnyLabelCard
from draf_dist.sources.card_parts import CardPart as CardPart
from draf_dist.sources.card_parts import Name as Name
from draf_dist.sources.card_parts import SiteName as SiteName
from draf_dist.sources.card_parts import WindowHours as WindowHours
from draf_dist.sources.card_variables import Code as Code
from draf_dist.sources.card_variables import LocalCode as LocalCode
from draf_dist.sources.card_variables import MultiHot as MultiHot
from draf_dist.sources.card_variables import VariableCard as VariableCard
from draf_dist.sources.card_variables import codes_at as codes_at
from draf_dist.sources.card_volume import VolumeCard as VolumeCard

DEFAULT_MISSING = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None", "?")


class Licence(CardPart):
    """Under which terms the data may be used."""

    name: str
    url: str = ""
    terms: str = ""


class Split(CardPart):
    """How subjects are divided. Sites held out are never trained on: all their subjects go to the split `ood`.

    public_subject_key is for data without real people only: identifiers are then hashed with a key that everybody knows.
    """

    held_out_sites: tuple[SiteName, ...] = ()
    public_subject_key: bool = False


class SiteFolders(CardPart):
    """One set of files per site: `{site}` in paths is replaced by the text given here (a list means the name itself)."""

    folders: tuple[SiteName, ...] | dict[SiteName, str]

    def names(self) -> tuple[str, ...]:
        """Site names in the order of the card."""
        return tuple(self.folders)

    def folder(self, site: str) -> str:
        """What `{site}` stands for."""
        return self.folders[site] if isinstance(self.folders, dict) else site


class SiteColumn(CardPart):
    """The site is a value in the studies table.

    pattern: a regular expression whose first group is taken from the cell (default: the whole cell), then blanks at the ends are
    dropped and upper and lower case are one. groups: site -> the values that belong to it. other: the site of every value that no
    group lists; without it such a study is rejected.
    """

    column: str
    pattern: str | None = None
    groups: dict[SiteName, Code]
    other: SiteName | None = None

    def names(self) -> tuple[str, ...]:
        """Site names in the order of the card, `other` last."""
        return (*self.groups, self.other) if self.other is not None else tuple(self.groups)

    def folder(self, site: str) -> str:
        """All sites share one set of files, so paths have no `{site}`."""
        return site


class TableCard(CardPart):
    """One kind of CSV file.

    path: below the raw folder, may contain `{site}`. header: column names of a file without a header line. missing: strings that
    mean "not known" here, beside those of the card. where: column -> values; other rows are not read. rename: site -> {column as
    that site calls it: name that the card uses}.
    study, subject: the columns that join a row to a study (study first, if both are given).
    time: when the row's values became known. static: true instead of a time says that everything in the table was known before
    the event; you vouch for that.
    code, value, unit: columns of a long table (one value per row); without `code` the table is wide (one variable per column).
    """

    path: str
    delimiter: str = Field(",", min_length=1, max_length=1)
    decimal: Literal[".", ","] = "."
    encoding: Literal["utf-8", "latin-1"] = "utf-8"
    header: tuple[str, ...] | None = None
    missing: tuple[str, ...] = ()
    where: dict[str, Code] = Field(default_factory=dict)
    rename: dict[SiteName, dict[str, str]] = Field(default_factory=dict)
    study: str | None = None
    subject: str | None = None
    time: str | None = None
    time_format: str | None = None
    static: bool = False
    code: str | None = None
    value: str | None = None
    unit: str | None = None

    @model_validator(mode="after")
    def _long_tables_have_values(self) -> "TableCard":
        if (self.code is None) != (self.value is None):
            raise ValueError("a long table needs both `code` and `value`")
        if self.unit is not None and self.code is None:
            raise ValueError("only a long table has a `unit` column; give the unit of each variable instead")
        if self.static and self.time is not None:
            raise ValueError("a table is either `static` or has a `time`, not both")
        if self.time_format is not None and self.time is None:
            raise ValueError("`time_format` without `time`")
        return self


class Anchor(CardPart):
    """The moment of prediction: the event's time plus offset_h hours.

    column: in the studies table; may be left out where times are numbers counted from the event itself. number_unit: set where
    times are numbers (then every `time` column is in this unit), left out where they are dates. format: strptime pattern of the
    event's column; without it ISO 8601 is read.
    """

    column: str | None = None
    offset_h: float = Field(0.0, allow_inf_nan=False)
    number_unit: Literal["minute", "hour", "day"] | None = None
    format: str | None = None

    @model_validator(mode="after")
    def _dates_need_a_column(self) -> "Anchor":
        if self.column is None and self.number_unit is None:
            raise ValueError("an anchor on dates needs the event's `column`")
        return self


class StudiesCard(CardPart):
    """Which table lists the studies, one a row, and which of a subject's rows count.

    The table's `subject` column names the person; without one every row is a person of its own. Without an anchor the export has
    no times at all and everything in it is taken to be known. repeat: each row, or only the first or last of a subject.
    """

    table: Name
    anchor: Anchor | None = None
    repeat: Literal["each", "first", "last"] = "each"


class ImageCard(CardPart):
    """One image per study: the latest in the window. Sites in absent_at have none (the same for every kind of modality).

    file: the column with the file's name; path: where it lies below the raw folder, with `{site}` and `{file}`. height, width: to
    which the release resizes. Images whose shorter side is below min_side_px or longer side above max_side_px are rejected.
    levels: raw intensities shown as black and white; without it 16-bit images span their own minimum to maximum.
    """

    kind: Literal["image"] = "image"
    name: Name
    table: Name
    absent_at: tuple[SiteName, ...] = ()
    file: str
    path: str
    window_h: WindowHours | None = None
    height: int = Field(ge=8)
    width: int = Field(ge=8)
    channels: Literal[1, 3] = 1
    min_side_px: int = Field(8, ge=1)
    max_side_px: int = Field(8192, ge=1, le=9000)
    levels: tuple[float, float] | None = None

    def spec(self) -> ModalitySpec:
        """The modality as the release describes it."""
        return ImageSpec(name=self.name, channels=self.channels, height=self.height, width=self.width)


class SeriesCard(CardPart):
    """Variables on a grid of step_h hours that ends at the anchor and starts with the window."""

    kind: Literal["series"] = "series"
    name: Name
    table: Name
    absent_at: tuple[SiteName, ...] = ()
    window_h: WindowHours
    step_h: float = Field(1.0, gt=0, allow_inf_nan=False)
    aggregate: Literal["last", "mean"] = "mean"
    variables: tuple[VariableCard, ...] = Field(min_length=1)

    @property
    def num_steps(self) -> int:
        """T; the checks of the card make sure that the steps fit."""
        return round(-self.window_h[0] / self.step_h)

    def spec(self) -> ModalitySpec:
        """The modality as the release describes it."""
        variables = tuple(variable.spec() for variable in self.variables)
        return SeriesSpec(name=self.name, variables=variables, num_steps=self.num_steps, step_h=self.step_h)


class TableModalityCard(CardPart):
    """One row of variables: the aggregate of each over the window, many columns of a wide table at once, and multi-hot codes."""

    kind: Literal["table"] = "table"
    name: Name
    table: Name
    absent_at: tuple[SiteName, ...] = ()
    window_h: WindowHours | None = None
    aggregate: Literal["last", "mean", "min", "max"] = "last"
    variables: tuple[VariableCard, ...] = ()
    # Left out of what is stored where empty, or every older release had another version.
    columns: tuple[ColumnsCard, ...] = Field((), exclude_if=lambda columns: columns == ())
    multi_hot: tuple[MultiHot, ...] = ()

    @model_validator(mode="after")
    def _has_variables(self) -> "TableModalityCard":
        if not self.variables and not self.columns and not self.multi_hot:
            raise ValueError("a table needs `variables`, `columns` or `multi_hot`")
        return self

    def spec(self, columns: tuple[VariableSpec, ...] = ()) -> ModalitySpec:
        """The modality as the release describes it: plain variables, then `columns`, then the multi-hot ones.

        columns: those that were found for the patterns and lists of the card, which only the export can say.
        """
        plain = tuple(variable.spec() for variable in self.variables)
        hot = tuple(spec for hot in self.multi_hot for spec in hot.specs())
        return TableSpec(name=self.name, variables=plain + columns + hot)


# Modalities that are a file a study, named by a row of a table.
FileCard = ImageCard | VolumeCard
ModalityCard = Annotated[ImageCard | VolumeCard | SeriesCard | TableModalityCard, Field(discriminator="kind")]


class Card(CardPart):
    """Everything that is to be known about a raw export (reference with examples: docs/cards.md).

    tables: name -> one kind of CSV file. labels: name -> label, and `label` chooses one. missing: strings that mean "not known"
    in every table. unit_aliases: spelling of a unit in this export -> a unit that is understood, e.g. {"MG/DL": "mg/dL"}.
    """

    kind: Literal["hospital_export"] = "hospital_export"
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    description: str = ""
    licence: Licence
    split: Split = Split()
    sites: SiteFolders | SiteColumn
    missing: tuple[str, ...] = DEFAULT_MISSING
    unit_aliases: dict[str, str] = Field(default_factory=dict)
    tables: dict[Name, TableCard] = Field(min_length=1)
    studies: StudiesCard
    label: Name
    labels: dict[Name, AnyLabelCard] = Field(min_length=1)
    modalities: tuple[ModalityCard, ...] = Field(min_length=1)

    @property
    def chosen_label(self) -> AnyLabelCard:
        """The label that `label` names."""
        return self.labels[self.label]

    def table(self, name: str) -> TableCard:
        """A table as it is read: that of the studies with the `where` of the chosen label beside its own."""
        table = self.tables[name]
        wanted = self.chosen_label.where if name == self.studies.table else {}
        return table.model_copy(update={"where": {**table.where, **wanted}})

    @property
    def takes_columns(self) -> bool:
        """Whether only the export can say which variables there are."""
        return any(isinstance(modality, TableModalityCard) and bool(modality.columns) for modality in self.modalities)

    @property
    def sha256(self) -> str:
        """Fingerprint of the card with all defaults filled in and overrides applied."""
        return fingerprint(self)

    def data_schema(self, columns: Mapping[str, tuple[VariableSpec, ...]] = MappingProxyType({})) -> DataSchema:
        """What a release made with this card holds: a function of the card, and of the columns found where it takes many at once.

        columns: modality -> its columns, see find_columns.
        """
        modalities = tuple(
            modality.spec(columns.get(modality.name, ())) if isinstance(modality, TableModalityCard) else modality.spec()
            for modality in self.modalities
        )
        return DataSchema(modalities=modalities, label=self.chosen_label.spec(self.label), sites=self.sites.names())

"""The card of kind `eicu`: which columns of which tables become which variables.

A card can name only what is known by the end of the first day: tables and columns are listed here, and none of them holds an
outcome, a prediction or anything written at discharge.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from draf_dist.config.spec import fingerprint
from draf_dist.schema.label import LabelSpec
from draf_dist.schema.modality import DataSchema, ModalitySpec, SeriesSpec, TableSpec, VariableSpec
from draf_dist.sources.card_model import DEFAULT_MISSING, CardPart, Code, Licence, Name, Split

MINUTES_PER_HOUR = 60
CLASSES = ("survived", "died")

# Columns of the patient table that are filled in at admission to the unit.
PatientColumn = Literal[
    "age",
    "gender",
    "ethnicity",
    "admissionheight",
    "admissionweight",
    "hospitaladmitoffset",
    "unittype",
    "unitadmitsource",
    "unitvisitnumber",
    "unitstaytype",
]
ApacheColumn = Literal[
    "intubated",
    "vent",
    "dialysis",
    "eyes",
    "motor",
    "verbal",
    "meds",
    "urine",
    "wbc",
    "temperature",
    "respiratoryrate",
    "sodium",
    "heartrate",
    "meanbp",
    "ph",
    "hematocrit",
    "creatinine",
    "albumin",
    "pao2",
    "pco2",
    "bun",
    "glucose",
    "bilirubin",
    "fio2",
]
VitalColumn = Literal[
    "noninvasivesystolic",
    "noninvasivediastolic",
    "noninvasivemean",
    "paop",
    "cardiacoutput",
    "cardiacinput",
    "svr",
    "svri",
    "pvr",
    "pvri",
]


class Variable(CardPart):
    """A number. unit: of the export, kept as it is. range: plausible values, both ends included; what lies outside is not observed.

    values: texts -> numbers ("> 89" is an age). missing: numbers that mean "not known" (-1 throughout the APACHE variables).
    """

    name: Name
    unit: str = ""
    range: tuple[float | None, float | None] = (None, None)
    type: Literal["numeric", "binary"] = "numeric"
    values: dict[str, float] = Field(default_factory=dict)
    missing: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _range_is_ordered(self) -> "Variable":
        low, high = self.range
        if low is not None and high is not None and low >= high:
            raise ValueError(f"range [{low}, {high}] is empty")
        return self

    def spec(self) -> VariableSpec:
        """The variable as the release describes it."""
        low, high = self.range
        return VariableSpec(name=self.name, unit=self.unit, low=low, high=high, type=self.type)


class PatientVariable(Variable):
    """A number from the patient table."""

    column: PatientColumn


class ApacheVariable(Variable):
    """A number from apacheApsVar: the worst value of the first day by the rules of the APACHE score."""

    column: ApacheColumn
    missing: tuple[float, ...] = (-1,)


class VitalVariable(Variable):
    """A number from vitalAperiodic."""

    column: VitalColumn


class ChartedVariable(Variable):
    """A number from respiratoryCharting. labels: the names under which it is charted, all in one unit."""

    labels: Code

    @property
    def all_labels(self) -> tuple[str, ...]:
        """The labels as a tuple."""
        return (self.labels,) if isinstance(self.labels, str) else self.labels


class CodeList(CardPart):
    """Binary variables from the codes of a stay. A pattern may hold `*`; upper and lower case are one.

    prefix goes before every name. says_nothing: codes that do not show that anybody looked; a stay with no other rows is not
    observed. A stay that has rows of the table in the first day, but none that match, has 0; one without rows is not observed.
    """

    column: str
    prefix: str = Field("", pattern=r"^([a-z][a-z0-9_]*)?$")
    says_nothing: tuple[str, ...] = ()
    codes: dict[Name, Code] = Field(min_length=1)

    def patterns(self) -> tuple[tuple[str, ...], ...]:
        """Patterns of every variable in the order of the card."""
        return tuple((code,) if isinstance(code, str) else code for code in self.codes.values())

    def specs(self) -> tuple[VariableSpec, ...]:
        """The variables as the release describes them."""
        return tuple(VariableSpec(name=f"{self.prefix}{name}", type="binary") for name in self.codes)


class PatientCodes(CodeList):
    """One-hot of a column of the patient table."""

    column: PatientColumn


class MedicationCodes(CodeList):
    """Orders under way in the first day, by therapeutic class (gtc) or by their text. A later cancellation is not looked at."""

    column: Literal["gtc", "drugname"]


class InfusionCodes(CodeList):
    """Infusions charted in the first day."""

    column: Literal["drugname"] = "drugname"


class HistoryCodes(CodeList):
    """Past history entered by the end of the first day."""

    column: Literal["pasthistorypath"] = "pasthistorypath"


class AdmissionCodes(CodeList):
    """Admission diagnoses entered by the end of the first day."""

    column: Literal["admitdxpath"] = "admitdxpath"


class ApacheCard(CardPart):
    """Modality `apache`: who the patient is, and the variables of the APACHE score."""

    patient: tuple[PatientVariable, ...] = ()
    patient_codes: tuple[PatientCodes, ...] = ()
    apache: tuple[ApacheVariable, ...] = Field(min_length=1)


class VitalsCard(CardPart):
    """Modality `vitals`: means of vitalAperiodic on steps of step_h hours."""

    step_h: float = Field(1.0, gt=0, allow_inf_nan=False)
    aggregate: Literal["last", "mean"] = "mean"
    variables: tuple[VitalVariable, ...] = Field(min_length=1)


class RespirationCard(CardPart):
    """Modality `respiration`: what respiratoryCharting says on steps of step_h hours."""

    step_h: float = Field(1.0, gt=0, allow_inf_nan=False)
    aggregate: Literal["last", "mean"] = "last"
    variables: tuple[ChartedVariable, ...] = Field(min_length=1)


class DrugsCard(CardPart):
    """Modality `drugs`: medication orders and infusions as 0 and 1."""

    medication: tuple[MedicationCodes, ...] = Field(min_length=1)
    infusion: tuple[InfusionCodes, ...] = Field(min_length=1)


class HistoryCard(CardPart):
    """Modality `history`: past history and admission diagnoses as 0 and 1."""

    past: tuple[HistoryCodes, ...] = Field(min_length=1)
    admission: tuple[AdmissionCodes, ...] = Field(min_length=1)


class EicuLayout(CardPart):
    """An eICU export: a stay in a unit is a study, a hospital a site, a `uniquepid` a subject; death in hospital is predicted.

    window_h: hours from admission to the unit; the anchor is their end. min_stay_h: shorter stays are left out and counted.
    """

    kind: Literal["eicu"] = "eicu"
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    description: str = ""
    licence: Licence
    split: Split = Split()
    window_h: Annotated[float, Field(gt=0, le=24, allow_inf_nan=False)] = 24.0
    min_stay_h: float = Field(6.0, ge=0, allow_inf_nan=False)
    missing: tuple[str, ...] = DEFAULT_MISSING
    apache: ApacheCard
    vitals: VitalsCard
    drugs: DrugsCard
    respiration: RespirationCard
    history: HistoryCard

    @property
    def sha256(self) -> str:
        """Fingerprint of the card with all defaults filled in and overrides applied."""
        return fingerprint(self)

    @model_validator(mode="after")
    def _steps_fit(self) -> "EicuLayout":
        for name, step_h in (("vitals", self.vitals.step_h), ("respiration", self.respiration.step_h)):
            if abs(self.num_steps(step_h) * step_h - self.window_h) > 1e-9 or self.num_steps(step_h) < 1:
                raise ValueError(
                    f"{name}.step_h: expected a part of the {self.window_h:g} hours that goes in evenly, found {step_h:g}"
                )
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> "EicuLayout":
        for modality in self.modalities():
            names = [variable.name for variable in getattr(modality, "variables", ())]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{modality.name}: expected different names, found {', '.join(twice)} twice")
        return self

    def num_steps(self, step_h: float) -> int:
        """T of a series."""
        return round(self.window_h / step_h)

    def modalities(self) -> tuple[ModalitySpec, ...]:
        """The five modalities in axis order."""
        apache = [*self.apache.patient, *self.apache.apache]
        one_hot = [spec for codes in self.apache.patient_codes for spec in codes.specs()]
        drugs = [spec for codes in (*self.drugs.medication, *self.drugs.infusion) for spec in codes.specs()]
        history = [spec for codes in (*self.history.past, *self.history.admission) for spec in codes.specs()]
        return (
            TableSpec(name="apache", variables=(*(variable.spec() for variable in apache), *one_hot)),
            self._series("vitals", self.vitals),
            TableSpec(name="drugs", variables=tuple(drugs)),
            self._series("respiration", self.respiration),
            TableSpec(name="history", variables=tuple(history)),
        )

    def data_schema(self, sites: tuple[str, ...]) -> DataSchema:
        """What a release made with this card holds, where the export has these hospitals."""
        return DataSchema(modalities=self.modalities(), label=LabelSpec(name="death", classes=CLASSES), sites=sites)

    def _series(self, name: str, card: VitalsCard | RespirationCard) -> SeriesSpec:
        variables = tuple(variable.spec() for variable in card.variables)
        return SeriesSpec(name=name, variables=variables, num_steps=self.num_steps(card.step_h), step_h=card.step_h)

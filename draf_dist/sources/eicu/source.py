"""The source of kind `eicu`: one stay in an intensive care unit is a study."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from draf_dist.errors import DataError, SpecError, explain, together
from draf_dist.schema.study import Rejection, Study
from draf_dist.sources import tables
from draf_dist.sources.base import SourceCounts, TableCounts, VariableCounts
from draf_dist.sources.eicu import values
from draf_dist.sources.eicu.card import MINUTES_PER_HOUR, CodeList, EicuLayout, RespirationCard, Variable, VitalsCard
from draf_dist.sources.eicu.files import STAY, TIMINGS, KnownRows, Stays, find, find_all, known_rows, read
from draf_dist.sources.tables import Table, TableFile

HOSPITAL = "hospitalid"
SUBJECT = "uniquepid"
OUTCOME = "hospitaldischargestatus"
# How long the stay was decides whether it is in the cohort and which rows lie inside it. It is never an input.
STAY_END = "unitdischargeoffset"
LABELS = {"Alive": 0.0, "Expired": 1.0}


class Eicu:
    """An eICU export and its card.

    Raises:
        SpecError: there is no such folder, or a held-out hospital is none of the export's.
        DataError: the export has no table of hospitals.
    """

    def __init__(self, card: EicuLayout, raw: Path) -> None:
        if not raw.is_dir():
            raise SpecError(explain(str(raw), expected="a folder", found="none", remedy="Give the raw export's folder with --raw."))
        self.card = card
        self.raw = raw
        self.name = card.name
        self.schema = card.data_schema(_hospitals(card, raw))
        self.held_out_sites = frozenset(card.split.held_out_sites)
        self.public_subject_key = card.split.public_subject_key
        self.card_sha256 = card.sha256
        self.counts = SourceCounts()
        _check_held_out(card, self.schema.sites)

    def studies(self) -> Iterator[Study | Rejection]:
        """Every stay of sufficient length once, in the order of the patient table; those without a usable outcome as Rejections.

        Raises:
            DataError: a file or a column is missing, all of them together; a file that can't be read.
        """
        self.counts = SourceCounts()
        found = find_all(self.raw, _columns(self.card))
        stays, rejections = read_stays(self.card, read(found["patient"], self.card.missing), self.schema.sites, self.counts)
        yield from rejections
        inputs = _Reader(self.card, found, stays, self.counts).inputs()
        for i in range(len(stays)):
            yield self._study(stays, inputs, i)

    def _study(self, stays: Stays, inputs: dict[str, NDArray[np.float32]], i: int) -> Study:
        present = {name: array[i] for name, array in inputs.items() if not np.isnan(array[i]).all()}
        where = stays.table.where(int(stays.position[i]))
        return Study(stays.subject[i], stays.site[i], str(stays.key[i].as_py()), present, int(stays.label[i]), where=where)


class EicuCard(EicuLayout):
    """The card of kind `eicu`."""

    def build(self, raw: Path) -> Eicu:
        """The source that reads a raw folder by this card."""
        return Eicu(self, raw)


def site_name(hospital: str) -> str:
    """The site of a hospital's number."""
    return f"hospital_{hospital}"


def read_stays(card: EicuLayout, table: Table, sites: Sequence[str], counts: SourceCounts) -> tuple[Stays, list[Rejection]]:
    """The cohort: stays long enough, with a known outcome, patient and hospital; short ones are counted as outside the window."""
    length_min = tables.numbers(table.text(STAY_END))
    label = tables.mapped(table.text(OUTCOME), LABELS)
    key, subject = table.text(STAY), table.text(SUBJECT).to_pylist()
    site = [site_name(hospital or "") for hospital in table.text(HOSPITAL).to_pylist()]
    reasons = np.full(table.num_rows, "", dtype="U16")
    reasons[np.isnan(label)] = "unknown label"
    reasons[np.asarray(table.text(OUTCOME).is_null())] = "no label"
    reasons[np.isnan(length_min)] = "bad time"
    reasons[[name not in set(sites) for name in site]] = "unknown site"
    reasons[np.asarray(table.text(SUBJECT).is_null())] = "no subject"
    reasons[np.asarray(key.is_null())] = "no study id"
    reasons[_repeated(key.to_pylist())] = "repeated study"
    # Too short is not bad: the cohort is defined so. It would fill the quarantine and hide what is wrong.
    short = length_min < card.min_stay_h * MINUTES_PER_HOUR
    counts.tables["patient"] = TableCounts(rows=table.num_rows, outside_window=int(short.sum()))
    known_sites = set(sites)
    rejections = [
        Rejection(site[i] if site[i] in known_sites else "", table.where(int(i)), str(reasons[i]), _DETAILS[str(reasons[i])])
        for i in np.flatnonzero((reasons != "") & ~short)
    ]
    kept = np.flatnonzero((reasons == "") & ~short).astype(np.int64)
    until_min = np.minimum(length_min, card.window_h * MINUTES_PER_HOUR)
    stays = Stays(
        table=table,
        position=kept,
        key=key.take(pa.array(kept)),
        subject=tuple(str(subject[i]) for i in kept),
        site=tuple(site[i] for i in kept),
        label=label[kept].astype(np.int64),
        known_until_min=until_min[kept],
    )
    return stays, rejections


_DETAILS = {
    "unknown label": f"{OUTCOME} is neither Alive nor Expired",
    "no label": f"{OUTCOME} is empty",
    "bad time": f"{STAY_END} is missing or unreadable",
    "unknown site": f"{HOSPITAL} is none of the table of hospitals",
    "no subject": f"{SUBJECT} is missing",
    "no study id": f"{STAY} is missing",
    "repeated study": f"an earlier row has the same {STAY}",
}


class _Reader:
    """The modalities of all stays, one table in memory at a time."""

    def __init__(self, card: EicuLayout, found: dict[str, TableFile], stays: Stays, counts: SourceCounts) -> None:
        self._card = card
        self._found = found
        self._stays = stays
        self._counts = counts

    def inputs(self) -> dict[str, NDArray[np.float32]]:
        """Modality -> float32 (n, T, F), NaN where not observed."""
        card = self._card
        drugs = [
            *self._codes("drugs", "medication", card.drugs.medication),
            *self._codes("drugs", "infusionDrug", card.drugs.infusion),
        ]
        history = [
            *self._codes("history", "pastHistory", card.history.past),
            *self._codes("history", "admissionDx", card.history.admission),
        ]
        return {
            "apache": _joined([*self._patient(), *self._apache(), *self._patient_codes()]),
            "vitals": self._vitals(),
            "drugs": _joined(drugs),
            "respiration": self._respiration(),
            "history": _joined(history),
        }

    def _open(self, modality: str, name: str) -> tuple[Table, KnownRows]:
        table = read(self._found[name], self._card.missing)
        tally = self._counts.tables.setdefault(f"{modality}.{name}", TableCounts())
        return table, known_rows(table, TIMINGS[name], self._stays, tally)

    def _tally(self, modality: str, variable: str) -> VariableCounts:
        return self._counts.variables.setdefault(f"{modality}.{variable}", VariableCounts())

    def _patient(self) -> list[NDArray[np.float64]]:
        stays = self._stays
        taken = pa.array(stays.position)
        return [
            values.numbers(stays.table.text(variable.column).take(taken), variable, self._tally("apache", variable.name))[:, None]
            for variable in self._card.apache.patient
        ]

    def _patient_codes(self) -> list[NDArray[np.float64]]:
        stays = self._stays
        taken = pa.array(stays.position)
        columns = [values.category(stays.table.text(codes.column).take(taken), codes) for codes in self._card.apache.patient_codes]
        self._count("apache", self._card.apache.patient_codes, columns)
        return columns

    def _apache(self) -> list[NDArray[np.float64]]:
        table, rows = self._open("apache", "apacheApsVar")
        return [
            values.one_per_stay(rows, self._numbers("apache", table.text(variable.column), rows, variable), len(self._stays))
            for variable in self._card.apache.apache
        ]

    def _vitals(self) -> NDArray[np.float32]:
        table, rows = self._open("vitals", "vitalAperiodic")
        columns = [
            self._grid(rows, self._numbers("vitals", table.text(variable.column), rows, variable), self._card.vitals)
            for variable in self._card.vitals.variables
        ]
        return np.stack(columns, axis=2).astype(np.float32)

    def _respiration(self) -> NDArray[np.float32]:
        table, rows = self._open("respiration", "respiratoryCharting")
        label, text = table.text("respchartvaluelabel"), table.text("respchartvalue")
        columns = []
        for variable in self._card.respiration.variables:
            charted = tables.mapped(label, dict.fromkeys(variable.all_labels, 1.0))[rows.position] == 1.0
            own = KnownRows(rows.position[charted], rows.stay[charted], rows.offset_min[charted])
            columns.append(self._grid(own, self._numbers("respiration", text, own, variable), self._card.respiration))
        return np.stack(columns, axis=2).astype(np.float32)

    def _numbers(self, modality: str, text: pa.Array, rows: KnownRows, variable: Variable) -> NDArray[np.float64]:
        return values.numbers(text.take(pa.array(rows.position)), variable, self._tally(modality, variable.name))

    def _grid(self, rows: KnownRows, numbers: NDArray[np.float64], card: VitalsCard | RespirationCard) -> NDArray[np.float64]:
        num_steps = self._card.num_steps(card.step_h)
        return values.on_grid(rows, numbers, len(self._stays), card.step_h, num_steps, card.aggregate)

    def _codes(self, modality: str, name: str, lists: Sequence[CodeList]) -> list[NDArray[np.float64]]:
        table, rows = self._open(modality, name)
        columns = [values.multi_hot(rows, table.text(codes.column), codes, len(self._stays)) for codes in lists]
        self._count(modality, lists, columns)
        return columns

    def _count(self, modality: str, lists: Sequence[CodeList], columns: list[NDArray[np.float64]]) -> None:
        for codes, column in zip(lists, columns, strict=True):
            for spec, values_of_one in zip(codes.specs(), column.T, strict=True):
                self._tally(modality, spec.name).observed += int((~np.isnan(values_of_one)).sum())


def _joined(columns: list[NDArray[np.float64]]) -> NDArray[np.float32]:
    return np.concatenate(columns, axis=1).astype(np.float32)[:, None, :]


def _repeated(keys: list[str | None]) -> list[bool]:
    seen: set[str | None] = {None}
    again = []
    for key in keys:
        again.append(key in seen and key is not None)
        seen.add(key)
    return again


def _columns(card: EicuLayout) -> dict[str, set[str]]:
    """Table -> columns that are read."""
    timed = {name: {STAY, *(timing.columns() if timing is not None else ())} for name, timing in TIMINGS.items()}
    inputs = {*(variable.column for variable in card.apache.patient), *(codes.column for codes in card.apache.patient_codes)}
    named: dict[str, set[str]] = {
        "patient": {STAY, HOSPITAL, SUBJECT, OUTCOME, STAY_END, *inputs},
        "apacheApsVar": {variable.column for variable in card.apache.apache},
        "vitalAperiodic": {variable.column for variable in card.vitals.variables},
        "respiratoryCharting": {"respchartvaluelabel", "respchartvalue"},
        "medication": {codes.column for codes in card.drugs.medication},
        "infusionDrug": {codes.column for codes in card.drugs.infusion},
        "pastHistory": {codes.column for codes in card.history.past},
        "admissionDx": {codes.column for codes in card.history.admission},
    }
    return {name: {*columns, *timed.get(name, ())} for name, columns in named.items()}


def _hospitals(card: EicuLayout, raw: Path) -> tuple[str, ...]:
    """Sites of the export in the order of their numbers."""
    table = read(find(raw, "hospital", {HOSPITAL}), card.missing)
    numbers = [number for number in table.text(HOSPITAL).to_pylist() if number is not None]
    if not numbers:
        raise DataError(explain(table.file, expected="hospitals", found="none", remedy="Export the table again."))
    return tuple(site_name(number) for number in sorted(dict.fromkeys(numbers), key=lambda text: (len(text), text)))


def _check_held_out(card: EicuLayout, sites: Sequence[str]) -> None:
    known = set(sites)
    problems = [
        explain(
            "split.held_out_sites",
            expected="a hospital of the export",
            found=repr(name),
            remedy="Sites are named hospital_<number>.",
        )
        for name in card.split.held_out_sites
        if name not in known
    ]
    if known <= set(card.split.held_out_sites):
        problems.append(
            explain("split.held_out_sites", expected="a site left to train on", found="all sites", remedy="Hold out fewer.")
        )
    if problems:
        raise SpecError(together(problems))

"""What differs from hospital to hospital: scanner, codes, units, column names, how often something is missing or corrupted.

A profile depends on the site's number alone, not on the seed, so that one card fits every cohort with as many sites.
"""

from dataclasses import dataclass
from typing import Literal

from draf_dist.sources.synth.evidence import CODES

Texture = Literal["white", "rows", "grain", "columns", "grid"]

NAMES = ("northgate", "riverside", "st_anna", "lakeview")


@dataclass(frozen=True)
class Scanner:
    """Pixel = 255 (gain v / 255)^gamma + offset for the linear intensity v in 0..255; invertible but for clipping.

    texture, texture_sd: the scanner's own noise, in linear intensity. marker: (row, column) of a bright patch on the border.
    grid: period in pixels and axis (0 down, 1 across) of the stripes of texture "grid", the same in every image.
    """

    gain: float
    gamma: float
    offset: float
    texture: Texture
    texture_sd: float
    marker: tuple[int, int]
    grid: tuple[int, int] = (1, 0)


@dataclass(frozen=True)
class SiteProfile:
    """vitals, labs: variable -> (local code, local unit). diagnoses: variable -> local code. died, survived: words for the outcome.

    columns: what the site calls columns of studies.csv that the others call by the key. missing, corrupted: modality -> rate.
    """

    name: str
    prefix: str
    scanner: Scanner
    vitals: dict[str, tuple[str, str]]
    labs: dict[str, tuple[str, str]]
    diagnoses: dict[str, str]
    survived: str
    died: str
    female: str
    male: str
    columns: dict[str, str]
    missing: dict[str, float]
    corrupted: dict[str, float]


VITALS = ("heart_rate", "resp_rate", "temperature", "map", "spo2")
LABS = ("creatinine", "urea", "lactate", "haemoglobin", "glucose", "potassium", "haemolysis_index")
_ICD10 = ("I50.9", "J44.9", "N18.9", "E11.9", "I10", "C80.1", "I48.91", "I63.9", "K74.60", "F03.90")
_ICD9 = ("428.0", "496", "585.9", "250.00", "401.9", "199.1", "427.31", "434.91", "571.5", "290.0")
_LOCAL = ("D-HF", "D-COPD", "D-CKD", "D-DM", "D-HTN", "D-CA", "D-AF", "D-CVA", "D-CIRR", "D-DEM")


def _pairs(names: tuple[str, ...], codes: tuple[str, ...], units: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    return {name: (code, unit) for name, code, unit in zip(names, codes, units, strict=True)}


_SCANNERS = (
    Scanner(1.0, 1.0, 0.0, "white", 3.0, (6, 6)),
    Scanner(0.92, 0.9, 4.0, "rows", 3.0, (6, 82)),
    Scanner(1.06, 1.12, 0.0, "grain", 3.0, (84, 6)),
    Scanner(0.86, 0.8, 8.0, "columns", 4.0, (84, 82)),
)
_VITALS = (
    _pairs(VITALS, ("HR", "RR", "TEMP", "MAP", "SPO2"), ("1/min", "1/min", "degC", "mmHg", "%")),
    _pairs(VITALS, ("8867-4", "9279-1", "8310-5", "8478-0", "59408-5"), ("1/min", "1/min", "degF", "mmHg", "%")),
    _pairs(VITALS, ("VIT:101", "VIT:102", "VIT:103", "VIT:104", "VIT:105"), ("1/min", "1/min", "degC", "kPa", "%")),
    _pairs(VITALS, ("220045", "220210", "223761", "220052", "220277"), ("bpm", "breaths/min", "degF", "mmHg", "%")),
)
_LABS = (
    _pairs(
        LABS, ("CREA", "UREA", "LACT", "HB", "GLUC", "K", "HIX"), ("umol/L", "mmol/L", "mmol/L", "g/dL", "mmol/L", "mmol/L", "")
    ),
    _pairs(
        LABS,
        ("2160-0", "3091-6", "2524-7", "718-7", "2345-7", "2823-3", "20393-8"),
        ("mg/dL", "mg/dL", "mmol/L", "g/dL", "mg/dL", "mEq/L", ""),
    ),
    _pairs(
        LABS,
        ("LAB:11", "LAB:12", "LAB:13", "LAB:14", "LAB:15", "LAB:16", "LAB:17"),
        ("umol/L", "mmol/L", "mg/dL", "g/L", "mmol/L", "mmol/L", ""),
    ),
    _pairs(
        LABS,
        ("50912", "51006", "50813", "51222", "50931", "50971", "50934"),
        ("mg/dL", "mg/dL", "mmol/L", "g/dL", "mg/dL", "mEq/L", ""),
    ),
)
_DIAGNOSES = tuple(dict(zip(CODES.names, codes, strict=True)) for codes in (_ICD10, _ICD9, _LOCAL, _ICD10))
_OUTCOMES = (("survived", "died"), ("alive", "deceased"), ("0", "1"), ("survived", "died"))
_SEXES = (("F", "M"), ("female", "male"), ("2", "1"), ("F", "M"))
_COLUMNS: tuple[dict[str, str], ...] = ({}, {"subject_id": "mrn", "age": "age_years"}, {"admission": "admitted_at"}, {})
_MISSING = (
    {"cxr": 0.10, "vitals": 0.05, "labs": 0.10},
    {"cxr": 0.25, "vitals": 0.05, "labs": 0.15},
    {"cxr": 0.15, "vitals": 0.15, "labs": 0.05},
    {"cxr": 0.20, "vitals": 0.10, "labs": 0.20},
)
_CORRUPTED = (
    {"cxr": 0.15, "vitals": 0.20, "labs": 0.10, "history": 0.10},
    {"cxr": 0.25, "vitals": 0.15, "labs": 0.15, "history": 0.10},
    {"cxr": 0.20, "vitals": 0.25, "labs": 0.20, "history": 0.15},
    {"cxr": 0.30, "vitals": 0.25, "labs": 0.20, "history": 0.20},
)


def site_profile(number: int) -> SiteProfile:
    """The profile of site `number` (from 0). From the fifth on: words of an earlier one, codes, units and scanner of its own."""
    style = number % len(NAMES)
    is_own = number >= len(NAMES)
    prefix = f"S{number + 1:02d}"
    survived, died = _OUTCOMES[style]
    female, male = _SEXES[style]
    return SiteProfile(
        name=f"site_{number + 1:02d}" if is_own else NAMES[number],
        prefix=prefix,
        scanner=_own_scanner(number) if is_own else _SCANNERS[style],
        # No two of the first four measure like this: the vital signs of the next style, the laboratory of the one after.
        vitals=_own_codes(prefix, _VITALS[(style + 1) % len(NAMES)]) if is_own else _VITALS[style],
        labs=_own_codes(prefix, _LABS[(style + 2) % len(NAMES)]) if is_own else _LABS[style],
        diagnoses=_DIAGNOSES[style],
        survived=survived,
        died=died,
        female=female,
        male=male,
        columns=_COLUMNS[style],
        # History comes with the admission itself: it is never missing, so no study is empty.
        missing={**_MISSING[style], "history": 0.0},
        corrupted=_CORRUPTED[style],
    )


def _own_scanner(number: int) -> Scanner:
    """A look that no other of the first 26 sites has: stripes of a period and direction of its own, in a tone of its own."""
    k = number - len(NAMES)
    return Scanner(
        gain=0.74 + 0.06 * (k % 5),
        gamma=1.3 - 0.08 * (k % 7),
        offset=24.0 - 6.0 * (k % 4),
        texture="grid",
        texture_sd=3.0,
        marker=(6 if k % 2 else 84, 20 + 7 * k % 56),
        grid=(6 + k % 11, k % 2),
    )


def _own_codes(prefix: str, known: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    return {name: (f"{prefix}:{code}", unit) for name, (code, unit) in known.items()}

"""How a canonical value is written at a site: factor, offset and decimals of every unit in use."""

import numpy as np

from draf_dist.sources.synth.evidence import Floats

CANONICAL = {
    "heart_rate": "1/min",
    "resp_rate": "1/min",
    "temperature": "degC",
    "map": "mmHg",
    "spo2": "%",
    "creatinine": "umol/L",
    "urea": "mmol/L",
    "lactate": "mmol/L",
    "haemoglobin": "g/dL",
    "glucose": "mmol/L",
    "potassium": "mmol/L",
    "haemolysis_index": "",
}
# Plausible range in the canonical unit. Wide enough for the far tails of the planted evidence, too narrow for the planted dirt.
RANGES = {
    "heart_rate": (5.0, 300.0),
    "resp_rate": (1.0, 100.0),
    "temperature": (25.0, 45.0),
    "map": (1.0, 300.0),
    "spo2": (20.0, 100.0),
    "creatinine": (1.0, 3000.0),
    "urea": (0.1, 150.0),
    "lactate": (0.05, 50.0),
    "haemoglobin": (1.0, 25.0),
    "glucose": (0.5, 80.0),
    "potassium": (1.0, 12.0),
    "haemolysis_index": (0.0, 1000.0),
}
MOLAR_MASS_G_MOL = {"creatinine": 113.12, "urea": 60.06, "lactate": 90.08, "glucose": 180.16}
_MG_DL = {"creatinine": MOLAR_MASS_G_MOL["creatinine"] / 1e4} | {
    name: MOLAR_MASS_G_MOL[name] / 10 for name in ("urea", "lactate", "glucose")
}
_OTHER = {"degF": (1.8, 32.0), "kPa": (0.133322387415, 0.0), "g/L": (10.0, 0.0)}
_DECIMALS = {
    ("map", "kPa"): 2,
    ("creatinine", "mg/dL"): 3,
    ("lactate", "mmol/L"): 2,
    ("haemoglobin", "g/dL"): 2,
    ("urea", "mmol/L"): 2,
}


def written(variable: str, unit: str, values: Floats) -> list[str]:
    """Canonical values as the site's system prints them."""
    factor, offset = (_MG_DL[variable], 0.0) if unit == "mg/dL" else _OTHER.get(unit, (1.0, 0.0))
    decimals = 0 if variable == "haemolysis_index" else _DECIMALS.get((variable, unit), 1)
    return [f"{value:.{decimals}f}" for value in np.asarray(values) * factor + offset]

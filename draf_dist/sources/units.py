"""Clinical units: from what an export says to the canonical unit of a variable, as one multiplication and one addition.

pint knows the units; this file adds those of the ward, reads the spellings that hospital systems use, and refuses everything else.
"""

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pint
from numpy.typing import NDArray

# Counted things have no dimension, so that beats/min, breaths/min and 1/min convert freely.
_DEFINITIONS = (
    "bpm = 1 / minute",
    "beat = 1 = beats",
    "breath = 1 = breaths",
    "cell = 1 = cells",
    # An equivalent is an amount of charge: it converts to moles only through the valence.
    "equivalent = [charge_amount] = Eq",
    # International units measure an effect that differs from substance to substance: they convert to nothing else.
    "international_unit = [biological_activity] = IU",
)

# What hospital systems write (UCUM and common habits) -> what pint reads. Only whole strings are replaced.
_SPELLINGS = {
    "%": "percent",
    "Cel": "degC",
    "°C": "degC",
    "°F": "degF",
    "[degF]": "degF",
    "mm[Hg]": "mmHg",
    "/min": "1/min",
    "K/uL": "10^3/uL",
    "M/uL": "10^6/uL",
    "BPM": "bpm",
}
# `10*3/uL` (UCUM) and `10E3/uL` (habit) mean 10^3, which arithmetic would read as 30 and 10,000.
_POWER_OF_TEN = re.compile(r"^\s*(?:[x×]\s*)?10\s*(?:\*|[eE]|\^|\*\*)\s*(-?\d{1,2})(?=\D|$)")
# A string from a data file is not an arithmetic task (9^9^9 would never end): only these parts, joined by `/`, `*` or a blank.
_PART = re.compile(r"(?:10\^-?\d{1,2}|\d{1,4}(?:\.\d{1,4})?)?(?:[^\W\d]\w{0,30}(?:\^-?\d)?)?")
_SUPERSCRIPT = re.compile("[⁻⁰¹²³⁴-⁹]+")
_PLAIN_DIGITS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


class UnitError(ValueError):
    """A unit that is not known, or two that do not measure the same thing."""


@dataclass(frozen=True)
class Conversion:
    """canonical = scale * value + offset."""

    scale: float = 1.0
    offset: float = 0.0

    @property
    def is_identity(self) -> bool:
        """Whether values stay as they are."""
        return self.scale == 1.0 and self.offset == 0.0

    def __call__(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The values in the canonical unit."""
        return values if self.is_identity else values * self.scale + self.offset


@functools.lru_cache(maxsize=1024)
def conversion(unit: str, canonical: str, molar_mass_g_mol: float | None = None, valence: int | None = None) -> Conversion:
    """How values in `unit` become values in `canonical`; the empty unit is a plain number.

    Raises:
        UnitError: one of the units is not known, or they measure different things. Mass and amount of substance convert through
            the molar mass, equivalents and amount through the valence; without these they are different things.
    """
    if unit == canonical:
        parse(unit)
        return Conversion()
    source, target = parse(unit), parse(canonical)
    bridges: list[Any] = [1.0]
    if molar_mass_g_mol is not None:
        molar_mass = _registry().Quantity(molar_mass_g_mol, "g/mol")
        bridges += [1 / molar_mass, molar_mass]
    if valence is not None:
        charge = _registry().Quantity(float(valence), "Eq/mol")
        bridges += [1 / charge, charge]
    for bridge in bridges:
        found = _linear(source, target, bridge)
        if found is not None:
            return found
    raise UnitError(f"{unit!r} does not convert to {canonical!r}")


def parse(unit: str) -> Any:
    """The unit as a pint quantity (10^3/uL is 1000 times 1/uL).

    Raises:
        UnitError: it is not known.
    """
    text = _spelled(unit)
    try:
        quantity = _registry().Quantity(1.0, "dimensionless") if not text else _registry().parse_expression(text)
        quantity = quantity if isinstance(quantity, pint.Quantity) else _registry().Quantity(float(quantity), "dimensionless")
    except (pint.PintError, ValueError, TypeError, ArithmeticError, AttributeError, SyntaxError) as error:
        raise UnitError(f"{unit!r} is not a unit that is known") from error
    magnitude = quantity.magnitude
    if not isinstance(magnitude, int | float) or not math.isfinite(magnitude) or magnitude <= 0:
        raise UnitError(f"{unit!r} is not a unit that is known")
    return quantity


def _spelled(unit: str) -> str:
    text = _SUPERSCRIPT.sub(lambda run: "^" + run.group().translate(_PLAIN_DIGITS), unit.strip())
    text = _SPELLINGS.get(text, text)
    text = _POWER_OF_TEN.sub(r"10^\1", text).replace("**", "^")
    parts = re.split(r" ?[/* ] ?", " ".join(text.split()))
    if text and (len(text) > 40 or not all(part and _PART.fullmatch(part) for part in parts)):
        raise UnitError(f"{unit[:40]!r} is not a unit that is known")
    return text


def _linear(source: Any, target: Any, bridge: Any) -> Conversion | None:
    """Scale and offset from one unit to another, or None where their dimensions differ."""
    try:
        if isinstance(bridge, float):
            # Temperatures have an offset, so the line through two points is taken.
            zero, thousand = (
                _registry().Quantity(x * source.magnitude, source.units).to(target.units).magnitude for x in (0.0, 1e3)
            )
        else:
            zero, thousand = 0.0, (1e3 * source * bridge).to(target.units).magnitude
    except (pint.DimensionalityError, pint.OffsetUnitCalculusError):
        return None
    return Conversion(scale=(thousand - zero) / 1e3 / target.magnitude, offset=zero / target.magnitude)


@functools.cache
def _registry() -> pint.UnitRegistry[Any]:
    """Built once and only when needed: it takes about half a second."""
    registry: pint.UnitRegistry[Any] = pint.UnitRegistry(on_redefinition="ignore")
    for definition in _DEFINITIONS:
        registry.define(definition)
    return registry

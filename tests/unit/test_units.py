"""Clinical units: closed forms, spellings of hospital systems, and strings that must not be computed."""

import numpy as np
import pytest

from draf_dist.sources.units import Conversion, UnitError, conversion, parse

GLUCOSE_G_MOL = 180.156


def test_glucose_converts_through_its_molar_mass() -> None:
    there = conversion("mg/dL", "mmol/L", GLUCOSE_G_MOL)
    back = conversion("mmol/L", "mg/dL", GLUCOSE_G_MOL)
    np.testing.assert_allclose(there(np.array([90.0])), 90.0 * 10 / GLUCOSE_G_MOL, rtol=1e-12)
    np.testing.assert_allclose(back(there(np.array([90.0]))), 90.0, rtol=1e-12)


def test_fahrenheit_has_an_offset() -> None:
    np.testing.assert_allclose(conversion("degF", "degC")(np.array([32.0, 98.6, 212.0])), [0.0, 37.0, 100.0], atol=1e-12)


@pytest.mark.parametrize(
    "unit", ["10^3/uL", "10*3/uL", "10E3/uL", "10e3/uL", "x10^3/uL", "K/uL", "10³/µL", "10**3/uL", "10^9/L", "1000 cells/uL"]
)
def test_every_spelling_of_a_cell_count_means_the_same(unit: str) -> None:
    np.testing.assert_allclose(conversion(unit, "10^9/L")(np.array([7.3])), 7.3, rtol=1e-12)


@pytest.mark.parametrize(
    ("unit", "canonical", "scale"),
    [
        ("beats/min", "bpm", 1.0),
        ("breaths/min", "1/min", 1.0),
        ("/min", "bpm", 1.0),
        ("kPa", "mmHg", 1000 / 133.322387415),
        ("mm[Hg]", "mmHg", 1.0),
        ("%", "", 0.01),
        ("mg/dl", "g/L", 0.01),
        ("ug/L", "ng/mL", 1.0),
        ("mIU/L", "uIU/mL", 1.0),
        ("in", "cm", 2.54),
    ],
)
def test_ward_units_convert_by_a_factor(unit: str, canonical: str, scale: float) -> None:
    found = conversion(unit, canonical)
    assert found.offset == 0.0
    assert found.scale == pytest.approx(scale, rel=1e-8)


def test_equivalents_convert_through_the_valence_only() -> None:
    with pytest.raises(UnitError, match="does not convert"):
        conversion("mEq/L", "mmol/L")
    assert conversion("mEq/L", "mmol/L", None, 2).scale == pytest.approx(0.5)
    assert conversion("mmol/L", "mEq/L", None, 2).scale == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("unit", "canonical"), [("U/L", "mmol/L"), ("mg/dL", "mmol/L"), ("IU/L", "U/L"), ("bpm", "mmHg"), ("", "kg")]
)
def test_what_measures_another_thing_is_refused(unit: str, canonical: str) -> None:
    with pytest.raises(UnitError, match="does not convert"):
        conversion(unit, canonical)


@pytest.mark.parametrize(
    "unit",
    [
        "furlongish",
        "9^9^9",
        "9^(9^9)",
        "9**99**99",
        "10^9999",
        "9⁹⁹⁹⁹⁹⁹",
        "__import__('os')",
        "m/",
        "//",
        "0",
        "-mg",
        "[",
        "x" * 500,
    ],
)
def test_strings_that_are_no_units_are_refused_and_never_computed(unit: str) -> None:
    with pytest.raises(UnitError, match="not a unit"):
        parse(unit)


def test_the_same_unit_changes_nothing() -> None:
    values = np.array([1.0, np.nan])
    same = conversion("mmHg", "mmHg")
    assert same == Conversion()
    assert same.is_identity
    assert same(values) is values

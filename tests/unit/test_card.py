"""Cards: what is accepted, and that every mistake is told with its place, all of a file at once."""

from pathlib import Path

import pytest

from draf_dist.config.spec import dump_yaml
from draf_dist.errors import SpecError
from draf_dist.schema.modality import ImageSpec, SeriesSpec, TableSpec
from draf_dist.sources.card import Card, load_card

CARD = """
name: ward
licence: {name: none}
sites: {folders: [north, south]}
tables:
  stays: {path: "{site}/stays.csv", study: stay, subject: patient, static: true}
  vitals: {path: "{site}/vitals.csv", study: stay, time: at, code: item, value: value, unit: unit}
  images: {path: "{site}/images.csv", study: stay, time: at}
studies: {table: stays, anchor: {column: admitted, offset_h: 24}}
label: death
labels:
  death: {column: outcome, classes: [survived, died]}
modalities:
  - {kind: image, name: cxr, table: images, file: file, path: "{site}/{file}", window_h: [-24, 0], height: 32, width: 32}
  - kind: series
    name: vitals
    table: vitals
    window_h: [-24, 0]
    variables:
      - {name: heart_rate, code: {north: 220045, south: [HR, PULSE]}, canonical: bpm, range: [20, 300]}
      - {name: lactate, unit: mmol/L, canonical: mmol/L}
  - kind: table
    name: history
    table: stays
    variables: [{name: age, unit: year, range: [0, 120]}]
    multi_hot: [{column: icd, separator: ";", prefix: dx_, codes: {diabetes: ["E10*", "E11*"], copd: {north: J44, south: null}}}]
"""


@pytest.fixture
def card_path(tmp_path: Path) -> Path:
    path = tmp_path / "card.yaml"
    path.write_text(CARD)
    return path


def problems(path: Path, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_card(path, overrides)
    return str(caught.value)


def test_the_card_alone_gives_the_schema_of_the_release(card_path: Path) -> None:
    schema = load_card(card_path).data_schema()
    cxr, vitals, history = schema.modalities
    assert schema.names == ("cxr", "vitals", "history")
    assert schema.sites == ("north", "south")
    assert schema.label.classes == ("survived", "died")
    assert cxr == ImageSpec(name="cxr", height=32, width=32)
    assert isinstance(vitals, SeriesSpec)
    assert (vitals.num_steps, vitals.step_h) == (24, 1.0)
    assert (vitals.variables[0].unit, vitals.variables[0].low, vitals.variables[0].high) == ("bpm", 20, 300)
    assert isinstance(history, TableSpec)
    assert [(v.name, v.type) for v in history.variables] == [("age", "numeric"), ("dx_diabetes", "binary"), ("dx_copd", "binary")]


def test_numbers_are_codes_too(card_path: Path) -> None:
    vitals = load_card(card_path).modalities[1]
    assert vitals.kind == "series"
    assert vitals.variables[0].codes_at("north") == ("220045",)
    assert vitals.variables[0].codes_at("south") == ("HR", "PULSE")


def test_a_written_card_reads_back_equal_and_has_the_same_fingerprint(card_path: Path, tmp_path: Path) -> None:
    card = load_card(card_path)
    dump_yaml(card, tmp_path / "again.yaml")
    again = load_card(tmp_path / "again.yaml")
    assert again == card
    assert again.sha256 == card.sha256
    assert load_card(card_path, ["studies.anchor.offset_h=12"]).sha256 != card.sha256


def test_the_card_of_the_reference_is_a_valid_card(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "cards.md").read_text()
    path = tmp_path / "card.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0])
    assert load_card(path).data_schema().names == ("cxr", "vitals", "labs", "history")


def test_editors_get_a_json_schema() -> None:
    schema = Card.model_json_schema()
    assert {"tables", "studies", "modalities", "labels"} <= set(schema["properties"])


def test_a_window_that_ends_after_the_anchor_is_refused(card_path: Path) -> None:
    path = card_path
    path.write_text(CARD.replace("window_h: [-24, 0], height", "window_h: [-24, 0.5], height"))
    assert "less than or equal to 0" in problems(path)


def test_an_unknown_key_names_the_nearest(card_path: Path) -> None:
    assert "Did you mean 'offset_h'?" in problems(card_path, "studies.anchor.offset=3")


def test_units_of_the_card_are_checked_all_together(card_path: Path) -> None:
    text = (
        CARD.replace("unit: mmol/L, canonical", "unit: U/L, canonical")
        .replace("unit: year", "unit: yaer")
        .replace("canonical: bpm", "canonical: bmp")
    )
    card_path.write_text(text)
    found = problems(card_path).splitlines()
    assert len(found) == 3
    assert found[0].startswith(f"{card_path}: variable heart_rate: expected a known canonical unit, found 'bmp'.")
    assert found[1].startswith(f"{card_path}: variable lactate: expected a unit convertible to mmol/L, found 'U/L'.")
    assert found[2].startswith(f"{card_path}: variable age: expected a known canonical unit, found 'yaer'.")


def test_a_unit_that_needs_the_molar_mass_says_so(card_path: Path) -> None:
    card_path.write_text(CARD.replace("unit: mmol/L, canonical", "unit: mg/dL, canonical"))
    assert "Give molar_mass_g_mol." in problems(card_path)
    card_path.write_text(CARD.replace("unit: mmol/L, canonical", "unit: mEq/L, canonical"))
    assert "Give valence." in problems(card_path)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("label: death", "label: deth", "label: expected one of the labels, found 'deth'. Did you mean 'death'?"),
        (
            "table: stays, anchor",
            "table: stay, anchor",
            "studies.table: expected one of the tables, found 'stay'. Did you mean 'stays'?",
        ),
        ("licence: {name: none}", "licence: {name: none}\nsplit: {held_out_sites: [suoth]}", "Did you mean 'south'?"),
        ("licence: {name: none}", "licence: {name: none}\nsplit: {held_out_sites: [north, south]}", "a site left to train on"),
        ('"{site}/vitals.csv"', '"../vitals.csv"', "tables: vitals: expected a path inside the raw folder"),
        ('"{site}/vitals.csv"', "/data/vitals.csv", "tables: vitals: expected a path inside the raw folder"),
        ('"{site}/vitals.csv"', '"{sit}/vitals.csv"', "a path with {site} only"),
        ('"{site}/stays.csv"', "stays.csv", "tables: stays: expected a path with {site}"),
        ('path: "{site}/{file}"', 'path: "{site}/a.png"', "a path with {file}"),
        ("study: stay, time: at, code", "time: at, code", "a column that joins it to a study"),
        ("study: stay, time: at}", "study: stay}", "modality cxr: table images: expected a time for every row"),
        (", static: true", "", "modality history: table stays: expected a time for every row"),
        ("window_h: [-24, 0], height", "height", "modality cxr: table images: expected window_h"),
        ("window_h: [-24, 0], height", "window_h: [0, -24], height", "a start before the end"),
        ("    window_h: [-24, 0]\n", "    window_h: [-24, 0]\n    step_h: 7\n", "a window of whole steps"),
        ("name: vitals\n", "name: cxr\n", "modalities: expected every name once, found 'cxr' 2 times"),
        ("name: lactate", "name: heart_rate", "modality vitals: variables: expected every name once"),
        (", south: [HR, PULSE]", "", "variable heart_rate: expected a code for every site, found none for south"),
        ("J44, south: null", "J44", "variable dx_copd: expected a code for every site, found none for south"),
        ("canonical: bpm", "unit: bpm", "variable heart_rate: expected `canonical`"),
        ("range: [20, 300]", "range: [300, 20]", "is empty"),
        (
            "classes: [survived, died]",
            "classes: [survived, died], values: {Y: alive}",
            "labels: death: values: expected one of the classes",
        ),
        ("value: value, unit", "unit", "needs both `code` and `value`"),
        ("offset_h: 24", "offset_h: 24, number_unit: hour, format: '%Y'", "either number_unit or format"),
        (", anchor: {column: admitted, offset_h: 24}", "", "no times, for the card has no anchor"),
        (
            "sites: {folders: [north, south]}",
            "sites: {folders: {north: ../x, south: s}}",
            "sites.folders: north: expected a path inside",
        ),
        ("kind: image, name: cxr", "kind: image, name: json", "expected another name"),
        ("name: ward", "name: ward\nunit_aliases: {MGDL: mgdl}", "unit_aliases: MGDL: expected a known unit, found 'mgdl'"),
    ],
)
def test_every_mistake_is_told_with_its_place(card_path: Path, old: str, new: str, told: str) -> None:
    assert old in CARD
    card_path.write_text(CARD.replace(old, new))
    found = problems(card_path)
    assert told in found
    assert all(line.startswith(str(card_path)) for line in found.splitlines())


def test_a_column_is_chosen_by_the_table_or_by_the_label_not_by_both(card_path: Path) -> None:
    text = CARD.replace("static: true}", "static: true, where: {outcome: [survived, died]}}")
    card_path.write_text(text.replace("classes: [survived, died]}", "classes: [survived, died], where: {outcome: died}}"))
    found = problems(card_path)
    assert found.startswith(f"{card_path}: labels: death: where: expected columns")
    assert "found 'outcome' in both" in found


def test_a_site_column_needs_no_folders(card_path: Path) -> None:
    text = CARD.replace("{site}/", "").replace(
        "sites: {folders: [north, south]}", "sites: {column: ward, groups: {north: N, south: [S, SS]}, other: rest}"
    )
    card_path.write_text(text.replace("J44, south: null}", "J44, south: null, rest: J44}").replace("PULSE]}", "PULSE], rest: HR}"))
    assert load_card(card_path).data_schema().sites == ("north", "south", "rest")
    assert "a regular expression with one group" in problems(card_path, "sites.pattern='[a'")

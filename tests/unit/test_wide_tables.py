"""Many columns of a wide table at once: by pattern or list, one rule for all, the same in the release as column by column."""

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.cli.describe_release import print_nothing_observed, print_source_counts
from draf_dist.config.spec import apply_overrides, parse_yaml, validate_spec
from draf_dist.continual.fit import joined_schema
from draf_dist.data.prepare import prepare
from draf_dist.errors import DataError, SpecError
from draf_dist.schema.label import LabelSpec
from draf_dist.schema.modality import DataSchema, TableSpec, VariableSpec
from draf_dist.schema.study import Study
from draf_dist.sources.base import SourceCounts, VariableCounts
from draf_dist.sources.card import Card
from draf_dist.sources.delivery import card_of_sites, seal
from draf_dist.sources.hospital_export import HospitalExport

GENES = ["TP53", "HLA-A", "BRCA1", "KRAS"]
CARD = """
name: tumours
licence: {name: none}
sites: {folders: [lung, bladder]}
tables:
  cases:
    path: "{site}.csv"
    study: case
    subject: case
    static: true
  genes:
    path: "{site}_genes.csv"
    study: case
    time: taken
studies: {table: cases, anchor: {column: diagnosed, number_unit: day}}
label: death
labels:
  death: {column: dead, classes: [survived, died], values: {0: survived, 1: died}}
  relapse: {column: relapse_x, classes: [no, yes], values: {0: no, 1: yes}}
modalities:
  - kind: table
    name: clinic
    table: cases
    variables: [{name: age, unit: year}]
  - kind: table
    name: rna
    table: genes
    window_h: [-240, 0]
    columns: [COLUMNS]
"""
PATTERN = '{pattern: "*_rnaseq"}'


def write(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def values(site: str, case: int, gene: int, sample: int) -> float:
    """The planted truth of a cell."""
    return (1000 if site == "bladder" else 0) + 100 * case + 10 * gene + sample + 0.25


def write_export(raw: Path, *, bladder: list[str] = GENES) -> Path:
    """Three cases a site; case 1 has two samples (the later stands first in the file), case 2 none before the anchor."""
    raw.mkdir(parents=True, exist_ok=True)
    for site, genes in (("lung", GENES), ("bladder", bladder)):
        cases = [[f"{site}{i}", 100, 50 + i, i % 2, 0, 7.5] for i in range(3)]
        write(raw / f"{site}.csv", ["case", "diagnosed", "age", "dead", "relapse_x", "size_x"], cases)
        taken = [(0, 99, 0), (1, 98, 1), (1, 95, 0), (2, 101, 0)]
        rows = [[f"{site}{i}", day, *(values(site, i, GENES.index(g), sample) for g in genes), "b"] for i, day, sample in taken]
        write(raw / f"{site}_genes.csv", ["case", "taken", *(f"{gene}_rnaseq" for gene in genes), "batch_rnaseqs"], rows)
    return raw


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_export(tmp_path / "raw")


def one_card(text: str, *overrides: str) -> Card:
    tree = parse_yaml(text, where="card")
    apply_overrides(tree, overrides)
    return validate_spec(tree, Card, where="card")


def card(columns: str = PATTERN, *overrides: str) -> Card:
    return one_card(CARD.replace("COLUMNS", columns), *overrides)


def read(raw: Path, columns: str = PATTERN, *overrides: str) -> tuple[HospitalExport, list[Study]]:
    export = HospitalExport(card(columns, *overrides), raw)
    return export, [item for item in export.studies() if isinstance(item, Study)]


def names(export: HospitalExport, modality: str = "rna") -> list[str]:
    spec = next(spec for spec in export.schema.modalities if spec.name == modality)
    assert isinstance(spec, TableSpec)
    return [variable.name for variable in spec.variables]


def refused(raw: Path, columns: str = PATTERN, *overrides: str) -> str:
    with pytest.raises(DataError) as caught:
        read(raw, columns, *overrides)
    return str(caught.value)


def test_a_pattern_takes_every_column_it_matches_in_the_order_of_the_file(raw: Path) -> None:
    export, studies = read(raw)
    assert names(export) == [f"{gene}_rnaseq" for gene in GENES]
    first = next(study for study in studies if study.subject == "lung0")
    np.testing.assert_array_equal(first.inputs["rna"], [[values("lung", 0, gene, 0) for gene in range(4)]])
    assert first.inputs["rna"].dtype == np.float32
    # Taken after the anchor: nothing of it is there.
    assert all("rna" not in study.inputs for study in studies if study.subject.endswith("2"))


@pytest.mark.parametrize("how", ["last", "mean", "min", "max"])
def test_columns_taken_at_once_are_those_taken_one_by_one(raw: Path, how: str) -> None:
    # With holes, values out of range, numbers that mean "not known", and another unit.
    path = raw / "lung_genes.csv"
    path.write_text(path.read_text().replace(",110.25,", ",NA,").replace(",101.25,", ",,").replace(",0.25,", ",-9,"))
    rule = f"unit: mg, canonical: g, range: [0.02, 1.14], missing: [-9], aggregate: {how}"
    single = ", ".join(f'{{name: g{i}, code: "{gene}_rnaseq", {rule}}}' for i, gene in enumerate(GENES))
    at_once, studies = read(raw, f'{{pattern: "*_rnaseq", {rule}}}')
    one_by_one = HospitalExport(one_card(CARD.replace("columns: [COLUMNS]", f"variables: [{single}]")), raw)
    expected = [item for item in one_by_one.studies() if isinstance(item, Study)]
    assert [study.subject for study in studies] == [study.subject for study in expected]
    for study, other in zip(studies, expected, strict=True):
        assert ("rna" in study.inputs) == ("rna" in other.inputs)
        if "rna" in study.inputs:
            np.testing.assert_array_equal(study.inputs["rna"], other.inputs["rna"])
    for i, gene in enumerate(GENES):
        assert at_once.counts.variables[f"rna.{gene}_rnaseq"] == one_by_one.counts.variables[f"rna.g{i}"]
    spec = at_once.schema.modalities[1]
    assert isinstance(spec, TableSpec)
    assert {(one.unit, one.low, one.high, one.type) for one in spec.variables} == {("g", 0.02, 1.14, "numeric")}


def test_a_list_names_columns_in_its_own_order(raw: Path) -> None:
    write(raw / "signatures.csv", ["Suppressors", "Oncogenes"], [["TP53", "KRAS"], ["BRCA1", ""], ["TP53", ""]])
    listed = "listed: {path: signatures.csv, column: Suppressors, suffix: [_rnaseq, _cnv]}, lacking: leave_out"
    export = read(raw, f"{{{listed}}}")[0]
    assert names(export) == ["TP53_rnaseq", "BRCA1_rnaseq"]
    assert export.counts.columns_left_out == {"rna: columns listed in signatures.csv (Suppressors)": 2}
    (raw / "genes.txt").write_text("KRAS_rnaseq\n\nTP53_rnaseq\r\n")
    export, studies = read(raw, "{listed: {path: genes.txt}}")
    assert names(export) == ["KRAS_rnaseq", "TP53_rnaseq"]
    np.testing.assert_array_equal(studies[0].inputs["rna"], [[values("lung", 0, 3, 0), values("lung", 0, 0, 0)]])


def test_excluded_columns_and_those_of_another_entry_are_apart(raw: Path) -> None:
    entries = '{pattern: "*_rnaseq", exclude: ["HLA-*", "K*"]}, {pattern: ["HLA*", "nothing"]}'
    assert names(read(raw, entries)[0]) == ["TP53_rnaseq", "BRCA1_rnaseq", "HLA-A_rnaseq"]


def test_columns_stand_between_the_variables_and_the_multi_hot_ones(raw: Path) -> None:
    entry = (
        PATTERN
        + "]\n    variables: [{name: first, code: TP53_rnaseq}]\n    multi_hot: [{column: batch_rnaseqs, codes: {batch_b: b}}"
    )
    export, studies = read(raw, entry)
    assert names(export) == ["first", *(f"{gene}_rnaseq" for gene in GENES), "batch_b"]
    row = studies[0].inputs["rna"][0]
    assert (row[0], row[1], row[5]) == (0.25, 0.25, 1)


@pytest.mark.parametrize(("lacking", "expected"), [
    ("not_observed", ["TP53", "HLA-A", "BRCA1", "KRAS"]),
    ("leave_out", ["TP53", "KRAS"]),
])  # fmt: skip
def test_what_one_site_lacks_is_not_observed_there_or_left_out_everywhere(
    tmp_path: Path, lacking: str, expected: list[str]
) -> None:
    raw = write_export(tmp_path / "raw", bladder=["KRAS", "TP53"])
    export, studies = read(raw, f'{{pattern: "*_rnaseq", lacking: {lacking}}}')
    assert names(export) == [f"{gene}_rnaseq" for gene in expected]
    bladder = next(study for study in studies if study.subject == "bladder0").inputs["rna"][0]
    planted = [values("bladder", 0, GENES.index(gene), 0) if gene in ("KRAS", "TP53") else np.nan for gene in expected]
    np.testing.assert_array_equal(bladder, np.array(planted, np.float32))
    left_out = {"not_observed": {}, "leave_out": {"rna: columns *_rnaseq": 2}}
    assert export.counts.columns_left_out == left_out[lacking]


def test_by_default_what_a_site_lacks_is_an_error(tmp_path: Path) -> None:
    raw = write_export(tmp_path / "raw", bladder=["KRAS", "TP53"])
    assert refused(raw) == (
        "modality rna: columns *_rnaseq: expected every column at site bladder, found 2 of 4 missing (HLA-A_rnaseq, BRCA1_rnaseq). "
        "Say what becomes of them: `lacking: not_observed` or `lacking: leave_out`; or leave them out with `exclude`."
    )
    # A listed column that nobody has is one that is lacking too.
    (raw / "genes.txt").write_text("TP53_rnaseq\nMYC_rnaseq\n")
    message = refused(raw, "{listed: {path: genes.txt}}")
    assert message.count("1 of 2 missing (MYC_rnaseq)") == 2
    export = read(raw, "{listed: {path: genes.txt}, lacking: not_observed}")[0]
    assert (names(export), export.counts.columns_left_out) == (["TP53_rnaseq"], {"rna: columns listed in genes.txt": 1})


def test_a_site_without_any_is_named_in_the_card_or_refused(tmp_path: Path) -> None:
    raw = write_export(tmp_path / "raw", bladder=[])
    message = refused(raw, '{pattern: "*_rnaseq", lacking: leave_out}')
    assert "columns that match at site bladder, found none" in message
    assert "absent_at" in message
    studies = read(raw, PATTERN + "]\n    absent_at: [bladder")[1]
    assert {study.subject for study in studies if "rna" in study.inputs} == {"lung0", "lung1"}


def test_a_cell_that_is_no_number_is_an_error_with_its_column_and_row(raw: Path) -> None:
    path = raw / "lung_genes.csv"
    text = path.read_text()
    path.write_text(text.replace(",0.25,", ",<0.5,", 1))
    assert refused(raw).startswith(
        "lung_genes.csv: column 'TP53_rnaseq': expected numbers, found something else in 1 cells (the first in row 2). "
    )
    path.write_text(text.replace("0.25", "haemolysed"))
    message = refused(raw)
    assert all(f"{gene}_rnaseq" in message for gene in GENES)
    assert "haemolysed" not in message
    # A word that the table declares as missing is no error.
    path.write_text(text.replace(",0.25,", ",<0.5,", 1))
    tables = "{path: '{site}_genes.csv', study: case, time: taken, missing: ['<0.5']}"
    studies = read(raw, PATTERN, f"tables.genes={tables}")[1]
    np.testing.assert_array_equal(studies[0].inputs["rna"], [[np.nan, 10.25, 20.25, 30.25]])


def test_a_value_out_of_range_is_not_observed_and_counted(raw: Path) -> None:
    export, studies = read(raw, '{pattern: "*_rnaseq", range: [0, 500]}')
    assert all("rna" not in study.inputs for study in studies if study.site == "bladder")
    # Three rows of the four lie before the anchor.
    assert export.counts.variables["rna.TP53_rnaseq"].out_of_range == 3
    assert export.counts.variables["rna.TP53_rnaseq"].empty_at == ["bladder"]


def test_what_is_predicted_or_joins_rows_is_no_input(raw: Path) -> None:
    text = CARD.replace("variables: [{name: age, unit: year}]", 'columns: [{pattern: ["*_x", dead, "ca*", diag*]}]')
    with pytest.raises(DataError) as caught:
        HospitalExport(one_card(text.replace("COLUMNS", PATTERN)), raw)
    found = str(caught.value)
    assert (
        "modality clinic: columns: expected inputs, found 'dead', the column of label death. Take it out with `exclude`." in found
    )
    assert "'relapse_x', the column of label relapse" in found
    assert "'case', a subject" in found
    assert "'diagnosed', the event's time" in found
    assert "size_x" not in found


def test_a_column_that_comes_twice_is_refused(raw: Path) -> None:
    twice = refused(raw, f'{PATTERN}, {{pattern: "K*"}}')
    assert "modality rna: columns: expected every name once, found 1 twice (KRAS_rnaseq)." in twice
    header = (raw / "lung_genes.csv").read_text().replace("HLA-A_rnaseq", "TP53_rnaseq", 1)
    (raw / "lung_genes.csv").write_text(header)
    export = HospitalExport(card('{pattern: "*_rnaseq", lacking: leave_out}'), raw)
    with pytest.raises(DataError, match="expected one column 'TP53_rnaseq', found several"):
        list(export.studies())


@pytest.mark.parametrize(("columns", "expected"), [
    ("{listed: {path: none.csv}}", "none.csv: expected a list of columns, found no such file"),
    ("{listed: {path: list.csv, column: Genes}}", "expected a column 'Genes', found the columns Gene. Did you mean 'Gene'?"),
    ('{pattern: "*_cnv"}', "modality rna: columns *_cnv: expected columns that match at site lung, found none."),
])  # fmt: skip
def test_what_is_not_there_is_told(raw: Path, columns: str, expected: str) -> None:
    (raw / "list.csv").write_text("Gene\nTP53\n")
    assert expected in refused(raw, columns)


@pytest.mark.parametrize(("columns", "expected"), [
    ('{pattern: "*", listed: {path: x.csv}}', "either `pattern` or `listed`"),
    ("{unit: mg}", "either `pattern` or `listed`"),
    ('{pattern: "*", range: [3, 1]}', "range [3.0, 1.0] is empty"),
    ('{pattern: "*", type: binary, range: [0, 1]}', "needs no range"),
])  # fmt: skip
def test_a_rule_that_contradicts_itself_is_refused(columns: str, expected: str) -> None:
    with pytest.raises(SpecError, match=expected.replace("[", r"\[").replace("]", r"\]").replace("|", r"\|")):
        card(columns)


@pytest.mark.parametrize(("columns", "expected"), [
    ('{pattern: "*", unit: furlongs_per}', "modality rna: columns *: expected a known canonical unit, found 'furlongs_per'"),
    ('{pattern: "*", unit: mg, canonical: mmol}', "columns *: expected a unit convertible to mmol, found 'mg'"),
    ('{pattern: "*", unit: {lung: mg}, canonical: g}', "columns *: expected a unit for every site, found none for bladder"),
    ("{listed: {path: ../x.csv}}", "columns listed in ../x.csv: expected a path inside the raw folder"),
])  # fmt: skip
def test_checks_of_a_variable_hold_for_columns(raw: Path, columns: str, expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(raw, columns)
    assert expected in str(caught.value)


def test_a_long_table_has_no_columns_to_match(raw: Path) -> None:
    tables = "{path: '{site}_genes.csv', study: case, time: taken, code: gene, value: value}"
    with pytest.raises(SpecError, match="expected a wide table, one column a variable, found a long one"):
        read(raw, PATTERN, f"tables.genes={tables}")


def test_a_renamed_column_is_matched_by_the_name_of_the_card(raw: Path) -> None:
    path = raw / "bladder_genes.csv"
    path.write_text(path.read_text().replace("TP53_rnaseq", "P53"))
    tables = "{path: '{site}_genes.csv', study: case, time: taken, rename: {bladder: {P53: TP53_rnaseq}}}"
    studies = read(raw, PATTERN, f"tables.genes={tables}")[1]
    bladder = next(study for study in studies if study.subject == "bladder0")
    assert bladder.inputs["rna"][0, 0] == values("bladder", 0, 0, 0)


def test_a_card_without_columns_is_stored_as_it_was_before_there_were_any() -> None:
    plain = one_card(CARD.replace("columns: [COLUMNS]", "variables: [{name: x}]"))
    assert "columns" not in plain.model_dump()["modalities"][1]
    assert "columns" in card().model_dump()["modalities"][1]


def test_the_release_records_the_columns_and_a_delivery_takes_those(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAF_SUBJECT_KEY", "k" * 32)
    raw = write_export(tmp_path / "raw", bladder=["KRAS", "TP53"])
    whole = card('{pattern: "*_rnaseq", lacking: not_observed}')
    release = prepare(HospitalExport(whole, raw), str(tmp_path / "release"), subject_key=b"k" * 32)
    spec = release.schema.modalities[1]
    assert isinstance(spec, TableSpec)
    assert [one.name for one in spec.variables] == [f"{gene}_rnaseq" for gene in GENES]
    later = write_export(tmp_path / "later", bladder=["TP53", "KRAS", "BRCA1"])
    for name in ("lung.csv", "lung_genes.csv"):
        (later / name).unlink()
    path = later / "bladder_genes.csv"
    path.write_text(path.read_text().replace("bladder", "newbladder").replace("batch_rnaseqs", "MYC_rnaseq").replace(",b", ",3"))
    path = later / "bladder.csv"
    path.write_text(path.read_text().replace("bladder", "newbladder"))
    alone = card_of_sites(whole, ["bladder"])
    export = HospitalExport(alone, later, release.schema)
    assert names(export) == [f"{gene}_rnaseq" for gene in GENES]
    assert export.counts.columns_left_out == {"rna: columns *_rnaseq": 1}
    first = next(item for item in export.studies() if isinstance(item, Study))
    planted = [values("bladder", 0, 0, 0), np.nan, values("bladder", 0, 2, 0), values("bladder", 0, 3, 0)]
    np.testing.assert_array_equal(first.inputs["rna"][0], np.array(planted, np.float32))
    # And by the command, which asks the release itself.
    (tmp_path / "card.yaml").write_text(CARD.replace("COLUMNS", '{pattern: "*_rnaseq", lacking: not_observed}'))
    seal(later, "d1", sites=["bladder"])
    done = CliRunner().invoke(app, ["ingest", str(tmp_path / "card.yaml"), str(later), "--release", str(tmp_path / "release")])
    assert done.exit_code == 0, done.output
    with pytest.raises(DataError, match=r"Export them too: the release has them."):
        HospitalExport(card_of_sites(card(), ["bladder"]), later, release.schema)


def test_thousands_of_columns_do_not_flood_messages(capsys: pytest.CaptureFixture[str]) -> None:
    tallies = {f"rna.g{i:03}": VariableCounts(observed=1, out_of_range=2, empty_at=["lung"]) for i in range(100)}
    counts = SourceCounts(variables=tallies, columns_left_out={"rna: columns *_rnaseq": 7})
    print_source_counts(counts)
    print_nothing_observed(counts)
    shown = capsys.readouterr().out
    assert "rna.g039" in shown
    assert "rna.g040" not in shown
    assert re.search(r"60 more, together\W+60\W+0\W+120\W+0", shown)
    assert "and 60 variables more" in shown
    assert "rna: columns *_rnaseq: 7 left out, for not every site has them, or the release has not." in shown
    few, many = (
        DataSchema(
            modalities=(TableSpec(name="rna", variables=tuple(VariableSpec(name=f"g{i:03}") for i in range(number))),),
            label=LabelSpec(name="death", classes=("no", "yes")),
            sites=("lung",),
        )
        for number in (1, 1000)
    )
    with pytest.raises(SpecError) as caught:
        joined_schema(few, many, "card")
    assert "with g001, g002" in str(caught.value)
    assert "g020, ... (999 in all)" in str(caught.value)

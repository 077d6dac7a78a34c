"""Labels beside classes, from the cells of an export to the target of a batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from two_hospitals import read

from draf_dist.config.spec import parse_yaml, validate_spec
from draf_dist.data.loader import evaluation_batches
from draf_dist.data.prepare import prepare
from draf_dist.data.release import open_release
from draf_dist.data.targets import target_rows
from draf_dist.errors import SpecError
from draf_dist.schema.batch import MultiLabelTarget, SurvivalTarget, hide
from draf_dist.schema.label import LabelSpec, MultiLabelSpec, SegmentationSpec, SurvivalSpec
from draf_dist.schema.label_text import label_text, num_strata, read_label, stratum
from draf_dist.schema.modality import DataSchema, TableSpec, VariableSpec
from draf_dist.schema.study import StudyLabel, TimeToEvent
from draf_dist.sources.card import Card
from draf_dist.sources.card_checks import check_card
from draf_dist.sources.hospital_export import HospitalExport

CLASSES = LabelSpec(name="death", classes=("no", "yes"))
LABELS = MultiLabelSpec(name="findings", labels=("edema", "effusion", "fracture"))
TIME = SurvivalSpec(name="death", unit="months", edges=(6, 12.5, 24))
WRITTEN: list[tuple[Any, StudyLabel, str, int]] = [
    (CLASSES, 1, "yes", 1),
    (LABELS, (False, True, None), "01-", 2),
    (LABELS, (None, False, False), "-00", 0),
    (TIME, TimeToEvent(12.5, True), "12.5", 1),
    (TIME, TimeToEvent(0.1, False), "0.1+", 0),
]


@pytest.mark.parametrize(("task", "label", "text", "part"), WRITTEN)
def test_a_label_is_a_short_text_that_reads_back(task: Any, label: StudyLabel, text: str, part: int) -> None:
    assert label_text(task, label) == text
    assert read_label(task, text) == label
    assert stratum(label) == part < num_strata(task)


@pytest.mark.parametrize(
    ("task", "label"),
    [
        (CLASSES, 2),
        (CLASSES, (True, False)),
        (LABELS, (True, False)),
        (LABELS, (None, None, None)),
        (LABELS, 1),
        (TIME, TimeToEvent(-1.0, True)),
        (TIME, TimeToEvent(float("nan"), True)),
        (TIME, 3),
        (SegmentationSpec(name="organs", modality="ct", structures=("none", "liver")), 1),
    ],
)
def test_a_label_that_does_not_fit_its_task_is_refused(task: Any, label: StudyLabel) -> None:
    with pytest.raises(ValueError, match="."):
        label_text(task, label)


@pytest.mark.parametrize(
    ("task", "text"),
    [(CLASSES, "maybe"), (LABELS, "01"), (LABELS, "012"), (LABELS, "---"), (TIME, "soon"), (TIME, "-3"), (TIME, "01.50")],
)
def test_a_text_that_nobody_wrote_is_refused(task: Any, text: str) -> None:
    with pytest.raises(ValueError, match="."):
        read_label(task, text)


def test_an_old_schema_reads_as_a_class_label_and_is_written_as_it_was() -> None:
    table = TableSpec(name="labs", variables=(VariableSpec(name="a"),))
    schema = DataSchema(modalities=(table,), label=CLASSES, sites=("x",))
    assert "kind" not in schema.model_dump(mode="json")["label"]
    for task in (CLASSES, LABELS, TIME):
        stored = schema.model_copy(update={"label": task}).model_dump_json()
        assert DataSchema.model_validate_json(stored).label == task
    with pytest.raises(SpecError, match="label findings: expected classes, found multilabel"):
        schema.model_copy(update={"label": LABELS}).classes  # noqa: B018


def test_a_target_knows_what_was_observed_and_forgets_what_is_hidden() -> None:
    rows = target_rows(LABELS, 3)
    rows.set(0, (False, True, None))
    rows.set(1, (True, True, True))
    rows.set(2, (True, False, True))
    rows.clear(2)
    target = rows.target()
    assert isinstance(target, MultiLabelTarget)
    assert target.label.tolist() == [[False, True, False], [True, True, True], [False, False, False]]
    assert target.observed.tolist() == [[True, True, False], [True, True, True], [False, False, False]]
    hidden = hide(target, torch.tensor([False, True, True]))
    assert isinstance(hidden, MultiLabelTarget)
    assert not hidden.observed[0].any()
    assert hidden.observed[1].all()


def test_a_time_lies_in_the_interval_that_begins_at_its_edge() -> None:
    times = [0.0, 5.999, 6.0, 12.5, 24.0, 1e6]
    rows = target_rows(TIME, len(times))
    for row, time in enumerate(times):
        rows.set(row, TimeToEvent(time, row % 2 == 0))
    target = rows.target()
    assert isinstance(target, SurvivalTarget)
    assert target.interval.tolist() == [0, 0, 1, 2, 3, 3]
    assert target.event.tolist() == [True, False] * 3
    assert target.time.tolist() == pytest.approx(times)


EXPORT = """
name: clinic
licence: {name: none}
split: {public_subject_key: true}
sites: {column: hospital, groups: {north: N, south: S}}
tables:
  visits: {path: visits.csv, subject: person, study: visit}
studies: {table: visits}
label: LABEL
labels:
  findings: {kind: multilabel, labels: {edema: e, effusion: f}, yes: ["1", y], no: ["0"], unknown: ["9"]}
  death: {kind: survival, time: months, event: dead, happened: ["1"], censored: ["0"], unit: months, edges: [6, 12]}
modalities:
  - {kind: table, name: clinic, table: visits, variables: [{name: age, unit: year, range: [0, 120]}]}
"""
HEADER = "person,visit,hospital,age,e,f,months,dead\n"
ROWS = """p1,v1,N,50,1,0,3.5,1
p2,v2,N,60,9,y,14,0
p3,v3,S,70,,9,7,1
p4,v4,S,80,2,1,-2,1
p5,v5,S,40,0,0,6,
p6,v6,S,45,0,,12,0
"""


def card_of(label: str) -> str:
    return EXPORT.replace("LABEL", label)


def test_labels_of_an_export_and_why_some_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "visits.csv").write_text(HEADER + ROWS)
    studies, rejections = read(tmp_path, card=card_of("findings"))
    assert [s.label for s in studies] == [(True, False), (None, True), (False, False), (False, None)]
    assert [(r.where, r.reason) for r in rejections] == [("visits.csv row 4", "no label"), ("visits.csv row 5", "unknown label")]
    studies, rejections = read(tmp_path, card=card_of("death"))
    assert [s.label for s in studies] == [
        TimeToEvent(3.5, True),
        TimeToEvent(14.0, False),
        TimeToEvent(7.0, True),
        TimeToEvent(12.0, False),
    ]
    assert [(r.where, r.reason) for r in rejections] == [("visits.csv row 5", "unknown label"), ("visits.csv row 6", "no label")]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('no: ["0"]', 'no: ["1"]', "a value stands twice"),
        ("edges: [6, 12]", "edges: [12, 6]", "edges must rise"),
        ('censored: ["0"]', 'censored: ["1"]', "both happened and censored"),
        ("kind: survival", "kind: survivall", "survival"),
        ("[{name: age", "[{name: months, unit: month}, {name: age", "Take it out: it is what is predicted"),
    ],
)
def test_a_card_that_contradicts_itself_is_refused(old: str, new: str, said: str) -> None:
    assert old in EXPORT
    with pytest.raises(SpecError, match=said):
        check_card(validate_spec(parse_yaml(card_of("death").replace(old, new), where="card"), Card, where="card"), where="card")


@pytest.mark.parametrize("label", ["findings", "death"])
def test_what_a_release_was_made_from_comes_out_of_its_loader(tmp_path: Path, label: str) -> None:
    generator = np.random.default_rng(0)
    rows = [
        f"p{i},v{i},{'NS'[i % 2]},{30 + i % 50},{generator.integers(2)},{generator.choice(['0', 'y', '9'])},{i + 0.1},{i % 3 % 2}"
        for i in range(120)
    ]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "visits.csv").write_text(HEADER + "\n".join(rows) + "\n")
    source = HospitalExport(validate_spec(parse_yaml(card_of(label), where="card"), Card, where="card"), tmp_path / "raw")
    prepare(source, str(tmp_path / "release"), subject_key=b"k" * 32)
    release = open_release(str(tmp_path / "release"))
    told = {row["uid"]: read_label(release.schema.label, row["label"]) for row in release.subjects().to_pylist()}
    assert sorted(map(repr, told.values())) == sorted(repr(study.label) for study in source.studies())
    seen = 0
    for batch in evaluation_batches(release, "train", 16):
        rows_of = target_rows(release.schema.label, batch.num_rows)
        for row, uid in enumerate(batch.uid.tolist()):
            if uid >= 0:
                rows_of.set(row, told[uid])
                seen += 1
        expected = rows_of.target()
        assert type(expected) is type(batch.target)
        for name in vars(expected):
            assert torch.equal(getattr(expected, name), getattr(batch.target, name)), name
    assert seen == release.manifest.receipts["train"].count > 60

"""Public exports of real hospitals, described by a card alone. The data are no part of the repository: see DRAF_TEST_DATA."""

from collections import Counter

import public_data

from draf_dist.config.spec import parse_yaml, validate_spec
from draf_dist.schema.study import Rejection, Study
from draf_dist.sources.card import Card
from draf_dist.sources.hospital_export import HospitalExport

HEART = """
name: uci_heart
licence: {name: CC BY 4.0}
sites: {folders: {cleveland: cleveland, hungary: hungarian, switzerland: switzerland, long_beach: va}}
tables:
  visits:
    path: "processed.{site}.data"
    header: [age, sex, cp, trestbps, chol, fbs, restecg, thalach, exang, oldpeak, slope, ca, thal, num]
studies: {table: visits}
label: disease
labels:
  disease: {column: num, classes: [absent, present], values: {0: absent, 1: present, 2: present, 3: present, 4: present}}
modalities:
  - kind: table
    name: clinic
    table: visits
    variables:
      - {name: age, unit: year, range: [0, 120]}
      - {name: male, code: sex, type: binary}
      - {name: chol, unit: mg/dL, missing: [0]}
  - kind: table
    name: fluoroscopy
    table: visits
    variables: [{name: ca, range: [0, 3]}]
"""

CHEST = """
name: covid_cxr
licence: {name: CC BY-NC-SA 4.0}
sites: {column: location, pattern: "([^,]+)$", groups: {italy: Italy, spain: Spain}, other: elsewhere}
tables:
  metadata: {path: metadata.csv, subject: patientid, static: true, where: {modality: X-ray, survival: [Y, N]}}
studies: {table: metadata, anchor: {column: offset, number_unit: day}, repeat: last}
label: survival
labels:
  survival: {column: survival, classes: [survived, died], values: {Y: survived, N: died}}
modalities:
  - {kind: image, name: cxr, table: metadata, file: filename, path: "images/{file}", height: 128, width: 128}
  - kind: table
    name: clinic
    table: metadata
    variables:
      - {name: age, unit: year, range: [0, 120]}
      - {name: female, code: sex, type: binary, values: {F: 1, M: 0}}
      - {name: lymphocytes, code: lymphocyte_count, unit: 10^3/uL, canonical: 10^9/L, range: [0, 100]}
"""


def read(card: str, folder: str) -> tuple[HospitalExport, list[Study], list[Rejection]]:
    export = HospitalExport(validate_spec(parse_yaml(card, where="card"), Card, where="card"), public_data.folder(folder))
    items = list(export.studies())
    return export, [i for i in items if isinstance(i, Study)], [i for i in items if isinstance(i, Rejection)]


def test_heart_data_of_four_hospitals_have_the_published_counts() -> None:
    _, studies, rejections = read(HEART, "uci_heart")
    by_site = Counter(study.site for study in studies)
    diseased = Counter(study.site for study in studies if study.label == 1)
    assert rejections == []
    assert by_site == {"cleveland": 303, "hungary": 294, "switzerland": 123, "long_beach": 200}
    assert {site: round(diseased[site] / by_site[site], 2) for site in by_site} == {
        "cleveland": 0.46,
        "hungary": 0.36,
        "switzerland": 0.93,
        "long_beach": 0.74,
    }
    # Cholesterol 0 means missing: all of Switzerland. Vessels were counted in Cleveland and hardly anywhere else.
    lacking = {site: sum("fluoroscopy" not in study.inputs for study in studies if study.site == site) for site in by_site}
    assert lacking == {"cleveland": 4, "hungary": 291, "switzerland": 118, "long_beach": 198}
    assert all(study.inputs["clinic"][0, 2] != study.inputs["clinic"][0, 2] for study in studies if study.site == "switzerland")


def test_chest_radiographs_of_many_hospitals_join_by_a_card_alone() -> None:
    export, studies, rejections = read(CHEST, "covid_chestxray")
    assert {study.site for study in studies} == {"italy", "spain", "elsewhere"}
    assert len({study.subject for study in studies}) == len(studies) >= 25
    assert all(study.inputs["cxr"].shape[0] == 1 and max(study.inputs["cxr"].shape) <= 256 for study in studies)
    # Images without a day since the onset can't be ordered: quarantined, not guessed.
    assert {rejection.reason for rejection in rejections} == {"bad time"}
    assert export.counts.variables["clinic.age"].out_of_range == 0

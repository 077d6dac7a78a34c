"""Hospitals whose tables a gate's models are trained on in seconds: laboratory and history, one hospital with a look of its own.

The look: its laboratory measures neither potassium nor glucose, which carry nothing of the label (see sources/synth/evidence.py).
"""

import csv
import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from ruamel.yaml import YAML

from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release
from draf_dist.data.splits import StudyRow
from draf_dist.schema.release import Split
from draf_dist.sources.card import load_card
from draf_dist.sources.hospital_export import HospitalExport
from draf_dist.sources.synth.admissions import columns, studies_rows
from draf_dist.sources.synth.card import card_text
from draf_dist.sources.synth.labs import labs_rows
from draf_dist.sources.synth.population import draw_population
from draf_dist.sources.synth.site_cohort import site_cohort
from draf_dist.training.job import FinetuneJob

KEY = b"a key of the tests"
NUM_SITES = 4
ODD = "lakeview"
NOT_MEASURED = ("potassium", "glucose")
ENCODERS = {"table": {"kind": "tabular", "hidden": 16}}


def write_export(folder: Path, num_subjects: int) -> None:
    """FOLDER/raw/<site>/{studies,labs}.csv and FOLDER/card.yaml."""
    population = draw_population(NUM_SITES, num_subjects, seed=1)
    for number in range(NUM_SITES):
        cohort = site_cohort(population, number)
        site = folder / "raw" / cohort.profile.name
        site.mkdir(parents=True)
        unknown = {cohort.profile.labs[name][0] for name in NOT_MEASURED} if cohort.profile.name == ODD else set()
        write_csv(site / "studies.csv", [columns(cohort), *studies_rows(cohort)])
        labs = (row for row in labs_rows(cohort) if row[2] not in unknown)
        write_csv(site / "labs.csv", [("study_id", "time", "code", "value", "unit"), *labs])
    card = YAML(typ="safe").load(card_text(NUM_SITES))
    card["split"]["held_out_sites"] = []
    card["modalities"] = [modality for modality in card["modalities"] if modality["name"] in ("labs", "history")]
    card["tables"] = {name: table for name, table in card["tables"].items() if name in ("labs", "studies")}
    YAML().dump(card, folder / "card.yaml")


def invert_labels(folder: Path, site: str) -> Path:
    """Another raw folder, the same but for the outcomes of one site."""
    raw = folder / "raw_inverted"
    shutil.copytree(folder / "raw", raw)
    with (raw / site / "studies.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    column = header.index("outcome")
    words = sorted({row[column] for row in rows} - {""})
    other = dict(zip(words, reversed(words), strict=True))
    write_csv(
        raw / site / "studies.csv", [header, *([*row[:column], other.get(row[column], ""), *row[column + 1 :]] for row in rows)]
    )
    return raw


def write_csv(path: Path, rows: Iterable[Iterable[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def half_held_out(
    studies: Iterable[StudyRow], *, held_out_sites: frozenset[str], assigned: Mapping[str, Split] | None = None
) -> dict[str, Split]:
    """40 % train, 10 % validate, 50 % are held out, by subject and by nothing else: the same whatever the labels say."""
    return {study.subject: _place(study.subject) for study in studies}


def fifteen_held_out(
    studies: Iterable[StudyRow], *, held_out_sites: frozenset[str], assigned: Mapping[str, Split] | None = None
) -> dict[str, Split]:
    """The same, but of the odd hospital fifteen subjects are held out; the other ones of its half are in no split that counts."""
    studies = list(studies)
    splits = half_held_out(studies, held_out_sites=held_out_sites)
    odd = sorted({study.subject for study in studies if study.site == ODD and splits[study.subject] == "test"})
    return {**splits, **dict.fromkeys(odd[15:], "ood")}


def release_of(folder: Path, raw: Path, url: Path, *, rule=half_held_out, key: bytes = KEY) -> Release:
    """A release at the URL."""
    return prepare(HospitalExport(load_card(folder / "card.yaml"), raw), str(url), subject_key=key, rule=rule)


def job_of(name: str, release: Release, **changes) -> FinetuneJob:
    """A job that takes seconds."""
    model = {"kind": "concat", "width": 16, "presence_bits": True, "encoders": ENCODERS}
    tree = {"name": name, "release": release.url, "model": model, "batch_size": 32, "epochs": 12}
    tree |= {"passes_train": 1, "passes_eval": 4, "optimizer": {"learning_rate": 5e-3}}
    return FinetuneJob.model_validate({**tree, **changes})


def _place(subject: str) -> Split:
    number = int(hashlib.sha256(subject.encode()).hexdigest()[:8], 16) % 100
    return "train" if number < 40 else "val" if number < 50 else "test"

"""The synthetic hospitals write what real ones would, the same bytes every time, and the source reads all of it."""

import csv
import hashlib
import json
import shutil
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from draf_dist.errors import DataError, SpecError
from draf_dist.schema.identity import study_uid
from draf_dist.schema.study import Rejection, Study
from draf_dist.sources.card import load_card
from draf_dist.sources.delivery import check_files, read_delivery
from draf_dist.sources.hospital_export import HospitalExport
from draf_dist.sources.synth import synthesise, synthesise_delivery
from draf_dist.sources.synth.card import card_text
from draf_dist.sources.synth.evidence import EVIDENCE, MODALITIES, squash
from draf_dist.sources.synth.population import draw_newcomers, draw_population
from draf_dist.sources.synth.profiles import NAMES, site_profile
from draf_dist.sources.synth.radiograph import CONTRAST, SLOPE, project
from draf_dist.sources.synth.truth import posterior_by_uid

ROOT = Path(__file__).resolve().parents[2]
KEY = b"public"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth")
    synthesise(out, num_sites=4, num_subjects=240, seed=5)
    return out


@pytest.fixture(scope="module")
def found(export: Path) -> list[Study | Rejection]:
    return read(export)


def read(export: Path) -> list[Study | Rejection]:
    return list(HospitalExport(load_card(export / "card.yaml"), export / "raw").studies())


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def content(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        synthesise(tmp_path / name, num_sites=2, num_subjects=12, seed=seed)
    one, again, two = (content(tmp_path / name) for name in ("one", "again", "two"))
    assert one == again
    same = [name for name in one.keys() & two.keys() if one[name] == two[name]]
    assert same == ["card.yaml"]


def test_a_small_cohort_is_the_beginning_of_a_large_one(tmp_path: Path) -> None:
    for name, num_subjects in (("small", 20), ("large", 40)):
        synthesise(tmp_path / name, num_sites=4, num_subjects=num_subjects, seed=0)
    small, large = content(tmp_path / "small"), content(tmp_path / "large")
    images = {name: digest for name, digest in small.items() if name.endswith(".png")}
    assert len(images) > 10
    assert images.items() <= large.items()
    rows = {tuple(row.values()) for row in table(tmp_path / "large" / "truth" / "truth.csv")}
    assert {tuple(row.values()) for row in table(tmp_path / "small" / "truth" / "truth.csv")} <= rows


def test_the_card_of_four_sites_is_the_one_in_datasets(export: Path) -> None:
    card = (export / "card.yaml").read_text(encoding="utf-8")
    assert card == (ROOT / "datasets" / "synth.yaml").read_text(encoding="utf-8")
    assert load_card(export / "card.yaml").split.public_subject_key


@pytest.mark.parametrize(("num_sites", "held_out"), [(1, ()), (2, ()), (3, ("st_anna",)), (4, ("lakeview",)), (6, ("site_06",))])
def test_the_last_of_three_or_more_sites_is_held_out(tmp_path: Path, num_sites: int, held_out: tuple[str, ...]) -> None:
    (tmp_path / "card.yaml").write_text(card_text(num_sites), encoding="utf-8")
    card = load_card(tmp_path / "card.yaml")
    assert card.split.held_out_sites == held_out
    assert len(card.sites.names()) == num_sites


def test_one_site_and_more_sites_than_styles_are_read_as_well(tmp_path: Path) -> None:
    for num_sites in (1, 6):
        out = tmp_path / str(num_sites)
        synthesise(out, num_sites=num_sites, num_subjects=12, seed=0)
        studies = [study for study in read(out) if isinstance(study, Study)]
        assert {study.site for study in studies} == {site_profile(number).name for number in range(num_sites)}


def test_only_studies_without_an_outcome_are_rejected(export: Path, found: list[Study | Rejection]) -> None:
    truth = table(export / "truth" / "truth.csv")
    rejected = [item for item in found if isinstance(item, Rejection)]
    assert len(found) == len(truth)
    assert len(rejected) == sum(row["outcome_known"] == "0" for row in truth)
    assert {item.reason for item in rejected} <= {"no label"}


def test_truth_is_found_by_the_uid_of_the_study_and_agrees_with_it(export: Path, found: list[Study | Rejection]) -> None:
    truth = posterior_by_uid(export / "truth", KEY)
    assert len(truth) == len(found)
    for study in found:
        if isinstance(study, Rejection):
            continue
        row = truth[study_uid(KEY, site=study.site, subject=study.subject, anchor=study.anchor)]
        assert (row.site, row.y) == (study.site, study.label)
        assert set(study.inputs) == {name for name in MODALITIES if row.present[name]}
        assert all(row.llr[name] == 0 and not row.corrupted[name] for name in MODALITIES if not row.present[name])
        assert row.posterior == pytest.approx(1 / (1 + np.exp(-row.prior_logit - sum(row.llr.values()))), rel=1e-9)


def test_truth_under_another_key_has_other_uids(export: Path) -> None:
    assert not posterior_by_uid(export / "truth", KEY).keys() & posterior_by_uid(export / "truth", b"other").keys()


def test_truth_that_is_not_there_or_incomplete_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file"):
        posterior_by_uid(tmp_path, KEY)
    (tmp_path / "truth.csv").write_text("site,study_id\n", encoding="utf-8")
    with pytest.raises(DataError, match="posterior"):
        posterior_by_uid(tmp_path, KEY)


def test_what_truth_calls_unobserved_is_not_observed(export: Path, found: list[Study | Rejection]) -> None:
    truth = {(row["site"], row["anchor"], row["subject_id"]): row for row in table(export / "truth" / "truth.csv")}
    places = {"labs": [0, 1, 2, 3], "history": [0]}
    num_missing = 0
    for study in found:
        if isinstance(study, Rejection):
            continue
        row = truth[study.site, study.anchor, study.subject]
        for name, columns in places.items():
            if name in study.inputs:
                missing = np.isnan(study.inputs[name][0, columns]).tolist()
                assert missing == [row[f"evidence_{name}_{part}"] == "" for part in EVIDENCE[name].names]
                num_missing += sum(missing)
    assert num_missing > 20


def test_nothing_from_after_the_anchor_enters(export: Path, found: list[Study | Rejection], tmp_path: Path) -> None:
    """Without the rows after the anchor (which do tell the label) the source reads exactly the same studies."""
    anchors = {(row["site"], row["study_id"]): row["anchor"] for row in table(export / "truth" / "truth.csv")}
    (tmp_path / "card.yaml").write_bytes((export / "card.yaml").read_bytes())
    num_dropped = dict.fromkeys(("vitals", "labs", "images"), 0)
    for site in NAMES:
        raw, kept = export / "raw" / site, tmp_path / "raw" / site
        kept.mkdir(parents=True)
        shutil.copytree(raw / "images", kept / "images")
        (kept / "studies.csv").write_bytes((raw / "studies.csv").read_bytes())
        for name, time in (("vitals", "time"), ("labs", "time"), ("images", "taken_at")):
            rows = table(raw / f"{name}.csv")
            early = [row for row in rows if row[time] <= anchors[site, row["study_id"]]]
            num_dropped[name] += len(rows) - len(early)
            with (kept / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(early)
    assert min(num_dropped.values()) > 20
    for study, other in zip(found, read(tmp_path), strict=True):
        assert type(study) is type(other)
        if isinstance(study, Study) and isinstance(other, Study):
            assert study.inputs.keys() == other.inputs.keys()
            assert all(np.array_equal(study.inputs[name], other.inputs[name], equal_nan=name != "cxr") for name in study.inputs)


def test_a_few_subjects_are_known_at_two_sites() -> None:
    sites: dict[str, set[str]] = {}
    population = draw_population(4, 4000, 0)
    for subject, site in zip(population.draws.subject, population.site, strict=True):
        sites.setdefault(str(subject), set()).add(str(site))
    twice = sum(len(where) == 2 for where in sites.values())
    assert 0.02 < twice / 4000 < 0.04
    assert twice == len(population.y) - 4000


def test_sites_differ_in_codes_units_columns_and_look(export: Path, found: list[Study | Rejection]) -> None:
    codes = {site: {row["code"] for row in table(export / "raw" / site / "labs.csv")} for site in NAMES}
    assert not set.intersection(*codes.values())
    units = {site: {row["unit"] for row in table(export / "raw" / site / "vitals.csv")} for site in NAMES}
    assert "degF" in units["riverside"]
    assert "degC" in units["st_anna"]
    assert "mrn" in table(export / "raw" / "riverside" / "studies.csv")[0]
    brightness: dict[str, list[float]] = {}
    for study in found:
        if isinstance(study, Study) and "cxr" in study.inputs:
            brightness.setdefault(study.site, []).append(float(study.inputs["cxr"].mean()))
    means = sorted(float(np.mean(values)) for values in brightness.values())
    assert min(np.diff(means)) > 1


def test_the_manifest_lists_every_file_with_its_digest(export: Path) -> None:
    for site in NAMES:
        on_disk = content(export / "raw" / site)
        del on_disk["manifest.csv"]
        assert {row["file"]: row["sha256"] for row in table(export / "raw" / site / "manifest.csv")} == on_disk


def test_anchor_is_a_day_after_the_admission(export: Path) -> None:
    admissions = {row["study_id"]: row["admission"] for row in table(export / "raw" / "northgate" / "studies.csv")}
    for row in table(export / "truth" / "truth.csv"):
        if row["site"] == "northgate":
            assert datetime.fromisoformat(row["anchor"]) - datetime.fromisoformat(admissions[row["study_id"]]) == timedelta(
                hours=24
            )


def test_truth_json_says_what_each_modality_carries(export: Path) -> None:
    said = json.loads((export / "truth" / "truth.json").read_text(encoding="utf-8"))
    nats = {name: alone["nats"] for name, alone in said["alone_clean_complete"].items()}
    assert max(nats, key=nats.__getitem__) == "cxr"
    assert min(nats, key=nats.__getitem__) == "history"
    assert 0 < said["bayes_optimal"]["nll"] < said["label_entropy_nats"]
    assert said["bayes_optimal"]["auroc"] > said["alone_clean_complete"]["cxr"]["auroc"]


# Deliveries of one hospital.


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("delivered")
    synthesise_delivery(out, site_number=5, num_subjects=40, seed=1)
    return out


def delivered_studies(out: Path) -> list[Study]:
    found = HospitalExport(load_card(out / "card.yaml"), out / "delivery").studies()
    return [study for study in found if isinstance(study, Study)]


def test_the_first_four_hospitals_are_as_they_always_were(tmp_path: Path) -> None:
    synthesise(tmp_path, num_sites=4, num_subjects=24, seed=3)
    digest = hashlib.sha256()
    for path in sorted(tmp_path.rglob("*")):
        if path.suffix == ".png":
            digest.update(np.asarray(Image.open(path)).tobytes())
        elif path.is_file() and path.name not in ("manifest.csv", "truth.json", "truth.csv"):
            digest.update(path.read_bytes())
    assert digest.hexdigest() == "09eb3f44605aa91689fe472d347973d60258467e3b25b6af2b08411b1914de72"


def test_a_delivery_is_sealed_and_the_same_every_time(delivered: Path, tmp_path: Path) -> None:
    delivery = read_delivery(delivered / "delivery")
    check_files(delivered / "delivery", delivery)
    assert delivery.sites == ("site_05",)
    synthesise_delivery(tmp_path, site_number=5, num_subjects=40, seed=1)
    assert content(tmp_path) == content(delivered)


def test_a_delivery_has_the_schema_of_the_cohorts_but_for_its_site(delivered: Path, export: Path) -> None:
    ours, theirs = (load_card(folder / "card.yaml").data_schema() for folder in (delivered, export))
    assert ours.sites == ("site_05",)
    assert ours.model_copy(update={"sites": theirs.sites}) == theirs
    assert load_card(delivered / "card.yaml").split.held_out_sites == ()


def test_newcomers_are_in_no_cohort_and_in_no_other_delivery() -> None:
    cohort = set(draw_population(6, 6400, 0).draws.subject.tolist())
    people = [draw_newcomers(number, 500, 0) for number in range(6)] + [draw_newcomers(5, 500, 0, first_subject=500)]
    everyone = [subject for population in people for subject in population.draws.subject.tolist()]
    assert len(set(everyone)) == 7 * 500
    assert not cohort & set(everyone)


def test_a_later_delivery_goes_on_where_the_first_ended(delivered: Path, tmp_path: Path) -> None:
    synthesise_delivery(tmp_path / "whole", site_number=5, num_subjects=50, seed=1)
    synthesise_delivery(tmp_path / "later", site_number=5, num_subjects=10, seed=1, first_subject=40)
    first, later, whole = (
        table(folder / "delivery" / "site_05" / "studies.csv") for folder in (delivered, tmp_path / "later", tmp_path / "whole")
    )
    assert first + later == whole


def test_a_delivered_study_is_what_the_truth_says(delivered: Path) -> None:
    truth, studies = posterior_by_uid(delivered / "truth", KEY), delivered_studies(delivered)
    assert len(studies) > 35
    for study in studies:
        row = truth[study_uid(KEY, site=study.site, subject=study.subject, anchor=study.anchor)]
        assert (row.site, row.y) == (study.site, study.label)
        assert set(study.inputs) == {name for name in MODALITIES if row.present[name]}
    said = json.loads((delivered / "truth" / "truth.json").read_text(encoding="utf-8"))
    assert list(said["missing_rate"]) == ["site_05"]


def test_every_later_hospital_has_a_scanner_codes_and_a_mixture_of_units_of_its_own() -> None:
    profiles = [site_profile(number) for number in range(26)]
    assert len({profile.scanner for profile in profiles}) == 26
    assert len({(profile.scanner.texture, profile.scanner.grid) for profile in profiles[4:]}) == 22
    assert len({code for profile in profiles for code, _ in profile.vitals.values()}) == 26 * 5
    units = [tuple(unit for measured in (p.vitals, p.labs) for _, unit in measured.values()) for p in profiles]
    assert not set(units[:4]) & set(units[4:])


def test_a_new_hospitals_radiographs_are_told_from_the_others_by_their_stripes(
    delivered: Path, found: list[Study | Rejection]
) -> None:
    assert site_profile(4).scanner.grid == (6, 0)

    def stripes(study: Study) -> float:
        """Amplitude of one wave every 6 rows."""
        rows = study.inputs["cxr"][0, 12:84].astype(float).mean(axis=1)
        return float(abs(np.exp(2j * np.pi * np.arange(72) / 6) @ rows) / 72)

    theirs = [stripes(study) for study in found if isinstance(study, Study) and "cxr" in study.inputs]
    ours = [stripes(study) for study in delivered_studies(delivered) if "cxr" in study.inputs]
    assert min(ours) > 2 * max(theirs)


def test_stripes_leave_the_evidence_in_a_radiograph_as_it_is(delivered: Path) -> None:
    scanner = site_profile(4).scanner
    truth = {row["subject_id"]: row for row in table(delivered / "truth" / "truth.csv")}
    for study in delivered_studies(delivered):
        if "cxr" in study.inputs:
            shown = np.clip(study.inputs["cxr"].astype(float) - scanner.offset, 0, None) / 255
            read = (project(255 * shown ** (1 / scanner.gamma) / scanner.gain)[0] - CONTRAST) / SLOPE
            planted = np.array([float(truth[study.subject][f"evidence_cxr_{name}"]) for name in EVIDENCE["cxr"].names])
            assert np.abs(read - squash(planted)).max() < 0.15

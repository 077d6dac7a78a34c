"""Writes a cohort as hospitals would export it, with its card and the truth behind it."""

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from PIL import Image

from draf_dist.schema.delivery import Delivery
from draf_dist.sources.delivery import seal
from draf_dist.sources.synth.admissions import columns, studies_rows
from draf_dist.sources.synth.card import card_text, delivery_card_text
from draf_dist.sources.synth.labs import labs_rows
from draf_dist.sources.synth.population import Ints, draw_newcomers, draw_population
from draf_dist.sources.synth.radiograph import render
from draf_dist.sources.synth.site_cohort import OFFSET_H, SiteCohort, site_cohort
from draf_dist.sources.synth.truth import write_truth
from draf_dist.sources.synth.vitals import vitals_rows

Row = tuple[str, ...]
_LONG = ("study_id", "time", "code", "value", "unit")
_IMAGES = ("study_id", "file", "taken_at")
# Bounds memory: each radiograph passes through about ten float64 arrays of its size.
_CHUNK = 64
_LATE_IMAGE_RATE = 0.15
_LATE_EVIDENCE = 5.0
# The same bytes whenever it is written.
_DELIVERED_AT = datetime(2022, 1, 1, tzinfo=UTC)


def synthesise(out: Path, *, num_sites: int = 4, num_subjects: int = 400, seed: int = 0) -> None:
    """Writes OUT/raw/<site>/, OUT/card.yaml and OUT/truth/. Same arguments, same bytes.

    num_subjects is the total over all sites; about 3 % of them have a study at a second site too.
    """
    population = draw_population(num_sites, num_subjects, seed)
    cohorts = [site_cohort(population, number) for number in range(num_sites)]
    for cohort in cohorts:
        _write_site(out / "raw" / cohort.profile.name, cohort)
    write_truth(out / "truth", population, cohorts, seed)
    (out / "card.yaml").write_text(card_text(num_sites), encoding="utf-8")


def synthesise_delivery(
    out: Path, *, site_number: int = 5, num_subjects: int = 300, seed: int = 0, first_subject: int = 0
) -> Delivery:
    """Writes what one hospital delivers: OUT/delivery/<site>/ sealed by OUT/delivery/delivery.json, OUT/card.yaml and OUT/truth/.

    site_number: counted from 1; from the fifth on, a hospital has a scanner, codes and a mixture of units of its own.
    first_subject: how many of its subjects came in earlier deliveries of the same seed. Same arguments, same bytes. Its subjects
    are in no cohort of `synthesise` and in no delivery of another hospital.
    """
    number = site_number - 1
    population = draw_newcomers(number, num_subjects, seed, first_subject=first_subject)
    cohort = site_cohort(population, number)
    _write_site(out / "delivery" / cohort.profile.name, cohort)
    write_truth(out / "truth", population, [cohort], seed)
    (out / "card.yaml").write_text(delivery_card_text(number), encoding="utf-8")
    delivery_id = f"{cohort.profile.name}-{seed}-{first_subject}-{num_subjects}"
    return seal(out / "delivery", delivery_id, sites=[cohort.profile.name], created_at=_DELIVERED_AT)


def _write_site(folder: Path, cohort: SiteCohort) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    manifest = [_put(folder, "studies.csv", _csv(columns(cohort), studies_rows(cohort)))]
    manifest.append(_put(folder, "vitals.csv", _csv(_LONG, vitals_rows(cohort))))
    manifest.append(_put(folder, "labs.csv", _csv(_LONG, labs_rows(cohort))))
    images = []
    for row, png in _radiographs(cohort):
        images.append(row)
        manifest.append(_put(folder, f"images/{row[1]}", png))
    manifest.append(_put(folder, "images.csv", _csv(_IMAGES, images)))
    _put(folder, "manifest.csv", _csv(("file", "size_bytes", "sha256"), manifest))


def _radiographs(cohort: SiteCohort) -> Iterator[tuple[Row, bytes]]:
    """Row of images.csv and PNG of every radiograph: in the window where present; after the anchor of some, a telling one."""
    minute = cohort.draws.integers("cxr minute", 5, OFFSET_H * 60 - 5)
    late_minute = cohort.draws.integers("cxr late minute", OFFSET_H * 60 + 1, OFFSET_H * 60 + 900)
    late = np.flatnonzero(cohort.draws.uniform("cxr late") < _LATE_IMAGE_RATE)
    telling = np.where(cohort.y == 1, _LATE_EVIDENCE, -_LATE_EVIDENCE)[:, None].repeat(3, axis=1)
    for number, study, evidence, minutes in (
        (1, np.flatnonzero(cohort.present("cxr")), cohort.evidence("cxr"), minute),
        (2, late, telling, late_minute),
    ):
        for start in range(0, len(study), _CHUNK):
            rows = study[start : start + _CHUNK]
            pixels = render(evidence[rows], cohort.level("cxr")[rows], cohort.profile.scanner, cohort.draws.rows(rows))
            times = cohort.admission[rows] + minutes[rows].astype("timedelta64[m]")
            yield from _encode(cohort, number, rows, pixels, np.datetime_as_string(times, unit="s").tolist())


def _encode(
    cohort: SiteCohort, number: int, rows: Ints, pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], times: list[str]
) -> Iterator[tuple[Row, bytes]]:
    for row, image, time in zip(rows, pixels, times, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG", compress_level=6)
        yield (cohort.study_id[row], f"{cohort.study_id[row]}_{number}.png", time), buffer.getvalue()


def _csv(header: Row, rows: Iterable[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def _put(folder: Path, name: str, content: bytes) -> Row:
    """Writes a file and returns its row of the manifest."""
    (folder / name).write_bytes(content)
    return name, str(len(content)), hashlib.sha256(content).hexdigest()

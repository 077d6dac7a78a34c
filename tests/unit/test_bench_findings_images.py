"""The two benchmarks in which a modality is an image."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from draf_dist.config.spec import Spec
from draf_dist.data.corruption import GaussianNoise
from draf_dist.evaluation.bench_job import BenchJob, load_bench_job
from draf_dist.sources.card import load_card

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("bench_findings_synth", "bench_findings_covid")


@pytest.fixture(params=NAMES)
def job(request: pytest.FixtureRequest) -> BenchJob:
    return load_bench_job(ROOT / "jobs" / f"{request.param}.yaml")


def test_one_modality_is_an_image_and_is_disturbed_in_every_way(job: BenchJob) -> None:
    card = load_card(ROOT / job.card)
    assert isinstance(card.modalities, tuple)
    assert [modality.kind for modality in card.modalities].count("image") == 1
    kinds = {condition.operation.kind for condition in job.conditions.values()}
    assert kinds == {"gaussian", "downsample", "jpeg", "swap", "ehr_noise", "missing", "missing_not_at_random"}


def test_all_systems_have_the_same_data_law_schedule_and_encoders(job: BenchJob) -> None:
    jobs = job.jobs(job.name)
    own = {"name", "model", "objective"}
    assert len({one.model_dump_json(exclude=own) for one in jobs.values()}) == 1
    encoders = {one.model_dump_json() for system in jobs.values() for one in found(system.model, "encoders")}
    assert len(encoders) == 1
    bits = {name: any(found(system.model, "presence_bits")) for name, system in jobs.items()}
    assert [name for name, value in bits.items() if not value] == ["mean_no_bits"]


def test_no_system_meets_a_noise_that_training_did_not_show(job: BenchJob) -> None:
    """Or a gain would be of whoever happens to bear it, not of whoever learned to."""
    (law,) = {one.corruption.model_dump_json(): one.corruption for one in job.jobs(job.name).values()}.values()
    (noise,) = [operation for operation in law.operations if isinstance(operation, GaussianNoise)]
    levels = {condition.level for condition in job.conditions.values() if isinstance(condition.operation, GaussianNoise)}
    assert levels == {0.8, 3.0} <= set(noise.grid)
    assert not law.hold_out_last


def found(spec: Spec, name: str) -> Iterator[Any]:
    for field, value in spec:
        if field == name:
            yield value
        elif isinstance(value, Spec):
            yield from found(value, name)

"""A run that goes on from another one's model: its weights, its normalisation, and nothing that does not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import silent, small_job, small_model, small_release

from draf_dist.config.spec import validate_spec
from draf_dist.data.normalise import Normaliser
from draf_dist.data.release import open_release
from draf_dist.errors import DataError, SpecError
from draf_dist.schema.batch import Batch
from draf_dist.schema.release import ReleaseStats
from draf_dist.training.finetune import build_finetuning
from draf_dist.training.job import FinetuneJob
from draf_dist.training.jobs import load_job
from draf_dist.training.pin import pin
from draf_dist.training.pretrain_job import PretrainJob
from draf_dist.training.run import begin, train
from draf_dist.training.run_folder import enter_run, open_run
from draf_dist.training.torch_engine import OneProcess
from draf_dist.training.warm_start import pin_start

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def first_release(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_release(tmp_path_factory.mktemp("first"), num_subjects=60, seed=1)


@pytest.fixture(scope="module")
def second_release(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_release(tmp_path_factory.mktemp("second"), num_subjects=60, seed=2)


@pytest.fixture(scope="module")
def champion(first_release: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("champion") / "run"
    train(small_job(first_release), str(out), console=silent())
    return out


def started(release: str, champion: Path, **changes: Any) -> FinetuneJob:
    return small_job(release, warm_start=str(champion), **changes)


def test_a_job_without_a_warm_start_keeps_the_name_that_it_had_before_there_was_one() -> None:
    job = FinetuneJob(name="x", release="data/synth@0123456789abcdef")
    assert {"warm_start", "replay"}.isdisjoint(job.model_dump(mode="json"))
    assert job.sha256 == GOLDEN_SHA256


GOLDEN_SHA256 = "a0505a6ebaa58882d7c66d4c9c7696057f65009f4f30a541bc68b733cbeecad8"


def test_the_weights_are_the_earlier_ones_to_the_last_bit(champion: Path, second_release: str) -> None:
    job = pin(started(second_release, champion, seed=5, label_fraction=0.3))
    assert isinstance(job, FinetuneJob)
    state = build_finetuning(job, open_release(job.release), CPU).model.state_dict()
    expected = load_file(champion / "model" / "model.safetensors")
    assert state.keys() == expected.keys()
    # The shares of the classes among them, although this job would count others.
    assert "log_prevalence" in state
    assert all(torch.equal(value, state[name]) for name, value in expected.items())


def test_input_is_normalised_as_the_weights_learned_it_and_the_new_model_carries_that_on(
    champion: Path, second_release: str, tmp_path: Path
) -> None:
    release = open_release(second_release)
    before = (champion / "model" / "stats.json").read_bytes()
    assert train(started(second_release, champion, epochs=1), str(tmp_path / "run"), console=silent()).finished
    assert (tmp_path / "run" / "model" / "stats.json").read_bytes() == before
    stage = build_finetuning(pinned(tmp_path / "run"), release, CPU)
    batch = next(iter(stage.validation(OneProcess()).batches()))
    earlier, own = (Normaliser(release.schema, stats)(batch) for stats in (ReleaseStats.model_validate_json(before), release.stats))
    assert torch.equal(image_of(stage.prepared(batch)), image_of(earlier))
    assert not torch.equal(image_of(earlier), image_of(own))


def image_of(batch: Batch) -> torch.Tensor:
    return next(value for value in batch.inputs.values() if isinstance(value, torch.Tensor) and value.ndim == 4)


def pinned(run: Path) -> FinetuneJob:
    job = open_run(str(run)).job
    assert isinstance(job, FinetuneJob)
    return job


def test_a_start_that_hardly_moves_validates_as_the_earlier_run_did(champion: Path, first_release: str, tmp_path: Path) -> None:
    still = {"learning_rate": 1e-9, "weight_decay": 0.0}
    result = train(started(first_release, champion, optimizer=still, epochs=1), str(tmp_path / "run"), console=silent())
    earlier = open_run(str(champion)).end()
    assert earlier is not None
    assert result.best_loss == pytest.approx(earlier["best_loss"], rel=1e-5)


def test_a_run_pins_the_weights_that_it_started_from(champion: Path, second_release: str, tmp_path: Path) -> None:
    copy = tmp_path / "champion"
    shutil.copytree(champion, copy)
    begin(started(second_release, copy), str(tmp_path / "run"))
    digest = json.loads((copy / "model" / "model.json").read_text())["weights_sha256"]
    assert pinned(tmp_path / "run").warm_start == f"{copy}@{digest}"
    # The champion's folder is trained again, with another seed.
    train(small_job(str(open_release(second_release).pinned_url), seed=9, epochs=1), str(copy), console=silent(), fresh=True)
    with pytest.raises(SpecError, match=r"That run was trained again: start this one with --fresh"):
        train(load_job(tmp_path / "run" / "job.yaml"), str(tmp_path / "run"), console=silent())


def test_a_run_that_is_not_finished_is_refused(first_release: str, second_release: str, tmp_path: Path) -> None:
    begin(small_job(first_release), str(tmp_path / "begun"))
    with pytest.raises(SpecError, match=r"expected a finished run, found one that is not\. Finish it first: draf train"):
        begin(started(second_release, tmp_path / "begun"), str(tmp_path / "run"))


def test_a_run_of_another_kind_is_refused(first_release: str, second_release: str, tmp_path: Path) -> None:
    tree = {"kind": "pretrain", "name": "x", "release": first_release, "objective": {"kind": "simclr", "modality": "cxr"}}
    other = validate_spec(tree, PretrainJob, where="job")
    enter_run(str(tmp_path / "other"), pin(other), "continue")
    with pytest.raises(SpecError, match="expected a fine-tuning run, found a run of kind pretrain"):
        begin(started(second_release, tmp_path / "other"), str(tmp_path / "run"))


def test_a_model_of_other_settings_is_refused_and_every_difference_named(champion: Path, second_release: str) -> None:
    other = small_model(width=12, reliability_alpha=3.0)
    with pytest.raises(SpecError) as caught:
        pin(started(second_release, champion, model=other))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("warm_start: model.reliability_alpha: expected 1.0, found 3.0.")
    assert lines[1].startswith("warm_start: model.width: expected 8, found 12. Take the model section of that run's job.yaml.")


def test_data_that_the_model_does_not_read_is_refused_and_the_difference_named(champion: Path, second_release: str) -> None:
    schema, config = open_release(second_release).schema, small_job(second_release).model

    def start(**changes: Any) -> str:
        return pin_start(str(champion), config, schema.model_copy(update=changes))

    assert start(sites=("one", "two", "three"))
    with pytest.raises(SpecError, match=r"warm_start: .*classes\.1: expected .*, found z\. Use a release with the schema"):
        start(label=schema.label.model_copy(update={"classes": (schema.label.classes[0], "z")}))
    with pytest.raises(SpecError, match=r"warm_start: modalities: expected .*, found"):
        start(modalities=schema.modalities[:-1])


def test_a_warm_start_has_encoders_already(champion: Path, second_release: str) -> None:
    tree = {"name": "x", "release": second_release, "warm_start": str(champion), "pretrained": {"cxr": "runs/encoder"}}
    with pytest.raises(SpecError, match="warm_start and pretrained exclude each other"):
        validate_spec(tree, FinetuneJob, where="job.yaml")


def test_credentials_in_the_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(SpecError, match="warm_start: expected a URL without credentials") as caught:
        FinetuneJob(name="x", release="data", warm_start="s3://key:secret@bucket/run")
    assert "secret" not in str(caught.value)


def test_damaged_weights_are_refused(champion: Path, second_release: str, tmp_path: Path) -> None:
    copy = tmp_path / "champion"
    shutil.copytree(champion, copy)
    weights = copy / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    job = pin(started(second_release, copy))
    assert isinstance(job, FinetuneJob)
    with pytest.raises(DataError, match="The file is damaged"):
        build_finetuning(job, open_release(job.release), CPU)

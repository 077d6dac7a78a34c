"""Pre-training into a bucket, and fine-tuning that starts from what lies there."""

import io
from pathlib import Path

import pytest
from conftest import S3
from rich.console import Console
from small_runs import ENCODERS, small_release

from draf_dist.errors import DataError, SpecError
from draf_dist.storage import open_store
from draf_dist.training.job import FinetuneJob
from draf_dist.training.pretrain_job import PretrainJob
from draf_dist.training.run import train


def test_a_model_is_fine_tuned_from_an_encoder_in_a_bucket_and_knows_which(s3: S3, tmp_path: Path) -> None:
    release, encoder = small_release(tmp_path, num_subjects=60, seed=2, out=f"{s3.url}/release"), ENCODERS["series"]
    common = {"release": release, "batch_size": 16, "epochs": 1}
    objective = {"kind": "masked_values", "modality": "vitals"}
    pretrain = PretrainJob.model_validate({**common, "name": "pre", "width": 8, "encoder": encoder, "objective": objective})
    console = Console(file=io.StringIO())
    assert train(pretrain, f"{s3.url}/pre", console=console).finished

    model = {"kind": "mean", "width": 8, "encoders": {"series": encoder}}
    tree = {**common, "name": "fine", "model": model, "passes_train": 1, "passes_eval": 2}
    job = FinetuneJob.model_validate({**tree, "pretrained": {"vitals": f"{s3.url}/pre"}})
    assert train(job, f"{s3.url}/fine", console=console).finished
    store = open_store(s3.url)
    assert f"{s3.url}/pre@" in store.read("fine/job.yaml").decode()

    store.delete("pre/model/encoder.json")
    with pytest.raises(DataError, match="pre: expected an exported model, found no model/encoder.json"):
        train(job, f"{s3.url}/other", console=console)
    with pytest.raises(SpecError, match="expected a run folder, found no job.yaml"):
        train(job.model_copy(update={"pretrained": {"vitals": f"{s3.url}/per"}}), f"{s3.url}/other", console=console)

"""The objective of a fine-tuning job follows from its model."""

import pytest
from pydantic import ValidationError

from draf_dist.training.job import FinetuneJob


@pytest.mark.parametrize(
    ("model", "objective"),
    [("draf", "fusion"), ("healnet", "fusion"), ("aum", "aum"), ("drfuse", "drfuse"), ("bayesian_unet", "bayesian")],
)
def test_a_model_is_trained_by_its_own_objective_unless_told(model: str, objective: str) -> None:
    job = FinetuneJob.model_validate({"name": "j", "release": "r", "model": {"kind": model}})
    assert job.objective.kind == objective
    assert FinetuneJob.model_validate(job.model_dump(mode="json")) == job


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        ("mean", "aum"),
        ("aum", "fusion"),
        ("aum", "cox"),
        ("drfuse", "fusion"),
        ("draf", "drfuse"),
        ("bayesian_unet", "fusion"),
        ("bayesian_unet", "cox"),
        ("draf", "bayesian"),
    ],
)
def test_an_objective_that_leaves_parts_of_the_model_untrained_is_refused(model: str, objective: str) -> None:
    settings = {"name": "j", "release": "r", "model": {"kind": model}, "objective": {"kind": objective}}
    with pytest.raises(ValidationError, match=f"model {model} is trained by the objective"):
        FinetuneJob.model_validate(settings)


def test_weights_may_be_given_without_the_kind() -> None:
    job = FinetuneJob.model_validate({"name": "j", "release": "r", "objective": {"lambda_acd": 0.5}})
    assert job.objective.kind == "fusion"


@pytest.mark.parametrize("objective", [{"kind": "bayesian"}, {"kind": "bayesian", "lambda_att": 0, "adversarial": {}}])
def test_a_job_whose_loss_looks_at_uncertainty_needs_two_passes(objective: dict[str, object]) -> None:
    settings = {"name": "j", "release": "r", "model": {"kind": "bayesian_unet"}, "objective": objective}
    with pytest.raises(ValidationError, match="passes_train is 1, and the objective looks at uncertainty"):
        FinetuneJob.model_validate({**settings, "passes_train": 1})
    assert FinetuneJob.model_validate({**settings, "passes_train": 2}).passes_train == 2
    plain = {**settings, "objective": {"kind": "bayesian", "lambda_att": 0}, "passes_train": 1}
    assert FinetuneJob.model_validate(plain).passes_train == 1

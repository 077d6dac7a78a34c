"""The Bayesian stage as a job: it trains, is stopped and goes on, validates, is exported; what it can't do is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import silent, small_job, small_release
from stop_after import StopAfter

from draf_dist.data.release import open_release
from draf_dist.errors import InterruptedRunError, SpecError
from draf_dist.models.export import load_model
from draf_dist.models.segmentation import BayesianUnet
from draf_dist.models.variational import GaussianWeight
from draf_dist.objectives.bayesian import BayesianObjective
from draf_dist.training.decay import decay_groups
from draf_dist.training.finetune import Finetuning, build_finetuning
from draf_dist.training.job import FinetuneJob
from draf_dist.training.pin import pin
from draf_dist.training.pretrain_job import PretrainJob
from draf_dist.training.run import attempt, begin, train
from draf_dist.training.torch_engine import OneProcess

UNET = {"kind": "bayesian_unet", "modality": "cxr", "widths": [4, 6], "groups": 2}
FGSM = {"attack": "fgsm", "samples": 2, "epsilon": 0.05}
TERMS = {"task", "kl", "attention", "adversarial_task", "adversarial_clean_task"}
SIGNALS = {"signal_attention_entropy", "signal_posterior_sigma"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def release_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_release(tmp_path_factory.mktemp("data"), num_subjects=60, seed=1)


def bayesian_job(release_url: str, *, model: dict[str, Any] | None = None, **changes: Any) -> FinetuneJob:
    objective = {"kind": "bayesian", "estimator": "weights", "adversarial": FGSM}
    settings = {"objective": objective, "epochs": 2, "checkpoint": {"every_steps": 2}, **changes}
    return small_job(release_url, model={**UNET, **(model or {})}, **settings)


@pytest.fixture(scope="module")
def finished(release_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train(bayesian_job(release_url), str(out), console=silent()).finished
    return out


def lines(out: Path, event: str) -> list[dict[str, Any]]:
    found = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["event"] == event]


def built(job: FinetuneJob) -> Finetuning:
    pinned = pin(job)
    assert isinstance(pinned, FinetuneJob)
    return build_finetuning(pinned, open_release(pinned.release), CPU)


def test_every_term_is_logged_and_the_divergence_falls(finished: Path) -> None:
    steps = lines(finished, "step")
    assert all(step["terms"].keys() == TERMS | SIGNALS for step in steps)
    divergence = [step["terms"]["kl"] for step in steps]
    assert divergence[-1] < divergence[0]


def test_the_loss_is_the_sum_of_its_terms_and_the_divergence_comes_in_with_the_steps(finished: Path, release_url: str) -> None:
    steps, objective = lines(finished, "step"), built(bayesian_job(release_url)).objective
    assert isinstance(objective, BayesianObjective)
    for number, step in enumerate(steps):
        terms, share = step["terms"], min(1.0, (number + 1) / (0.2 * len(steps)))
        expected = terms["task"] + share * terms["kl"] / objective.num_train + 0.01 * terms["attention"]
        expected += 0.5 * 0.5 * (terms["adversarial_task"] + terms["adversarial_clean_task"])
        assert step["loss"] == pytest.approx(expected, rel=1e-5)
    assert 0.2 * len(steps) > 2


def test_validation_gives_the_numbers_of_the_label(finished: Path) -> None:
    for epoch in lines(finished, "epoch"):
        assert {"nll", "auroc", "accuracy"} <= epoch.keys()


def test_the_exported_model_is_that_of_the_best_validation(finished: Path) -> None:
    exported = load_model(finished / "model")
    assert isinstance(exported.model, BayesianUnet)
    weights = load_file(finished / "model" / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in exported.model.state_dict().items())
    assert "Reads cxr alone" in (finished / "model" / "README.md").read_text()


def test_a_run_that_was_stopped_and_goes_on_is_the_same_bit_for_bit(finished: Path, release_url: str, tmp_path: Path) -> None:
    """Weights are drawn and attacks are made by the step, not by how many came before in this process."""
    folder = begin(bayesian_job(release_url), str(tmp_path / "run"))
    for steps in (3, 4):
        with pytest.raises(InterruptedRunError):
            attempt(folder.url, OneProcess(), silent(), StopAfter(steps))
    assert attempt(folder.url, OneProcess(), silent(), StopAfter(999)).finished
    for event, numbers in (("step", ("loss", "terms")), ("epoch", ("nll",))):
        found, expected = (lines(out, event) for out in (tmp_path / "run", finished))
        assert [[line[name] for name in numbers] for line in found] == [[line[name] for name in numbers] for line in expected]
    name = "model/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_the_objective_knows_how_many_studies_and_steps_there_are(release_url: str) -> None:
    stage = built(bayesian_job(release_url, seed=5))
    objective, manifest = stage.objective, open_release(release_url).manifest
    assert isinstance(objective, BayesianObjective)
    assert (objective.modality, objective.seed) == ("cxr", 5)
    assert objective.num_steps == 2 * -(-manifest.receipts["train"].count // 8)
    with_image = sum(counts["train"]["cxr"] for counts in manifest.counts.values())
    assert objective.num_train == with_image < manifest.receipts["train"].count


def test_adversarial_training_is_refused_with_accumulation(release_url: str) -> None:
    job = bayesian_job(release_url)
    with pytest.raises(SpecError, match="objective.adversarial: expected whole batches, found accumulation 2"):
        built(job).rules(OneProcess(accumulation=2))
    for objective in ({"kind": "bayesian"}, {"kind": "bayesian", "adversarial": FGSM, "lambda_adv": 0}):
        assert built(bayesian_job(release_url, objective=objective)).rules(OneProcess(accumulation=2)).accumulation == 2


def test_without_attacks_micro_batches_give_the_losses_of_whole_batches(release_url: str, tmp_path: Path) -> None:
    job = bayesian_job(release_url, objective={"kind": "bayesian", "estimator": "weights"}, epochs=1)
    for parts in (1, 3):
        train(job, str(tmp_path / str(parts)), console=silent(), backend=OneProcess(accumulation=parts))
    whole, cut = ([line["loss"] for line in lines(tmp_path / name, "step")] for name in ("1", "3"))
    assert cut == pytest.approx(whole, rel=1e-5)


def test_a_head_that_nothing_teaches_is_refused_before_anything_is_written(release_url: str, tmp_path: Path) -> None:
    heads = {"findings": {"kind": "multilabel", "name": "findings", "labels": ["effusion"]}}
    job = bayesian_job(release_url, model={"heads": heads})
    with pytest.raises(SpecError, match=r"model.heads.findings: expected masks of an image, found effusion"):
        train(job, str(tmp_path / "run"), console=silent())
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_a_modality_that_is_no_image_is_refused(release_url: str) -> None:
    with pytest.raises(SpecError, match="model.modality: expected an image or a volume of the release, found 'vitals'"):
        built(bayesian_job(release_url, model={"modality": "vitals"}))


def test_weight_decay_leaves_gaussian_weights_to_their_prior(release_url: str) -> None:
    model = built(bayesian_job(release_url)).model
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(decay_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    gaussian = {
        f"{name}.{part}" for name, layer in model.named_modules() if isinstance(layer, GaussianWeight) for part in ("mean", "rho")
    }
    assert gaussian
    for name, value in model.named_parameters():
        expected = before[name] if name in gaussian else 0.95 * before[name]
        torch.testing.assert_close(value, expected, msg=lambda text, n=name: f"{n}: {text}")


def test_what_a_model_of_one_image_does_not_read_is_neither_corrupted_nor_dropped(release_url: str) -> None:
    job = bayesian_job(release_url, corruption={"probability": 1.0, "modality_dropout": 0.9}, batch_size=40)
    stage = built(job)
    _, loaded = next(iter(stage.loader(OneProcess()).batches(0, 1)))
    clean = stage.prepared(loaded)
    batch = stage.corruptor.train(clean)
    assert torch.equal(batch.present, clean.present)
    assert batch.corrupted[:, 1:].sum() == 0
    assert batch.corrupted[clean.present[:, 0], 0].all()


def pretraining(release_url: str, **encoder: Any) -> PretrainJob:
    tree = {"name": "pre", "release": release_url, "width": 8, "batch_size": 16, "epochs": 1}
    chosen = {"kind": "image2d", "widths": [4, 6], "groups": 2, **encoder}
    return PretrainJob.model_validate({**tree, "objective": {"kind": "simclr", "modality": "cxr"}, "encoder": chosen})


@pytest.fixture(scope="module")
def encoder(release_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    assert train(pretraining(release_url), str(out), console=silent()).finished
    return out


def test_a_run_starts_from_a_simclr_encoder_and_from_the_seed_elsewhere(release_url: str, encoder: Path) -> None:
    started, plain = (built(bayesian_job(release_url, pretrained=start)).model for start in ({"cxr": str(encoder)}, {}))
    there, untouched = load_file(encoder / "model" / "encoder.safetensors"), plain.state_dict()
    for name, value in started.state_dict().items():
        expected = there[name.removeprefix("encoder.")] if name.startswith("encoder.") else untouched[name]
        assert torch.equal(value, expected), name
    assert not torch.equal(started.state_dict()["encoder.stem.weight"], untouched["encoder.stem.weight"])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"widths": [4, 8]}, r"pretrained.cxr: widths: expected \(4, 8\), found \(4, 6\)"),
        # Groups have no parameters of their own: their number must be compared.
        ({"groups": 1}, "pretrained.cxr: groups: expected 1, found 2"),
    ],
)
def test_an_encoder_of_another_shape_is_refused_and_it_is_said_why(
    release_url: str, encoder: Path, model: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        built(bayesian_job(release_url, model=model, pretrained={"cxr": str(encoder)}))


def test_an_encoder_of_another_modality_is_refused(release_url: str, encoder: Path) -> None:
    with pytest.raises(SpecError, match="pretrained: expected the modality that the model reads, found 'vitals'"):
        built(bayesian_job(release_url, pretrained={"vitals": str(encoder)}))

"""Pre-training from a release to an encoder, and fine-tuning that starts from it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from small_runs import ENCODERS, small_model, small_release

from draf_dist.data.release import open_release
from draf_dist.errors import DataError, InterruptedRunError, SpecError
from draf_dist.models.backbones import Backbones, module_name
from draf_dist.models.encoder_export import ENCODER_DESCRIPTION, ENCODER_WEIGHTS
from draf_dist.storage import open_store
from draf_dist.training.finetune import build_finetuning
from draf_dist.training.job import FinetuneJob
from draf_dist.training.jobs import load_job, parse_job
from draf_dist.training.journal import read_lines
from draf_dist.training.pin import pin
from draf_dist.training.pretrain import build_pretraining
from draf_dist.training.pretrain_job import PretrainJob
from draf_dist.training.pretrained import load_encoder, pin_encoder
from draf_dist.training.run import RunResult, attempt, begin, train
from draf_dist.training.run_folder import Fence, open_run
from draf_dist.training.stage import Stage
from draf_dist.training.torch_engine import OneProcess

OBJECTIVES = {"image": {"kind": "simclr", "modality": "cxr"}, "series": {"kind": "masked_values", "modality": "vitals"}}
BACKEND = OneProcess()


@pytest.fixture(scope="module")
def release_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_release(tmp_path_factory.mktemp("data"), num_subjects=60, seed=1)


def pretraining(release_url: str, kind: str, **changes: Any) -> PretrainJob:
    tree = {"name": "pre", "release": release_url, "width": 8, "batch_size": 16, "epochs": 2, "checkpoint": {"every_steps": 1}}
    return PretrainJob.model_validate({**tree, "objective": OBJECTIVES[kind], "encoder": ENCODERS[kind], **changes})


def finetuning(release_url: str, **changes: Any) -> FinetuneJob:
    tree = {"name": "fine", "release": release_url, "batch_size": 16, "epochs": 1, "passes_train": 1, "passes_eval": 2}
    return FinetuneJob.model_validate({**tree, "model": small_model("mean"), **changes})


def run(job: PretrainJob | FinetuneJob, out: Path, **options: Any) -> RunResult:
    return train(job, str(out), console=quiet(), **options)


def quiet() -> Console:
    return Console(file=open(os.devnull, "w"), stderr=False)  # noqa: PTH123, SIM115


@pytest.fixture(scope="module")
def runs(release_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of every objective."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in OBJECTIVES:
        assert run(pretraining(release_url, kind), folder / kind).finished
    return {kind: folder / kind for kind in OBJECTIVES}


def validated(stage: Stage) -> dict[str, float]:
    return stage.validate(stage.model, BACKEND, stage.validation(BACKEND))


def epochs(out: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(open_store(str(out)), "metrics.jsonl") if line["event"] == "epoch"]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_exported_encoder_is_that_of_the_best_validation_and_no_head_goes_with_it(runs: dict[str, Path], kind: str) -> None:
    out = runs[kind]
    files = {path.name for path in (out / "model").iterdir()}
    assert files == {"encoder.safetensors", "encoder.json", "stats.json", "README.md"}
    best = min(epochs(out), key=lambda line: line["loss"])["step"]
    trained = open_run(str(out)).checkpoints.at(best).tensors.weights()
    exported = load_file(out / "model" / "encoder.safetensors")
    assert {f"encoder.{name}" for name in exported} == {name for name in trained if name.startswith("encoder.")}
    assert all(torch.equal(value, trained[f"encoder.{name}"]) for name, value in exported.items())


def test_validation_reports_accuracies_of_region_and_protocol_and_the_share_explained(runs: dict[str, Path]) -> None:
    image, series = epochs(runs["image"])[-1], epochs(runs["series"])[-1]
    for name in ("region_accuracy", "protocol_accuracy_f", "protocol_accuracy_g"):
        assert 0 <= image[name] <= 1
    assert series["explained"] == pytest.approx(1 - series["loss"] / series["baseline"])


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_validation_depends_on_the_weights_alone_not_on_the_seed_of_the_job(release_url: str, kind: str) -> None:
    stages = [
        build_pretraining(pin(pretraining(release_url, kind, seed=seed)), open_release(release_url), BACKEND) for seed in (0, 7)
    ]
    stages[1].model.load_state_dict(stages[0].model.state_dict())
    first, again, other = (validated(stage) for stage in (stages[0], stages[0], stages[1]))
    assert first == again == other
    assert stages[0].model.training


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("batch_size", [3, 16])
def test_numbers_that_are_means_over_rows_do_not_depend_on_the_size_of_a_batch(
    release_url: str, kind: str, batch_size: int
) -> None:
    """The contrastive loss does: there are fewer studies to be told from."""
    stages = [
        build_pretraining(pin(pretraining(release_url, kind, batch_size=size)), open_release(release_url), BACKEND)
        for size in (batch_size, 8)
    ]
    found, expected = (validated(stage) for stage in stages)
    same = [name for name in found if kind == "series" or name not in ("loss", "contrastive")]
    assert len(same) == 3
    assert {name: found[name] for name in same} == pytest.approx({name: expected[name] for name in same}, rel=1e-5)


class StopAfter:
    """Asks to stop from the given question on."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def requested(self) -> str | None:
        self.left -= 1
        return "a test" if self.left <= 0 else None


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_run_that_was_stopped_and_continued_gives_the_same_encoder(
    runs: dict[str, Path], release_url: str, kind: str, tmp_path: Path
) -> None:
    folder = begin(pretraining(release_url, kind), str(tmp_path / "run"))
    with pytest.raises(InterruptedRunError):
        attempt(folder.url, BACKEND, quiet(), StopAfter(2))
    assert run(pretraining(release_url, kind), tmp_path / "run").finished
    assert (tmp_path / "run/model/encoder.safetensors").read_bytes() == (runs[kind] / "model/encoder.safetensors").read_bytes()


def test_fine_tuning_starts_from_the_encoders_and_from_the_seed_elsewhere(runs: dict[str, Path], release_url: str) -> None:
    pretrained = {"cxr": str(runs["image"]), "vitals": str(runs["series"])}
    release = open_release(release_url)
    jobs = (pin(finetuning(release_url, pretrained=pretrained)), pin(finetuning(release_url)))
    started, plain = (build_finetuning(job, release, BACKEND.device).model for job in jobs if isinstance(job, FinetuneJob))
    backbones = next(module for module in started.modules() if isinstance(module, Backbones))
    for name, kind in (("cxr", "image"), ("vitals", "series")):
        expected = load_file(runs[kind] / "model" / "encoder.safetensors")
        found = backbones.encoders[module_name(name)].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
    untouched = plain.state_dict()
    changed = {name for name, value in started.state_dict().items() if not torch.equal(value, untouched[name])}
    assert changed
    assert all("m_cxr" in name or "m_vitals" in name for name in changed)


def test_a_fine_tuning_run_stores_which_encoder_it_started_from(runs: dict[str, Path], release_url: str, tmp_path: Path) -> None:
    assert run(finetuning(release_url, pretrained={"cxr": str(runs["image"])}), tmp_path / "run").finished
    digest = json.loads((runs["image"] / "model" / ENCODER_DESCRIPTION).read_text())["weights_sha256"]
    stored = parse_job((tmp_path / "run/job.yaml").read_text(), where="job.yaml")
    assert isinstance(stored, FinetuneJob)
    assert stored.pretrained == {"cxr": f"{runs['image']}@{digest}"}
    assert pin(stored) == stored


def test_an_encoder_that_was_trained_again_is_refused_by_a_run_that_started_from_the_old_one(
    runs: dict[str, Path], release_url: str, tmp_path: Path
) -> None:
    shutil.copytree(runs["image"], tmp_path / "pre")
    job = finetuning(release_url, pretrained={"cxr": str(tmp_path / "pre")})
    folder = begin(job, str(tmp_path / "fine"))
    Fence.take(folder.store)
    assert run(pretraining(release_url, "image", seed=5), tmp_path / "pre", fresh=True).finished
    with pytest.raises(SpecError, match="pre: expected the encoder [0-9a-f]{12}, found [0-9a-f]{12}. That run was trained again"):
        attempt(folder.url, BACKEND, quiet(), StopAfter(99))
    with pytest.raises(SpecError, match="another pretrained"):
        begin(job, str(tmp_path / "fine"))


def test_a_url_that_is_no_run_or_another_kind_of_run_or_unfinished_is_refused(release_url: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nowhere: expected a folder, found nothing"):
        pin_encoder(str(tmp_path / "nowhere"))
    with pytest.raises(SpecError, match="expected a run folder, found no job.yaml"):
        pin_encoder(str(tmp_path))
    begin(finetuning(release_url), str(tmp_path / "fine"))
    with pytest.raises(SpecError, match="fine: expected a pre-training run, found a run of kind finetune"):
        pin_encoder(str(tmp_path / "fine"))
    begin(pretraining(release_url, "image"), str(tmp_path / "begun"))
    with pytest.raises(SpecError, match="begun: expected a finished run, found one that is not. Finish it first: draf train"):
        pin_encoder(str(tmp_path / "begun"))


def test_a_damaged_encoder_is_found_when_it_is_loaded(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["series"], tmp_path / "pre")
    pinned = pin_encoder(str(tmp_path / "pre"))
    assert load_encoder(pinned).description.objective == "masked_values"
    weights = tmp_path / "pre/model" / ENCODER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(DataError, match="encoder.safetensors: expected sha256"):
        load_encoder(pinned)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": small_model("mean", width=16)}, "pretrained.cxr: model.width: expected 16, found 8"),
        ({"model": {"kind": "mean", "width": 8}}, "pretrained.cxr: encoder: widths"),
    ],
)
def test_a_job_with_another_encoder_is_refused(
    runs: dict[str, Path], release_url: str, changes: dict[str, Any], words: str
) -> None:
    job = pin(finetuning(release_url, pretrained={"cxr": str(runs["image"])}, **changes))
    assert isinstance(job, FinetuneJob)
    with pytest.raises(SpecError, match=words):
        build_finetuning(job, open_release(release_url), BACKEND.device)


def test_a_modality_that_is_not_there_or_of_another_kind_is_refused(runs: dict[str, Path], release_url: str) -> None:
    for name, words in (("ct", "pretrained: expected modalities of the release, found 'ct'"), ("vitals", "kind of vitals")):
        job = pin(finetuning(release_url, pretrained={name: str(runs["image"])}))
        assert isinstance(job, FinetuneJob)
        with pytest.raises(SpecError, match=words):
            build_finetuning(job, open_release(release_url), BACKEND.device)


@pytest.mark.parametrize("name", ["pretrain_synth", "pretrain_eicu"])
def test_the_jobs_in_the_repository_are_valid(name: str) -> None:
    job = load_job(Path(__file__).parents[2] / "jobs" / f"{name}.yaml")
    assert isinstance(job, PretrainJob)
    assert job.name == name


def test_the_encoder_of_the_synthetic_jobs_is_the_same() -> None:
    jobs = Path(__file__).parents[2] / "jobs"
    pretrain, finetune = load_job(jobs / "pretrain_synth.yaml"), load_job(jobs / "finetune_synth.yaml")
    assert isinstance(pretrain, PretrainJob)
    assert isinstance(finetune, FinetuneJob)
    assert (pretrain.encoder, pretrain.width) == (finetune.model.encoders.image, finetune.model.width)


def test_an_objective_of_another_name_is_refused_with_the_kinds_there_are(release_url: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"kind: pretrain\nname: x\nrelease: {release_url}\nobjective: {{kind: simclr, modality: cxr, tua: 0.5}}\n")
    with pytest.raises(SpecError, match="objective.tua: expected a known key, found 'tua'. Did you mean 'tau'"):
        load_job(path)

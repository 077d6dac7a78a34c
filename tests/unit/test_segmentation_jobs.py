"""Masks as the label of a job: how many there are, which are hidden, other heads beside them, what is exported."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bayesian_inputs import MASK, SIDE_OF, disc_batch, schema_of
from outlined_balls import SIDE, outlined_release
from PIL import Image
from safetensors.torch import load_file
from small_runs import silent, small_job
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.data.loader import SplitLoader
from draf_dist.data.normalise import Normaliser
from draf_dist.data.release import Release, open_release
from draf_dist.errors import SpecError
from draf_dist.evaluation.job import EvaluateJob
from draf_dist.evaluation.masks import MaskEvaluation, evaluate_masks
from draf_dist.models.export import load_model
from draf_dist.models.segmentation import BayesianUnet, BayesianUnetConfig
from draf_dist.objectives.bayesian import BayesianObjective, BayesianObjectiveConfig
from draf_dist.objectives.head_targets import head_targets
from draf_dist.schema.batch import MultiLabelTarget, SegmentationTarget
from draf_dist.schema.label import IGNORED, MultiLabelSpec, SegmentationSpec
from draf_dist.schema.modality import DataSchema, ImageSpec
from draf_dist.training.finetune import Finetuning, build_finetuning
from draf_dist.training.pin import pin
from draf_dist.training.pretrain_job import PretrainJob
from draf_dist.training.run import train
from draf_dist.training.torch_engine import OneProcess
from draf_dist.training.validate import validate

UNET = {"kind": "bayesian_unet", "widths": [4, 6], "groups": 2}
SHOWN = {"shown": {"kind": "multilabel", "name": "shown", "labels": ["bright", "dim"]}}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return open_release(outlined_release(tmp_path_factory.mktemp("data")))


def built(release: Release, *, model: dict[str, Any] | None = None, **changes: Any) -> Finetuning:
    job = pin(small_job(release.pinned_url, model={**UNET, **(model or {})}, **changes))
    return build_finetuning(job, release, CPU)  # type: ignore[arg-type]


def drawn(release: Release) -> int:
    """Training studies with a mask."""
    table = release.subjects()
    pairs = zip(table["label"].to_pylist(), table["split"].to_pylist(), strict=True)
    return sum(split == "train" and label == "mask" for label, split in pairs)


def test_the_divergence_is_per_study_that_has_a_mask(release: Release) -> None:
    objective = built(release).objective
    assert isinstance(objective, BayesianObjective)
    assert objective.num_train == drawn(release) < release.manifest.receipts["train"].count


def test_a_fraction_of_the_masks_is_taken_of_those_that_have_one(release: Release) -> None:
    stage = built(release, label_fraction=0.5, label_fraction_of="subjects", batch_size=24)
    assert stage.labels.num_studies == int(0.5 * drawn(release) + 0.5)
    _, batch = next(iter(stage.loader(OneProcess()).batches(0, 1)))
    hidden = stage.labelled(batch).target
    assert isinstance(hidden, SegmentationTarget)
    assert int(batch.target.observed.sum()) == drawn(release)
    assert int(hidden.observed.sum()) == stage.labels.num_studies
    assert (hidden.mask[~hidden.observed] == 0).all()


def test_a_run_with_another_head_trains_all_of_it_and_is_exported(release: Release, tmp_path: Path) -> None:
    job = small_job(release.pinned_url, model={**UNET, "heads": SHOWN}, epochs=1)
    assert train(job, str(tmp_path / "run"), console=silent()).finished
    assert '"shown_task"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    exported = load_model(tmp_path / "run" / "model")
    assert isinstance(exported.model, BayesianUnet)
    assert exported.model.tasks.keys() == {"ball", "shown"}
    assert "in every voxel of mr as one of: background, dim, bright" in (tmp_path / "run" / "model" / "README.md").read_text()
    start = built(release, model={"heads": SHOWN}).model.state_dict()
    unchanged = [name for name, value in exported.model.state_dict().items() if torch.equal(value, start[name])]
    assert unchanged == []


def test_a_head_of_labels_learns_which_structures_the_mask_shows() -> None:
    schema = schema_of(SegmentationSpec(name="organ", modality="scan", structures=("background", "disc", "ring")))
    heads = {"shown": MultiLabelSpec(name="shown", labels=("ring", "disc"))}
    batch = disc_batch(schema)
    mask = batch.target.mask.clone()
    mask[0], mask[1], mask[2, 0] = IGNORED, 2, 2
    observed = torch.tensor([True, True, True, False, True, True])
    batch = replace(batch, target=SegmentationTarget(torch.where(observed[:, None, None], mask, 0), observed))
    found = head_targets(heads, schema, {})["shown"](batch)
    assert isinstance(found, MultiLabelTarget)
    assert found.label.tolist() == [[False, False], [True, False], [True, True], [False, False], [False, True], [False, True]]
    assert found.observed.tolist() == [[bool(known)] * 2 for known in observed]


def test_a_mask_beside_a_class_is_learned_from_the_image_that_holds_it() -> None:
    """The label is a class and a second head outlines the disc: one backbone, both targets, each known for its own rows."""
    schema = schema_of(SIDE_OF, annotated=True)
    config = BayesianUnetConfig(modality="scan", widths=(4, 6), groups=2, heads={"organ": MASK})
    heads = head_targets(config.heads, schema, {"organ": "expert"})
    batch = disc_batch(schema)
    truth = batch.inputs["expert"][:, 0] > 0.5
    present = batch.present.clone()
    present[1, 1] = False
    # As images are normalised.
    batch = replace(batch, present=present, inputs={**batch.inputs, "expert": (batch.inputs["expert"] - 0.3) / 0.2})
    target = heads["organ"](batch)
    assert isinstance(target, SegmentationTarget)
    assert target.observed.tolist() == [True, False, True, True, True, True]
    assert torch.equal(target.mask[target.observed].bool(), truth[target.observed])
    torch.manual_seed(0)
    model = config.build(schema)
    objective = BayesianObjectiveConfig().build(modality="scan", num_train=10, num_steps=10, seed=0, heads=heads)
    terms = objective(model, batch, torch.arange(12).view(2, 6))
    assert {"task", "organ_dice", "organ_cross_entropy"} <= terms.keys()
    # Of six scans five are there; two of them have no class, another one no mask.
    assert [terms[name].weight.item() for name in ("task", "organ_cross_entropy")] == [4, 4]
    # The masks have a grid: the divergence is counted by voxel.
    assert terms["kl"].scale == pytest.approx(0.5 / (10 * 16 * 16))
    torch.stack([term.numerator for term in terms.values()]).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


TWO = SegmentationSpec(name="two", modality="scan", structures=("background", "disc", "ring"))


@pytest.mark.parametrize(
    ("heads", "masks", "words"),
    [
        (
            {"organ": MASK},
            {},
            "head_masks.organ: expected an image of the release, found none. Images: scan, expert",
        ),
        (
            {"organ": MASK},
            {"organ": "labs"},
            "head_masks.organ: expected an image of the release, found 'labs'",
        ),
        ({"two": TWO}, {"two": "expert"}, "model.heads.two: expected 2 structures, found 3"),
        ({}, {"organ": "expert"}, "objective.head_masks.organ: expected a head of the model, found none of this name"),
        (
            {"shown": MultiLabelSpec(name="shown", labels=("disc",))},
            {},
            "heads.shown: expected masks of an image, found disc",
        ),
    ],
)
def test_heads_without_a_target_are_refused(heads: dict[str, Any], masks: dict[str, str], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        head_targets(heads, schema_of(SIDE_OF, annotated=True), masks)


def with_small_map(side: int) -> DataSchema:
    schema = schema_of(SIDE_OF, annotated=True)
    small = ImageSpec(name="expert", channels=1, height=side, width=side)
    return schema.model_copy(update={"modalities": tuple(small if spec.name == "expert" else spec for spec in schema.modalities)})


def test_annotations_that_are_not_there_or_on_another_grid_are_refused_before_a_step() -> None:
    config = BayesianObjectiveConfig(clinical_map="expert", body_mask="bones")
    words = "objective.clinical_map: expected the grid of scan, 16 x 16, found expert with 8 x 8.*\n"
    words += "objective.body_mask: expected an image of the release, found 'bones'. Images: scan, expert, body"
    with pytest.raises(SpecError, match=words):
        config.check("scan", with_small_map(8))
    BayesianObjectiveConfig(clinical_map="expert", body_mask="body").check("scan", with_small_map(16))


def test_a_head_whose_masks_have_another_grid_is_refused() -> None:
    with pytest.raises(SpecError, match="head_masks.organ: expected the grid of scan, 16 x 16, found expert with 8 x 8"):
        head_targets({"organ": MASK}, with_small_map(8), {"organ": "expert"})


def test_it_starts_from_an_encoder_that_learned_from_the_volumes_without_labels(release: Release, tmp_path: Path) -> None:
    encoder = {"kind": "volume3d", "widths": UNET["widths"], "groups": UNET["groups"]}
    objective = {"kind": "simclr", "modality": "mr"}
    tree = {"name": "pre", "release": release.pinned_url, "objective": objective, "encoder": encoder, "batch_size": 8, "epochs": 1}
    assert train(PretrainJob.model_validate(tree), str(tmp_path / "pre"), console=silent()).finished
    weights = load_file(tmp_path / "pre" / "model" / "encoder.safetensors")
    started = built(release, pretrained={"mr": str(tmp_path / "pre")}).model
    assert isinstance(started, BayesianUnet)
    for name, value in started.encoder.state_dict().items():
        assert torch.equal(value, weights[name]), name
    # The region head tells 27 places of a volume.
    net = PretrainJob.model_validate(tree).objective.network(release.schema, None, 8)
    assert net.region.out_features == 27


def finished_run(release: Release, out: Path) -> Path:
    job = small_job(release.pinned_url, model=UNET, epochs=4, optimizer={"learning_rate": 0.01}, passes_eval=5)
    assert train(job, str(out), console=silent()).finished
    return out


@pytest.fixture(scope="module")
def finished(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(release, tmp_path_factory.mktemp("finished") / "run")


def test_an_evaluation_of_volumes_delivered_whole_is_that_of_validation(tmp_path: Path) -> None:
    release = open_release(outlined_release(tmp_path / "data", patch=SIDE))
    out = finished_run(release, tmp_path / "run")
    found = evaluate_masks(str(out), EvaluateJob(splits=("test",), passes=5, bootstrap=20, batch_size=3))
    assert found is not None
    (split,) = found.splits
    exported = load_model(out / "model")
    normalise = Normaliser(release.schema, exported.stats)
    numbers = validate(exported.model, SplitLoader(release, "test", 8).batches(), normalise, 5)
    assert split.nll.value == pytest.approx(numbers["nll"])
    assert [split.dice[name].value for name in ("mean of structures", "dim", "bright")] == pytest.approx(
        [numbers[name] for name in ("dice", "dice_1", "dice_2")]
    )
    assert split.zones["everywhere"].error_auroc["entropy"].value == pytest.approx(numbers["error_auroc"])
    assert split.nll.low is not None
    assert split.nll.high is not None
    assert split.nll.low <= numbers["nll"] <= split.nll.high
    assert MaskEvaluation.model_validate_json((out / "masks.json").read_text()) == found


def test_voxels_of_all_studies_together_count_by_their_number(finished: Path) -> None:
    """Pooled: Dice of the counts of all studies, not the mean of theirs."""
    found = evaluate_masks(str(finished), EvaluateJob(splits=("test",), passes=2, bootstrap=0))
    assert found is not None
    (split,) = found.splits
    # Every voxel of a volume in patches once, but for the slice of which nobody says what it is.
    assert split.num_voxels == split.num_studies * SIDE * SIDE * (SIDE - 1)
    means = [split.dice[name].value for name in ("dim", "bright")]
    assert list(split.pooled.dice.values()) != means
    assert all(value is not None and 0 <= value <= 1 for value in [*split.pooled.dice.values(), *split.pooled.error_auroc.values()])


def test_every_study_is_written_and_the_split_is_their_mean(finished: Path) -> None:
    found = evaluate_masks(str(finished), EvaluateJob(splits=("test",), passes=2, bootstrap=0))
    assert found is not None
    (split,) = found.splits
    assert len({study.uid for study in split.studies}) == split.num_studies > 1

    def mean(values: list[float | None]) -> float:
        known = [value for value in values if value is not None]
        return sum(known) / len(known)

    for name, estimate in split.dice.items():
        assert estimate.value == pytest.approx(mean([study.dice[name] for study in split.studies])), name
    for zone, scores in split.zones.items():
        for name, estimate in scores.error_auroc.items():
            assert estimate.value == pytest.approx(mean([study.error_auroc[zone][name] for study in split.studies]))
    everywhere, structures, borders = (split.zones[zone] for zone in ("everywhere", "structures", "borders"))
    assert everywhere.num_voxels == split.num_voxels > max(structures.num_voxels, borders.num_voxels)
    # No voxel outside can be wrong: the same errors among fewer voxels.
    assert structures.error_rate.value is not None
    assert everywhere.error_rate.value is not None
    assert structures.error_rate.value > everywhere.error_rate.value


def test_the_command_shows_dice_by_structure(finished: Path) -> None:
    shown = CliRunner().invoke(app, ["evaluate", str(finished), "--set", "passes=2", "--set", "bootstrap=0"])
    assert shown.exit_code == 0, shown.output
    assert "Dice, bright" in shown.output
    assert "AUROC of errors by epistemic" in shown.output
    assert "AUROC of errors by epistemic, borders" in shown.output
    assert "masks.png" in shown.output
    picture = Image.open(finished / "masks.png")
    assert picture.format == "PNG"
    assert picture.width > picture.height


def test_another_release_leaves_the_folder_of_the_run_alone(release: Release, tmp_path: Path) -> None:
    out = finished_run(release, tmp_path / "run")
    shown = CliRunner().invoke(
        app, ["evaluate", str(out), "--release", release.pinned_url, "--set", "passes=2", "--set", "bootstrap=0"]
    )
    assert shown.exit_code == 0, shown.output
    assert not (out / "masks.json").exists()
    assert not (out / "masks.png").exists()


def test_a_run_that_starts_anew_leaves_no_masks_of_the_one_before(release: Release, tmp_path: Path) -> None:
    out = finished_run(release, tmp_path / "run")
    assert evaluate_masks(str(out), EvaluateJob(splits=("test",), passes=2, bootstrap=0)) is not None
    assert (out / "masks.json").exists()
    train(small_job(release.pinned_url, model=UNET, epochs=1), str(out), fresh=True, console=silent())
    assert not (out / "masks.json").exists()
    assert not (out / "masks.png").exists()

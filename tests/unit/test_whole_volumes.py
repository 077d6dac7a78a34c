"""Whole volumes by patches: nothing is lost, nothing is counted twice, and scores are those of the volume in one piece."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mask_export import NOISE, NUM_PATIENTS, export, raw_mask, save, structures, write_export
from sharded import copied
from torch import Tensor

from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release
from draf_dist.data.whole_volumes import WholeVolume, whole_volumes
from draf_dist.errors import DataError, SpecError
from draf_dist.evaluation.whole_masks import ZONES, Passes, near_borders, predicted_tiles, volume_score, whole_maps
from draf_dist.metrics.segmentation import ErrorDetection, Overlap
from draf_dist.models.link import link_of
from draf_dist.schema.batch import Batch, SegmentationTarget
from draf_dist.schema.label import IGNORED, LabelSpec
from draf_dist.schema.release import SPLITS

KEY = b"sixteen or more bytes of key"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    raw: Path = tmp_path_factory.mktemp("raw")
    write_export(raw)
    return prepare(export(raw, label={"others": "ignored"}), str(tmp_path_factory.mktemp("out")), subject_key=KEY)


def volumes(release: Release, *, overlap: int = 2, rank: int = 0, world: int = 1) -> list[WholeVolume]:
    return [one for split in SPLITS for one in whole_volumes(release, split, overlap=overlap, rank=rank, world=world)]


def outlined(release: Release) -> list[WholeVolume]:
    return [volume for volume in volumes(release) if volume.mask is not None]


def test_the_tiles_of_a_volume_are_the_whole_of_it(release: Release) -> None:
    found = volumes(release)
    assert len(found) == NUM_PATIENTS - 1
    assert sum(volume.mask is None for volume in found) == 1
    for volume in found:
        image, mask = np.zeros(volume.shape, dtype=np.int16), np.zeros(volume.shape, dtype=np.int64)
        for tiles, batch in volume.batches(3):
            assert isinstance(batch.target, SegmentationTarget)
            assert batch.num_rows == len(tiles) <= 3
            assert batch.target.observed.tolist() == [volume.mask is not None] * len(tiles)
            for row, tile in enumerate(tiles):
                image[tile.place] = batch.inputs["mr"][row, 0].numpy()[tile.own]
                mask[tile.place] = batch.target.mask[row].numpy()[tile.own]
        assert np.array_equal(image, volume.volumes["mr"][0])
        expected = np.where(image // NOISE == 9, IGNORED, structures(image // NOISE))
        assert np.array_equal(mask, expected if volume.mask is not None else np.zeros_like(mask))


def test_a_tile_has_the_rest_of_its_study(release: Release) -> None:
    for volume in volumes(release):
        for tiles, batch in volume.batches(4):
            assert batch.uid.tolist() == volume.row.uid.tolist() * len(tiles)
            assert batch.present.tolist() == volume.row.present.tolist() * len(tiles)
            assert batch.inputs["clinic"].values.shape == (len(tiles), 1, 1)


def test_several_ranks_share_the_volumes(release: Release) -> None:
    def uids(**cut: int) -> list[int]:
        return [int(volume.row.uid[0]) for volume in volumes(release, **cut)]

    assert sorted(uids(rank=0, world=2) + uids(rank=1, world=2)) == sorted(uids())
    assert uids(rank=0, world=2)
    assert uids(rank=1, world=2)


def test_volumes_on_the_same_voxels_are_cut_alike_and_others_are_not(tmp_path: Path) -> None:
    write_export(tmp_path / "raw")
    for i in range(NUM_PATIENTS):
        save(tmp_path / f"raw/north/pd/{i}.nii.gz", raw_mask(i).astype(np.int16))
        save(tmp_path / f"raw/north/small/{i}.nii.gz", raw_mask(i)[2:, 2:, 2:].astype(np.int16))
    source = export(tmp_path / "raw")
    mr, clinic = source.card.modalities
    more = [mr.model_copy(update={"name": name, "path": f"{{site}}/{name}/{{file}}"}) for name in ("pd", "small")]
    card = source.card.model_copy(update={"modalities": (mr, clinic, *more)})
    release = prepare(type(source)(card, tmp_path / "raw"), str(tmp_path / "out"), subject_key=KEY)
    for volume in volumes(release):
        assert set(volume.volumes) == {"mr", "pd"}
        for tiles, batch in volume.batches(5):
            mr_patch, pd_patch, small = (batch.inputs[name] for name in ("mr", "pd", "small"))
            assert isinstance(mr_patch, Tensor)
            assert isinstance(small, Tensor)
            assert torch.equal(mr_patch // NOISE, pd_patch)
            assert torch.equal(small, small[:1].expand(len(tiles), *small.shape[1:]))


def test_a_label_that_is_no_mask_has_no_whole_volumes(release: Release) -> None:
    schema = release.schema.model_copy(update={"label": LabelSpec(name="sick", classes=("no", "yes"))})
    with pytest.raises(SpecError, match="label sick: expected masks"):
        next(whole_volumes(replace(release, schema=schema), "train"))


def test_a_damaged_mask_is_named(release: Release, tmp_path: Path) -> None:
    copy = copied(release, tmp_path / "copy")
    for path in (tmp_path / "copy/shards").rglob("*.tar"):
        content = path.read_bytes()
        path.write_bytes(content.replace(b'"format":"draf-volume-1"', b'"format":"draf-volume-2"'))
    with pytest.raises(DataError, match="json: expected .* found"):
        volumes(copy)


# What is counted.


def model(wrong: float, num_passes: int = 3) -> Passes:
    """Passes that name the structure that the image shows, but in a share of places another, and waver there."""

    def passes(batch: Batch) -> Iterable[Tensor]:
        image = batch.inputs["mr"]
        assert isinstance(image, Tensor)
        truth = torch.from_numpy(structures(image[:, 0].numpy() // NOISE))
        # By the noise in the image: a function of the voxel, whatever patch it is seen in.
        errs = (image[:, 0] * 7919 % 1000).float() < 1000 * wrong
        for number in range(num_passes):
            right = torch.nn.functional.one_hot(truth, 3).movedim(-1, 1).float() * 6
            other = torch.nn.functional.one_hot((truth + 1) % 3, 3).movedim(-1, 1).float() * (3 + 3 * number)
            yield torch.where(errs.unsqueeze(1), other, right)

    return passes


def test_a_model_that_is_right_has_a_dice_of_one_and_no_errors(release: Release) -> None:
    link = link_of(release.schema.label)
    passes = model(0.0)
    for volume in outlined(release):
        score = volume_score(volume, predicted_tiles(volume, passes, link, 4), 3)
        assert score.study.overlap.dice.tolist() == [1.0, 1.0, 1.0]
        assert all(np.isnan(score.errors[zone]["epistemic"].auroc) for zone in ZONES)
        assert score.study.overlap.true.sum() == (volume.mask != IGNORED).sum()
        assert score.study.uid == int(volume.row.uid[0])


@pytest.mark.parametrize("num_rows", [1, 7])
def test_scores_of_tiles_are_those_of_the_whole_volume(release: Release, num_rows: int) -> None:
    link = link_of(release.schema.label)
    passes = model(0.2)
    for volume in outlined(release):
        assert volume.mask is not None
        tiles = list(predicted_tiles(volume, passes, link, num_rows))
        score, maps, truth = volume_score(volume, tiles, 3), whole_maps(volume, tiles), volume.mask[0].astype(np.int64)
        known = truth != IGNORED
        whole = Overlap.of(maps.predicted[known], truth[known], 3)
        assert np.array_equal(score.study.overlap.dice, whole.dice)
        assert 0.5 < score.study.overlap.dice[1] < 0.95
        places = {
            "everywhere": known,
            "structures": known & ((truth > 0) | (maps.predicted > 0)),
            "borders": near_borders(volume.mask[0]),
        }
        for zone, place in places.items():
            assert 0 < place.sum() <= known.sum()
            for name, values in maps.uncertainty.items():
                found = ErrorDetection.of(values[place], maps.predicted[place] != truth[place])
                assert score.errors[zone][name].auroc == found.auroc
                assert score.errors[zone][name].num_voxels == place.sum()
        # It wavers where it errs, and nowhere else.
        assert score.errors["everywhere"]["epistemic"].auroc > 0.99
        assert score.study.errors is score.errors["everywhere"]
        assert score.study.nll > 0.1


def test_near_a_border_is_what_has_another_structure_within_reach() -> None:
    mask = np.zeros((1, 1, 12), dtype=np.int16)
    mask[..., 5:] = 2
    assert np.flatnonzero(near_borders(mask, reach=2)).tolist() == [3, 4, 5, 6]
    # What nobody says is no structure: no border to it, and none within it.
    mask[..., 9:] = IGNORED
    assert np.flatnonzero(near_borders(mask, reach=2)).tolist() == [3, 4, 5, 6]
    mask[..., 5:] = IGNORED
    assert not near_borders(mask, reach=2).any()


def test_reach_counts_along_every_axis() -> None:
    mask = np.zeros((7, 7, 7), dtype=np.int16)
    mask[3, 3, 3] = 1
    expected = np.zeros_like(mask, dtype=bool)
    expected[1:6, 1:6, 1:6] = True
    assert np.array_equal(near_borders(mask, reach=2), expected)


def test_a_volume_without_a_mask_has_maps_but_no_score(release: Release) -> None:
    link = link_of(release.schema.label)
    passes = model(0.2)
    (volume,) = [one for one in volumes(release) if one.mask is None]
    tiles = list(predicted_tiles(volume, passes, link, 4))
    assert whole_maps(volume, tiles).predicted.shape == volume.shape
    with pytest.raises(ValueError, match="has no score"):
        volume_score(volume, tiles, 3)

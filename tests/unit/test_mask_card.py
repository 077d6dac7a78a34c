"""The card of a segmentation: what values mean, and what can't be meant."""

from pathlib import Path

import mask_export
import numpy as np
import pytest

from draf_dist.errors import SpecError
from draf_dist.schema.label import IGNORED, SegmentationSpec
from draf_dist.schema.modality import DataSchema, VolumeSpec
from draf_dist.sources.card_segmentation import SegmentationCard
from draf_dist.sources.images import ImageError
from draf_dist.sources.mask_files import structures


def label(**changes: object) -> SegmentationCard:
    found = mask_export.card(label=changes).chosen_label
    assert isinstance(found, SegmentationCard)
    return found


def test_many_values_merge_into_few_structures() -> None:
    card = label(structures={"ventricles": [4, "49-52"], "cortex": ["100-207", 31]}, background=[0, 1], others=None)
    assert card.spec("regions") == SegmentationSpec(
        name="regions", modality="mr", structures=("background", "ventricles", "cortex")
    )
    raw = np.array([[0, 1, 4, 49], [52, 100, 207, 31]], dtype=np.int16)
    assert structures(raw, card).tolist() == [[0, 0, 1, 1], [1, 2, 2, 2]]
    assert structures(raw, card).dtype == np.int16


def test_all_other_values_are_what_the_card_says() -> None:
    raw = np.array([5.0, 0.0, 99.0, 7.0], dtype=np.float32)
    assert structures(raw, label(others="background")).tolist() == [1, 0, 0, 2]
    assert structures(raw, label(others="ignored")).tolist() == [1, 0, IGNORED, 2]


def test_a_value_without_a_meaning_is_refused_with_the_values_and_what_to_say() -> None:
    raw = np.array([0, 5, 8, 9, 300], dtype=np.int16)
    with pytest.raises(ImageError, match=r"unmapped value: the mask has 8, 9, 300, of which .* `others: ignored`"):
        structures(raw, label(others=None))
    with pytest.raises(ImageError, match="100, 101, 102, 103, 104, 105, 106, 107 and 92 more"):
        structures(np.arange(100, 200).astype(np.int16), label(others=None))


@pytest.mark.parametrize("values", [[0.0, 0.5], [0.0, np.nan], [-1.0, 0.0], [0.0, 2.0**25]])
def test_an_image_in_place_of_a_mask_is_refused(values: list[float]) -> None:
    with pytest.raises(ImageError, match="bad mask: .* is this an image"):
        structures(np.array(values, dtype=np.float32), label())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"structures": {"inner": [5, 6], "outer": ["6-9"]}}, "stand twice: 6"),
        ({"structures": {"inner": [0]}}, "stand twice: 0"),
        ({"structures": {"background": [0]}}, "a structure named background"),
        ({"structures": {"inner": []}}, "no values for inner"),
        ({"structures": {}}, "at least 1 item"),
        ({"structures": {"inner": ["9-5"]}}, "found 9-5"),
        ({"structures": {"inner": ["1-99999"]}}, "found 1-99999"),
        ({"structures": {"inner": ["five"]}}, "should match pattern"),
        ({"structures": {"inner": [-5]}}, "should match pattern"),
        ({"others": "nothing"}, "'background' or 'ignored'"),
        ({"modality": None}, "modality"),
        ({"path": None}, "path"),
        ({"mask": "x"}, "mask"),
    ],
)
def test_a_label_that_contradicts_itself_is_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        label(**changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"modality": "ct"}, "labels: parts: modality: expected one of the modalities of kind volume, found 'ct'"),
        ({"modality": "clinic"}, "kind volume, found 'clinic'. There are: mr"),
        ({"path": "{site}/mask.nii"}, "a path with {file}"),
        ({"path": "../{file}"}, "inside the raw folder"),
        ({"path": "{subject}/{file}"}, "{site} and {file} only"),
        ({"path": "{site}/mr/{file}"}, "other files than those of the images"),
    ],
)
def test_a_label_that_does_not_fit_the_rest_of_the_card_is_refused(
    tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    with pytest.raises(SpecError, match=problem):
        mask_export.export(tmp_path, label=changes)


def test_a_label_of_the_name_of_a_modality_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="labels: parts: expected a name that no modality has"):
        mask_export.export(tmp_path, clinic={"name": "parts"})


def test_masks_are_stored_on_the_grid_of_their_image() -> None:
    schema = mask_export.card(
        mr={"channels": 2, "dtype": "float16", "spacing_mm": [3, 2, 1], "clip": [0, 5], "fill": 7}
    ).data_schema()
    image, mask = schema.modalities[0], schema.mask
    assert isinstance(image, VolumeSpec)
    assert mask is not None
    assert (mask.name, mask.channels, mask.dtype, mask.fill, mask.clip) == ("parts", 1, "int16", 0, None)
    assert (mask.spacing_mm, mask.patch, mask.chunk) == (image.spacing_mm, image.patch, image.chunk)
    assert schema.stored_names == ("mr", "clinic", "parts")
    assert DataSchema.model_validate_json(schema.model_dump_json()) == schema


def test_masks_of_what_is_no_volume_are_refused() -> None:
    schema = mask_export.card().data_schema()
    other = schema.model_copy(update={"label": SegmentationSpec(name="parts", modality="clinic", structures=("a", "b"))})
    with pytest.raises(SpecError, match="label parts: expected masks of a volume, found 'clinic'"):
        other.mask  # noqa: B018

"""The exchange form of an encoder: what is written is what is read, and nothing else is."""

import json
from typing import Any

import pytest
import torch
from model_inputs import SMALL_ENCODERS, small_schema, small_stats
from torch import nn

from draf_dist.errors import DataError, SpecError
from draf_dist.models.encoder_export import (
    ENCODER_CARD,
    ENCODER_DESCRIPTION,
    ENCODER_FILES,
    ENCODER_STATS,
    ENCODER_WEIGHTS,
    encoder_files,
    read_encoder,
)
from draf_dist.models.encoders import EncoderConfig, Image2dConfig, SeriesTransformerConfig
from draf_dist.schema.modality import ImageSpec, ModalitySpec, SeriesSpec

CXR, VITALS, LABS = small_schema().modalities


def encoder_of(spec: ModalitySpec) -> nn.Module:
    torch.manual_seed(0)
    return SMALL_ENCODERS.of(spec).build(spec, 16)


def files_of(spec: ModalitySpec) -> dict[str, bytes]:
    stats = small_stats()
    config = SMALL_ENCODERS.of(spec)
    made = encoder_files(
        encoder_of(spec), config=config, spec=spec, width=16, objective="simclr", release="data/x@0123", stats=stats
    )
    assert made == encoder_files(
        encoder_of(spec), config=config, spec=spec, width=16, objective="simclr", release="data/x@0123", stats=stats
    )
    return made


@pytest.mark.parametrize("spec", [CXR, VITALS, LABS], ids=lambda spec: spec.kind)
def test_what_was_written_is_read_bit_for_bit(spec: ModalitySpec) -> None:
    files = files_of(spec)
    assert set(files) == {*ENCODER_FILES, ENCODER_CARD}
    found = read_encoder(files, where="there")
    assert found.description.modality == spec
    assert (found.description.width, found.description.objective, found.description.release) == (16, "simclr", "data/x@0123")
    assert found.stats == small_stats()
    expected = encoder_of(spec).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.encoder.state_dict().items())


@pytest.mark.parametrize("name", ENCODER_FILES)
def test_a_missing_file_is_named(name: str) -> None:
    files = {key: value for key, value in files_of(CXR).items() if key != name}
    with pytest.raises(DataError, match=f"there: expected a pre-trained encoder, found no {name}"):
        read_encoder(files, where="there")


@pytest.mark.parametrize("name", [ENCODER_WEIGHTS, ENCODER_STATS])
def test_one_changed_byte_is_found(name: str) -> None:
    files = files_of(CXR)
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    with pytest.raises(DataError, match=f"there/{name}: expected sha256"):
        read_encoder(files, where="there")


def test_a_description_of_something_else_is_refused() -> None:
    files = files_of(CXR)
    files[ENCODER_DESCRIPTION] = json.dumps({"format": 2}).encode()
    with pytest.raises(DataError, match=f"there/{ENCODER_DESCRIPTION}: expected the description of an encoder"):
        read_encoder(files, where="there")


def with_config(description: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({**description, **changes}).encode()


def test_weights_of_another_width_are_refused_with_both_shapes() -> None:
    files = files_of(CXR)
    files[ENCODER_DESCRIPTION] = with_config(json.loads(files[ENCODER_DESCRIPTION]), width=8)
    with pytest.raises(DataError, match=r"projection.linear.weight: expected float32 \(8, 16\), found float32 \(16, 16\)"):
        read_encoder(files, where="there")


IMAGE, SERIES = SMALL_ENCODERS.image, SMALL_ENCODERS.series
assert isinstance(CXR, ImageSpec)
assert isinstance(VITALS, SeriesSpec)
OTHER_UNIT = tuple(one.model_copy(update={"unit": "mmHg"}) if one.name == "v1" else one for one in VITALS.variables)


@pytest.mark.parametrize(
    ("pretrained", "spec", "config", "width", "words"),
    [
        (CXR, VITALS, SERIES, 16, "kind of vitals: expected series, found image"),
        (CXR, CXR.model_copy(update={"height": 24}), IMAGE, 16, "size of cxr: expected 1 x 24 x 12, found 1 x 12 x 12"),
        (CXR, CXR, Image2dConfig(widths=(4, 8, 16), groups=2), 16, r"encoder: widths: expected \[4, 8, 16\], found \[4, 8\]"),
        (CXR, CXR, IMAGE, 32, "model.width: expected 32, found 16. Give the job the encoder that was pre-trained"),
        (VITALS, VITALS.model_copy(update={"num_steps": 9}), SERIES, 16, "steps of vitals: expected 9 of 1 h, found 5 of 1 h"),
        (
            VITALS,
            VITALS.model_copy(update={"variables": OTHER_UNIT}),
            SERIES,
            16,
            r"expected v0 \[1\], v1 \[mmHg\], v2 \[1\], found",
        ),
        (VITALS, VITALS, SeriesTransformerConfig(hidden=8, heads=2, dropout=0.2), 16, "encoder: dropout: expected 0.2, found 0.1"),
    ],
)
def test_an_encoder_that_is_not_the_job_s_is_refused_with_what_differs(
    pretrained: ModalitySpec, spec: ModalitySpec, config: EncoderConfig, width: int, words: str
) -> None:
    description = read_encoder(files_of(pretrained), where="there").description
    with pytest.raises(SpecError, match=words):
        description.check_fits(spec, config, width, where="pretrained.x")


def test_the_same_encoder_fits_under_another_name_and_with_other_plausible_ranges() -> None:
    description = read_encoder(files_of(VITALS), where="there").description
    variables = tuple(one.model_copy(update={"low": 1.0, "high": 9.0}) for one in VITALS.variables)
    description.check_fits(VITALS.model_copy(update={"name": "monitor", "variables": variables}), SERIES, 16, where="pretrained.x")


def test_all_differences_are_told_at_once() -> None:
    description = read_encoder(files_of(CXR), where="there").description
    with pytest.raises(SpecError, match="widths.*\n.*model.width"):
        description.check_fits(CXR, Image2dConfig(widths=(8,), groups=2), 32, where="pretrained.cxr")

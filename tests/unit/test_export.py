"""The exchange form: what is written, and that nothing bad is taken for a model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_inputs import SMALL_ENCODERS, small_schema, small_stats
from safetensors.torch import load, save
from torch import Tensor

from draf_dist.errors import DataError, SpecError
from draf_dist.models.build import build_model
from draf_dist.models.export import DESCRIPTION, STATS, WEIGHTS, load_model, model_files, save_model
from draf_dist.models.fusion.draf import DrafConfig

SCHEMA = small_schema()
CONFIG = DrafConfig(width=8, encoders=SMALL_ENCODERS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", build_model(CONFIG, SCHEMA, seed=0), CONFIG, SCHEMA, small_stats())
    return tmp_path / "model"


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes tensors and mends the digest, so that only names and shapes can give it away."""
    import hashlib

    tensors = load((folder / WEIGHTS).read_bytes())
    change(tensors)
    content = save(tensors)
    (folder / WEIGHTS).write_bytes(content)
    description = json.loads((folder / DESCRIPTION).read_text())
    description["weights_sha256"] = hashlib.sha256(content).hexdigest()
    (folder / DESCRIPTION).write_text(json.dumps(description))


def test_folder_holds_four_files_and_no_pickle(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", DESCRIPTION, WEIGHTS, STATS]
    assert not any(path.read_bytes().startswith((b"\x80", b"PK")) for path in folder.iterdir())
    assert "cxr" in (folder / "README.md").read_text()


def test_the_card_tells_held_out_sites_from_those_of_training() -> None:
    schema = SCHEMA.model_copy(update={"sites": ("north", "south", "west")})
    model = build_model(CONFIG, schema, seed=0)
    known = model_files(model, CONFIG, schema, small_stats(), ("north", "west"))["README.md"].decode()
    assert "Trained on 2 site(s): north, west. Not trained on, though in its release: south." in known
    assert "Trained on" not in model_files(model, CONFIG, schema, small_stats())["README.md"].decode()


def test_the_same_model_gives_the_same_bytes() -> None:
    files = [model_files(build_model(CONFIG, SCHEMA, seed=0), CONFIG, SCHEMA, small_stats()) for _ in range(2)]
    assert files[0] == files[1]


def test_learned_and_calibrated_values_come_back(folder: Path) -> None:
    model = build_model(CONFIG, SCHEMA, seed=1)
    model.weights.u_scale.fill_(0.03)
    save_model(folder, model, CONFIG, SCHEMA, small_stats())
    loaded = load_model(folder).model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_a_folder_that_is_not_there_is_a_wrong_path(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such folder"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [WEIGHTS, DESCRIPTION, STATS])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"found no {name}"):
        load_model(folder)


@pytest.mark.parametrize("name", [WEIGHTS, STATS])
def test_a_flipped_bit_is_found(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(DataError, match=f"{name}: expected sha256"):
        load_model(folder)


def test_all_tensors_that_do_not_fit_are_reported_together(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["head.layers.0.bias"]
        tensors["head.layers.0.weight"] = torch.zeros(3, 8)
        tensors["corruption_head.bias"] = tensors["corruption_head.bias"].double()
        tensors["surplus"] = torch.zeros(1)

    rewrite_weights(folder, change)
    with pytest.raises(DataError) as caught:
        load_model(folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "head.layers.0.bias: expected a tensor, found none" in lines[0]
    assert "surplus: expected no such tensor, found one" in lines[1]
    assert "corruption_head.bias: expected float32 (3, 1), found float64 (3, 1)" in lines[2]
    assert "head.layers.0.weight: expected float32 (8, 8), found float32 (3, 8)" in lines[3]


def test_a_file_that_is_no_safetensors_is_refused(folder: Path) -> None:
    import hashlib

    (folder / WEIGHTS).write_bytes(b"not tensors")
    description = json.loads((folder / DESCRIPTION).read_text())
    description["weights_sha256"] = hashlib.sha256(b"not tensors").hexdigest()
    (folder / DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(DataError, match="expected a safetensors file"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format=2), "format"),
        (lambda d: d["config"].update(kind="oracle"), "config"),
        (lambda d: d["config"].update(alpah=3), "alpah"),
        (lambda d: d["data_schema"]["label"].update(name="other"), "a schema with its own digest"),
    ],
)
def test_a_description_that_was_edited_is_refused(folder: Path, change: Callable[[dict[str, object]], None], words: str) -> None:
    description = json.loads((folder / DESCRIPTION).read_text())
    change(description)
    (folder / DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(DataError, match=words):
        load_model(folder)


def test_data_of_another_schema_are_refused_but_other_sites_are_welcome(folder: Path) -> None:
    exported = load_model(folder)
    exported.check_schema(SCHEMA.model_copy(update={"sites": ("west",)}), where="release x")
    with pytest.raises(DataError, match="release x: expected modalities cxr, vitals, labs"):
        exported.check_schema(SCHEMA.model_copy(update={"modalities": SCHEMA.modalities[::-1]}), where="release x")

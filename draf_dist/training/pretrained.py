"""Fine-tuning that starts from pre-trained encoders: which ones, pinned before a run begins, and loaded at every attempt."""

from torch import nn

from draf_dist.errors import SpecError, explain, together
from draf_dist.models.backbones import Backbones, module_name
from draf_dist.models.encoder_export import ENCODER_DESCRIPTION, ENCODER_FILES, ExportedEncoder, read_description, read_encoder
from draf_dist.models.segmentation import BayesianUnet
from draf_dist.schema.modality import DataSchema
from draf_dist.training.earlier_run import check_pin, finished_run, split_pin
from draf_dist.training.run_folder import MODEL, RunFolder


def pin_encoder(url: str) -> str:
    """URL@<sha256 of encoder.safetensors> of the finished pre-training run at a URL, which may be pinned already.

    Raises:
        SpecError: there is no run, it is of another kind, it is not finished, or it has another encoder than the pinned one.
        DataError: its description can't be read.
    """
    place, wanted = split_pin(url)
    run = _finished(place)
    where = run.store.where(f"{MODEL}/{ENCODER_DESCRIPTION}")
    found = read_description(run.store.read(f"{MODEL}/{ENCODER_DESCRIPTION}"), where=where).weights_sha256
    check_pin(place, wanted, found, what="encoder")
    return f"{run.url}@{found}"


def load_encoder(pinned_url: str) -> ExportedEncoder:
    """The encoder of a URL from pin_encoder.

    Raises:
        SpecError: as pin_encoder.
        DataError: a file of it is missing or damaged.
    """
    place, _ = split_pin(pin_encoder(pinned_url))
    store = _finished(place).store
    files = {name: store.read(f"{MODEL}/{name}") for name in ENCODER_FILES if store.exists(f"{MODEL}/{name}")}
    return read_encoder(files, where=store.where(MODEL))


def start_from(model: nn.Module, pretrained: dict[str, str], schema: DataSchema) -> None:
    """Copies pre-trained parameters into the backbones of a new model; everything else stays as the seed made it.

    pretrained: modality -> pinned URL.

    Raises:
        SpecError: a model without encoders; a modality that the release does not have, or an encoder that does not fit it. See also
            load_encoder.
    """
    if isinstance(model, BayesianUnet):
        _start_unet(model, pretrained, schema)
        return
    specs = {spec.name: spec for spec in schema.modalities}
    places = [module for module in model.modules() if isinstance(module, Backbones)]
    if pretrained and not places:
        remedy = "Leave `pretrained` out, or choose a model with encoders."
        raise SpecError(explain("pretrained", expected="a model with encoders", found="one that reads raw inputs", remedy=remedy))
    for name, url in pretrained.items():
        if name not in specs:
            remedy = f"Known: {', '.join(specs)}."
            raise SpecError(explain("pretrained", expected="modalities of the release", found=repr(name), remedy=remedy))
        exported = load_encoder(url)
        for backbones in places:
            encoder = backbones.choice.of(specs[name])
            exported.description.check_fits(specs[name], encoder, backbones.width, where=f"pretrained.{name}")
            backbones.encoders[module_name(name)].load_state_dict(exported.encoder.state_dict())


def _start_unet(model: BayesianUnet, pretrained: dict[str, str], schema: DataSchema) -> None:
    """The same for the encoder within a U-Net, which has no projection: the size of the images does not matter to it."""
    for name, url in pretrained.items():
        if name != model.modality:
            remedy = f"Write `pretrained: {{{model.modality}: ...}}`."
            raise SpecError(explain("pretrained", expected="the modality that the model reads", found=repr(name), remedy=remedy))
        exported = load_encoder(url)
        spec = model.config.image_of(schema)
        wanted = {"channels": spec.channels, **model.config.encoder_of(spec).model_dump(include={"kind", "widths", "groups"})}
        there = {"channels": getattr(exported.description.modality, "channels", None), **exported.description.encoder.model_dump()}
        remedy = "Give the model the widths and groups of the encoder, or pre-train this one."
        problems = [
            explain(f"pretrained.{name}: {key}", expected=str(value), found=str(there.get(key)), remedy=remedy)
            for key, value in wanted.items()
            if there.get(key) != value
        ]
        if problems:
            raise SpecError(together(problems))
        model.start_encoder(exported.encoder.state_dict())


def _finished(url: str) -> RunFolder:
    return finished_run(url, kind="pretrain", what="pre-training", description=ENCODER_DESCRIPTION)

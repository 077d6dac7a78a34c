"""What can be checked of a campaign before a trial is trained."""

import math
from itertools import product
from typing import Any

from draf_dist.data.release import open_release
from draf_dist.errors import SpecError, explain, together
from draf_dist.objectives.pretrain_modality import encoder_config
from draf_dist.schema.modality import ModalitySpec
from draf_dist.training.job import FinetuneJob
from draf_dist.training.pretrain_job import PretrainJob
from draf_dist.training.stages import build_stage
from draf_dist.training.torch_engine import OneProcess
from draf_dist.tuning.campaign_job import CampaignJob, Value
from draf_dist.tuning.point import jobs_at
from draf_dist.tuning.space import check_space, probes

ENCODER_OF_PRETRAIN = "the encoder and the width of base.pretrain"
# What decides whether fine-tuning can take over an encoder.
OF_ENCODERS = ("finetune.model.", "pretrain.encoder.", "pretrain.width", "pretrain.objective.modality")
MOST_COMBINATIONS = 1000


def check_campaign(campaign: CampaignJob) -> None:
    """Tries the space on the jobs, and the jobs on their releases.

    Raises:
        SpecError: see check_space, check_stages and check_fits.
    """
    check_space(campaign, "campaign")
    check_stages(campaign)
    check_fits(campaign)


def check_stages(campaign: CampaignJob) -> None:
    """Builds the models of the base jobs.

    Raises:
        SpecError: they don't fit the release, or fine-tuning could not take over the encoder.
    """
    for stage in campaign.stages.values():
        build_stage(stage, open_release(stage.release), OneProcess())
    pretrain, finetune = campaign.base.pretrain, campaign.base.finetune
    if pretrain is None:
        return
    spec = _modality(campaign, pretrain)
    if spec is None:
        found, remedy = repr(pretrain.objective.modality), "Pre-train one that the release of base.finetune has."
        raise SpecError(explain("base.pretrain.objective.modality", expected="one to fine-tune", found=found, remedy=remedy))
    if not _fits(pretrain, finetune, spec):
        expected, remedy = ENCODER_OF_PRETRAIN, "Make both the same in both jobs."
        raise SpecError(explain("base.finetune.model", expected=expected, found="others", remedy=remedy))


def check_fits(campaign: CampaignJob) -> None:
    """Tries every choice and both ends of every range of what shapes an encoder, against all of the others.

    Where there are more than MOST_COMBINATIONS nothing is tried.

    Raises:
        SpecError: a value with which fine-tuning could never take over the pre-trained encoder.
    """
    tried = {path: tuple(probes(sought)) for path, sought in campaign.space.items() if path.startswith(OF_ENCODERS)}
    if campaign.base.pretrain is None or not tried or math.prod(map(len, tried.values())) > MOST_COMBINATIONS:
        return
    points = [dict(zip(tried, values, strict=True)) for values in product(*tried.values())]
    good = {item for point in points if _fits_at(campaign, point) for item in point.items()}
    problems = [
        explain(f"campaign: space.{path} = {value}", expected=ENCODER_OF_PRETRAIN, found="another", remedy="Seek both or neither.")
        for path, values in tried.items()
        for value in values
        if (path, value) not in good
    ]
    if problems:
        raise SpecError(together(problems))


def _fits_at(campaign: CampaignJob, point: dict[str, Value]) -> bool:
    try:
        jobs: Any = jobs_at(campaign, point)
    except SpecError:
        # These values don't go together; with others each of them may.
        return False
    spec = _modality(campaign, jobs["pretrain"])
    return spec is not None and _fits(jobs["pretrain"], jobs["finetune"], spec)


def _fits(pretrain: PretrainJob, finetune: FinetuneJob, spec: ModalitySpec) -> bool:
    choice, width = getattr(finetune.model, "encoders", None), getattr(finetune.model, "width", None)
    # A model that reads raw inputs has none that could be taken over.
    return choice is not None and (encoder_config(pretrain.encoder, spec), pretrain.width) == (choice.of(spec), width)


def _modality(campaign: CampaignJob, pretrain: PretrainJob) -> ModalitySpec | None:
    modalities = open_release(campaign.stages["finetune"].release).schema.modalities
    return next((each for each in modalities if each.name == pretrain.objective.modality), None)

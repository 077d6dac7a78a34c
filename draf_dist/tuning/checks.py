"""What can be checked of a campaign before a trial is trained."""

from draf_dist.data.release import open_release
from draf_dist.errors import SpecError, explain
from draf_dist.objectives.pretrain_modality import encoder_config
from draf_dist.training.stages import build_stage
from draf_dist.training.torch_engine import OneProcess
from draf_dist.tuning.campaign_job import CampaignJob, Range
from draf_dist.tuning.space import check_space


def check_campaign(campaign: CampaignJob) -> None:
    """Tries the space on the jobs, and the jobs on their releases.

    Raises:
        SpecError: see check_space and check_stages.
    """
    check_space(campaign, "campaign")
    check_stages(campaign)


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
    schema = open_release(campaign.stages["finetune"].release).schema
    spec = next((each for each in schema.modalities if each.name == pretrain.objective.modality), None)
    if spec is None:
        found, remedy = repr(pretrain.objective.modality), "Pre-train one that the release of base.finetune has."
        raise SpecError(explain("base.pretrain.objective.modality", expected="one to fine-tune", found=found, remedy=remedy))
    theirs, ours = encoder_config(pretrain.encoder, spec), finetune.model.encoders.of(spec)
    if (theirs, pretrain.width) != (ours, finetune.model.width):
        expected, remedy = "the encoder and the width of base.pretrain", "Make both the same in both jobs."
        raise SpecError(explain("base.finetune.model", expected=expected, found="others", remedy=remedy))


def max_epochs(campaign: CampaignJob) -> int:
    """The most epochs that a trial can take."""
    sought = campaign.space.get("finetune.epochs")
    if sought is None:
        return campaign.base.finetune.epochs
    return int(sought.high) if isinstance(sought, Range) else max(int(choice) for choice in sought.choices)

"""The campaign of `draf demo --full`: six trials over alpha, lambda and temperature."""

import re
from pathlib import Path

from rich.console import Console

from draf_dist.cli.demo_job import demo_job, demo_pretraining
from draf_dist.cli.demo_stages import Stages, hold
from draf_dist.config.spec import dump_yaml
from draf_dist.tuning.campaign_job import Base, Budget, CampaignJob, Choices, Range, Stopping

CAMPAIGN = "campaign"
# The library of the plots has links in its texts; what a browser would fetch by itself is another matter.
FETCHED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""")
TRIALS = 6


def demo_campaign(release: str, *, seed: int) -> CampaignJob:
    """The space of tune/alpha_lambda_temperature.yaml, sought with jobs of a few epochs."""
    finetune = demo_job(release, "", seed=seed).model_copy(update={"pretrained": {}, "epochs": 4})
    return CampaignJob(
        name="demo",
        base=Base(finetune=finetune, pretrain=demo_pretraining(release, seed=seed).model_copy(update={"epochs": 3})),
        space={
            "finetune.model.reliability_alpha": Range(low=0.1, high=100, log=True),
            "finetune.objective.lambda_acd": Range(low=0.01, high=1, log=True),
            "pretrain.objective.tau": Choices(choices=(0.1, 0.5)),
        },
        budget=Budget(trials=TRIALS),
        stopping=Stopping(grace_epochs=2, reduction_factor=2),
        concurrent=2,
        seed=seed,
    )


def campaign(out: Path, release: str, stages: Stages, *, seed: int) -> dict[str, str]:
    """Carries it out; check -> what was found.

    Raises:
        DataError: a check does not hold.
    """
    from draf_dist.storage import open_store
    from draf_dist.training.jobs import load_job
    from draf_dist.tuning.campaign import run_campaign

    job = demo_campaign(release, seed=seed)
    dump_yaml(job, out / "campaign.yaml")
    with stages(f"campaign of {TRIALS} trials"), (out / "campaign.log").open("w", encoding="utf-8") as log:
        result = run_campaign(job, str(out / CAMPAIGN), console=Console(file=log))
    found = result.leaderboard
    hold(len(found.rows) == TRIALS and not found.failed, "campaign", f"{TRIALS} trials, none failed", f"{len(found.rows)} trials")
    winner = load_job(result.winner)
    hold(winner.release == release, "campaign", "a winner that `draf train` takes", "another release in it")
    report = open_store(result.url).read("report.html").decode()
    hold(FETCHED.search(report) is None, "campaign report", "nothing that is fetched from elsewhere", "something")
    stopped = f"{found.stopped} of them stopped early"
    best = f"NLL {found.best.nll_scaled:.4f} with T {found.best.temperature:.2f}"
    return {"campaign": f"{TRIALS} trials, {stopped}; best: {best}; {found.overhead_s:.1f} s a trial beyond training"}

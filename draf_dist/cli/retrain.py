"""`draf retrain`: the champion, trained further on what has come since, judged, and promoted if that is asked for."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from draf_dist.cli.models import print_verdict
from draf_dist.cli.output import DryRunOption, JsonOption, SetOption, console, errors, print_json

if TYPE_CHECKING:
    from draf_dist.continual.retrain import Retrained, Retraining


def retrain(
    job: Annotated[Path, typer.Argument(help="The retraining (YAML).")],
    out: Annotated[str | None, typer.Option(help="URL of the run folder; runs/<name>-<hash> if not given.")] = None,
    overrides: SetOption = None,
    profile: Annotated[Path | None, typer.Option(help="Where to run (YAML, see cluster/); this process if not given.")] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Make it champion if the verdict is to promote.")] = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Train a model's champion further on new deliveries, and judge the result. Exits 4 unless the verdict is to promote.

    Given again it continues, or says again what came out. See docs/retraining.md.

    Example: draf retrain jobs/retrain_synth.yaml --set release=s3://bucket/synth --promote
    """
    from draf_dist.continual.registry import Registry
    from draf_dist.continual.retrain import check_never_rolled_back, check_promotes, plan_retraining
    from draf_dist.continual.retrain import retrain as run_retraining
    from draf_dist.continual.retrain_job import load_retrain
    from draf_dist.launch.cluster_profile import load_profile
    from draf_dist.launch.profile import OneProcessProfile

    spec = load_retrain(job, overrides or ())
    where = OneProcessProfile() if profile is None else load_profile(profile)
    if dry_run:
        show_plan(plan_retraining(spec, out), json=json)
        return
    done = run_retraining(spec, out, where, errors)
    if done is None:
        show_plan(None, json=json)
        return
    promotes = promote and done.verdict.decision == "promote"
    if promotes:
        registry = Registry(spec.registry)
        check_never_rolled_back(registry, done.version)
        registry.promote(done.version.name, done.version.version)
    _show(done, promoted=promotes, json=json)
    check_promotes(done.version, done.verdict)


def show_plan(plan: "Retraining | None", *, json: bool) -> None:
    """Prints what a retraining would train; None: nothing."""
    if plan is None:
        if json:
            print_json({"run": None, "num_new": 0})
        else:
            console.print("Nothing to train: no training study has come since the champion's release.")
        return
    if json:
        about = {"run": plan.url, "release": plan.job.release, "champion": plan.champion.version}
        print_json({**about, "num_new": plan.num_new, "num_old": plan.num_old})
        return
    console.print(
        f"Would train {plan.champion.name} version {plan.champion.version} further on {plan.num_new} new studies of "
        f"{plan.job.release}, replaying {plan.num_old} old ones, into {plan.url}.",
        soft_wrap=True,
        highlight=False,
    )


def _show(done: "Retrained", *, promoted: bool, json: bool) -> None:
    verdict, version = done.verdict, done.version
    about: dict[str, Any] = verdict.model_dump(mode="json", include={"decision", "sites", "subjects_needed", "reasons"})
    if json:
        print_json({"run": done.run_url, "model": version.name, "version": version.version, "promoted": promoted, **about})
        return
    print_verdict(verdict)
    console.print(f"Report: {done.run_url}/gate.html", soft_wrap=True, highlight=False)
    if promoted:
        console.print(f"Is now the champion: {version.name} version {version.version}.", highlight=False)
    elif verdict.decision == "promote":
        console.print(f"Next: draf models promote {version.name} --version {version.version}", highlight=False)

"""The submission of `draf demo --full`: the fine-tuning job to a Ray cluster that asks for a token."""

from collections.abc import Callable
from pathlib import Path

from draf_dist.cli.demo_checks import same_weights, step_losses
from draf_dist.cli.demo_job import demo_profile
from draf_dist.cli.demo_stages import REFERENCE, Stages, hold
from draf_dist.errors import UnreachableError
from draf_dist.launch.cluster_profile import ClusterProfile, NodeShape, WorkerNodes

SUBMITTED = "submitted"
CPUS = 2


def demo_cluster(out: Path, dashboard: str) -> ClusterProfile:
    """A cluster of one node: the demo's two workers on it."""
    node = NodeShape(cpus=CPUS, memory_gib=4)
    return ClusterProfile(
        name="demo",
        image="draf_dist:0.1.0-cpu",
        storage=str(out),
        dashboard=dashboard,
        train=demo_profile().model_copy(update={"address": "auto"}),
        head=node,
        workers=WorkerNodes(count=0, **node.model_dump()),
    )


def submission(out: Path, stages: Stages) -> dict[str, str]:
    """Submits the job of the undisturbed run and compares; check -> what was found.

    Raises:
        DataError: a check does not hold.
        DrafError: the submitted job failed; submit.log has its own log.
    """
    from draf_dist.config.spec import dump_yaml
    from draf_dist.launch.bundle import bundle
    from draf_dist.launch.local_ray import LocalRay
    from draf_dist.launch.package import pack
    from draf_dist.launch.ray_cluster import TOKEN, environment
    from draf_dist.launch.ray_jobs import check_succeeded, follow, status, submit
    from draf_dist.training.jobs import load_job
    from draf_dist.training.run_folder import open_run

    with stages("start a Ray cluster that asks for a token"):
        cluster = LocalRay(TOKEN, cpus=CPUS).__enter__()
    try:
        profile = demo_cluster(out, cluster.dashboard)
        dump_yaml(profile, out / "cluster.yaml")
        what = bundle(load_job(out / "job.yaml"), profile, str(out / SUBMITTED))
        with stages("submit the fine-tuning job"), (out / "submit.log").open("w", encoding="utf-8") as log:
            with environment({**cluster.environment, "RAY_AUTH_TOKEN": "0" * 64}):
                refused = _is_refused(lambda: status(what.name, profile))
            with environment(cluster.environment):
                begun = submit(what, profile, pack(what))
                ended = follow(begun, profile, lambda line: print(line, file=log))
            check_succeeded(ended)
    finally:
        cluster.stop()
    hold(refused, "submission", "a wrong token to be refused", "that it was taken")
    submitted, reference = (step_losses(open_run(str(out / name)).metrics()) for name in (SUBMITTED, REFERENCE))
    hold(submitted == reference, "submission", "the losses of the local run", "others")
    weights = same_weights(out / SUBMITTED, out / REFERENCE)
    return {"submission": f"{ended.id}: {len(submitted)} steps as in the local run, bit for bit; weights {weights}"}


def _is_refused(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except UnreachableError:
        return True
    return False

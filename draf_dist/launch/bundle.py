"""What goes to a cluster: two small files and a command. The same whether it is submitted or rendered."""

import functools
import operator
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from draf_dist.config.spec import fingerprint, yaml_text
from draf_dist.errors import SpecError, explain, together
from draf_dist.launch.cluster_profile import ClusterProfile
from draf_dist.training.job import without_secret
from draf_dist.training.jobs import AnyJob

JOB, CLUSTER = "job.yaml", "cluster.yaml"
# A RayJob's name may have 47 characters; a submission id has an attempt behind it.
NAME_LENGTH = 40
HASH_DIGITS = 8
_HERE = re.compile(r"localhost|::1|127(\.[0-9]{1,3}){3}")


@dataclass(frozen=True)
class Bundle:
    """A job for a cluster. name: a DNS-1035 label, the same whenever the same job goes to the same folder; files: name -> text."""

    name: str
    run_url: str
    files: dict[str, str]

    def command(self, folder: str) -> list[str]:
        """What carries the job out on a node where the files lie in `folder`; in every image `python` has draf_dist."""
        words = ["train", f"{folder}/{JOB}", "--profile", f"{folder}/{CLUSTER}", "--out", self.run_url]
        return ["python", "-m", "draf_dist.cli.app", *words]


def bundle(job: AnyJob, cluster: ClusterProfile, out: str | None = None) -> Bundle:
    """The job, its run under the cluster's storage unless `out` says where. Nothing is read: only the cluster need reach the store.

    Folders of this machine are allowed where the dashboard is on this machine too, and are made absolute.

    Raises:
        SpecError: one line for every folder that the cluster would look for in vain; an `out` with credentials.
    """
    storage = without_secret("--out", out) if out is not None else cluster.storage
    where = "storage" if out is None else "--out"
    local = {key: url for key, url in {where: storage, **job.reads}.items() if is_local(url)}
    if local and not is_this_machine(cluster.dashboard):
        remedy = "Give s3://bucket/prefix."
        raise SpecError(
            together(
                explain(key, expected=f"a URL that {cluster.name} reaches", found=f"the folder {url}", remedy=remedy)
                for key, url in local.items()
            )
        )
    absolute = _with_absolute(job)
    root = _absolute(storage).rstrip("/")
    run_url = root if out is not None else f"{root}/{absolute.run_name}"
    mark = absolute.sha256 if out is None else fingerprint({"job": absolute.sha256, "out": run_url})
    return Bundle(_label(job.name, mark), run_url, {JOB: yaml_text(absolute), CLUSTER: yaml_text(cluster)})


def is_local(url: str) -> bool:
    """Whether it is a folder of one machine."""
    return "://" not in url or url.startswith("file:")


def is_this_machine(url: str) -> bool:
    """Whether a URL's host is this machine (or the near end of a tunnel)."""
    return _HERE.fullmatch(urlsplit(url).hostname or "") is not None


def _with_absolute(job: AnyJob) -> AnyJob:
    tree = job.model_dump(mode="json")
    for key, url in job.reads.items():
        *parents, last = key.split(".")
        functools.reduce(operator.getitem, parents, tree)[last] = _absolute(url)
    return type(job).model_validate(tree)


def _absolute(url: str) -> str:
    return url if "://" in url else str(Path(url).expanduser().absolute())


def _label(name: str, mark: str) -> str:
    """A DNS-1035 label: lower-case letters, digits and hyphens, a letter first."""
    words = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    if not words[:1].isalpha():
        words = f"run-{words}".rstrip("-")
    return f"{words[: NAME_LENGTH - HASH_DIGITS - 1].rstrip('-')}-{mark[:HASH_DIGITS]}"

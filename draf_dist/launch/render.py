"""A job for a cluster as text that others apply: objects of Kubernetes, or a file of Ray's cluster launcher; checked first."""

import io
import os
import re
from collections.abc import Iterator
from typing import Any, Literal, assert_never

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import LiteralScalarString, SingleQuotedScalarString

from draf_dist.config.spec import parse_yaml
from draf_dist.errors import SpecError, explain, together
from draf_dist.launch import cloud, cloud_rules, kuberay, kuberay_rules
from draf_dist.launch.bundle import JOB, Bundle, is_local
from draf_dist.launch.cluster_profile import ClusterProfile
from draf_dist.launch.package import refusals
from draf_dist.training.jobs import parse_job

Tree = dict[str, Any]
Target = Literal["kuberay", "aws", "gcp"]
# What YAML 1.1, which kubectl and Ray read, takes for something else than a string.
_AMBIGUOUS = re.compile(r"(?:y|n|yes|no|on|off)\Z|[-+.]?[0-9]", re.IGNORECASE)
_SECRET_KEY = re.compile(r"pass(word|wd|phrase)|secret|token|api_?key|access_?key|private_?key|credential", re.IGNORECASE)
# Keys that name a secret or say how one is used.
_NAMES_ONE = {"secretName", "auth_secret", "storage_secret", "image_pull_secret", "automountServiceAccountToken", "HttpTokens"}
_MOUNTED = {cloud.TOKEN_FILE}


def render(target: Target, cluster: ClusterProfile, bundle: Bundle) -> str:
    """The YAML text for a target, with comments on how to use it.

    Raises:
        SpecError: one line for every problem: the profile lacks the target's section, the cluster could not reach a folder, the
            target would refuse it, or a secret stands in it.
    """
    problems = _out_of_reach(cluster, bundle)
    try:
        documents, header, refused = _documents(target, cluster, bundle)
    except SpecError as error:
        raise SpecError(together([*problems, str(error)])) from error
    text = header + "---\n".join(_yaml(document) for document in documents)
    problems += [_problem(cluster, problem) for problem in refused]
    problems += [_problem(cluster, f"a secret under {where}") for document in documents for where in secrets(document)]
    problems += refusals({target: text.encode(), **{name: file.encode() for name, file in bundle.files.items()}}, os.environ)
    if problems:
        raise SpecError(together(problems))
    return text


def _documents(target: Target, cluster: ClusterProfile, bundle: Bundle) -> tuple[list[Tree], str, list[str]]:
    """The documents, the comments before them, and what the target would refuse."""
    match target:
        case "kuberay":
            documents = kuberay.documents(cluster, bundle)
            return documents, kuberay.header(cluster, bundle), kuberay_rules.problems(documents[-1])
        case "aws" | "gcp":
            config = cloud.launcher(target, cluster)
            return [config], cloud.header(target, cluster), cloud_rules.problems(target, config)
        case _:
            assert_never(target)


def secrets(tree: Any, where: str = "") -> Iterator[str]:
    """Where in a tree a key is named like a secret and has a value, inside texts that are YAML themselves too; never the value."""
    if isinstance(tree, dict):
        if "value" in tree and _SECRET_KEY.search(str(tree.get("name", ""))):
            yield f"{where}.{tree['name']}".lstrip(".")
        for key, value in tree.items():
            inside = f"{where}.{key}".lstrip(".")
            scalar = value is not None and not isinstance(value, dict | list | bool)
            if scalar and _SECRET_KEY.search(str(key)) and key not in _NAMES_ONE | _MOUNTED:
                yield inside
            yield from secrets(value, inside)
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from secrets(value, f"{where}[{index}]")
    elif isinstance(tree, str) and "\n" in tree:
        yield from secrets(_as_tree(tree), where)


def _as_tree(text: str) -> Tree:
    try:
        return parse_yaml(text, where="text")
    except SpecError:
        return {}


def _out_of_reach(cluster: ClusterProfile, bundle: Bundle) -> list[str]:
    """What lies on this machine: nodes elsewhere would look for it in vain."""
    job = parse_job(bundle.files[JOB], where=JOB)
    remedy = "Give s3://bucket/prefix; folders are for a cluster on this machine, which needs no manifest."
    urls = {"storage": bundle.run_url, **job.reads}
    return [
        explain(key, expected=f"a URL that the nodes of {cluster.name} reach", found=f"the folder {url}", remedy=remedy)
        for key, url in urls.items()
        if is_local(url)
    ]


def _problem(cluster: ClusterProfile, problem: str) -> str:
    return explain(f"cluster {cluster.name}", expected="what the target accepts", found=problem, remedy="Change the profile.")


def _yaml(document: Tree) -> str:
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 4096
    # An object that occurs twice is written twice: anchors are hard to read.
    yaml.representer.ignore_aliases = lambda data: True
    text = io.StringIO()
    yaml.dump(_as_written(document), text)
    return text.getvalue()


def _as_written(tree: Any) -> Any:
    """Texts of several lines as blocks, and quotes where a reader of YAML 1.1 would see no string."""
    if isinstance(tree, dict):
        return {key: _as_written(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_as_written(value) for value in tree]
    if isinstance(tree, str) and "\n" in tree:
        return LiteralScalarString(tree)
    if isinstance(tree, str) and _AMBIGUOUS.match(tree):
        return SingleQuotedScalarString(tree)
    return tree

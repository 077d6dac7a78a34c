"""The search space: paths that exist, and values that the jobs accept."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from optuna import Trial
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from draf_dist.errors import SpecError, explain, together
from draf_dist.tuning.campaign_job import CampaignJob, Choices, Parameter, Range, Value
from draf_dist.tuning.point import jobs_at

# What names or feeds a job is no setting of it; and the best of several seeds is luck.
NOT_SOUGHT = ("kind", "name", "release", "pretrained", "seed")
EDGE_SHARE = 0.02


def check_space(campaign: CampaignJob, where: str) -> None:
    """Tries both ends of every range and every choice on the jobs.

    Raises:
        SpecError: every path that the jobs don't have, and every value that they refuse, together.
    """
    problems = [problem for path, parameter in campaign.space.items() for problem in _problems(campaign, path, parameter, where)]
    if problems:
        raise SpecError(together(problems))


def distribution(parameter: Parameter) -> BaseDistribution:
    """The same in Optuna's terms."""
    if isinstance(parameter, Choices):
        return CategoricalDistribution(parameter.choices)
    if parameter.integer:
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def suggest(trial: Trial, path: str, parameter: Parameter) -> None:
    """Gives a trial a value of the parameter, unless it has one."""
    if isinstance(parameter, Choices):
        trial.suggest_categorical(path, parameter.choices)
    elif parameter.integer:
        trial.suggest_int(path, int(parameter.low), int(parameter.high), log=parameter.log)
    else:
        trial.suggest_float(path, parameter.low, parameter.high, log=parameter.log)


def at_edge(parameter: Parameter, value: Value) -> bool:
    """Whether a better value may lie beyond: this one is within 2 % of an end of the range, or an end of three or more numbers.

    Of two choices either is an end, and words have no order.
    """
    if isinstance(parameter, Range):
        move = math.log if parameter.log else float
        low, high = move(parameter.low), move(parameter.high)
        share = (move(float(value)) - low) / (high - low)
        return min(share, 1 - share) <= EDGE_SHARE
    numbers = [choice for choice in parameter.choices if isinstance(choice, int | float) and not isinstance(choice, bool)]
    return 2 < len(numbers) == len(parameter.choices) and value in (min(numbers), max(numbers))


def describe(parameter: Parameter) -> str:
    """In one line, for people."""
    if isinstance(parameter, Choices):
        return "one of " + ", ".join(map(str, parameter.choices))
    form = ", ".join(word for word, holds in (("log-uniform", parameter.log), ("whole", parameter.integer)) if holds)
    return f"{parameter.low:g} to {parameter.high:g}, {form or 'uniform'}"


def _problems(campaign: CampaignJob, path: str, parameter: Parameter, where: str) -> Iterator[str]:
    place = f"{where}: space.{path}"
    trees = {name: job.model_dump(mode="json") for name, job in campaign.stages.items()}
    known = {leaf for leaf in _leaves(trees, ()) if leaf.split(".")[1] not in NOT_SOUGHT}
    if path not in known:
        near = difflib.get_close_matches(path, sorted(known), n=1)
        remedy = f"Did you mean {near[0]!r}?" if near else f"A path begins with {' or '.join(trees)}."
        yield explain(place, expected="a setting of the base jobs with one value", found="none that may be sought", remedy=remedy)
        return
    for value in probes(parameter):
        try:
            jobs_at(campaign, {path: value})
        except SpecError as error:
            yield from (f"{place} = {value}: {line}" for line in str(error).splitlines())


def probes(parameter: Parameter) -> Iterable[Value]:
    """Both ends, and a value between them that is no whole number unless all are."""
    if isinstance(parameter, Choices):
        return parameter.choices
    if parameter.integer:
        return int(parameter.low), int(parameter.high)
    return parameter.low, parameter.low + (parameter.high - parameter.low) / math.pi, parameter.high


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        elif not isinstance(value, list):
            yield ".".join((*path, key))

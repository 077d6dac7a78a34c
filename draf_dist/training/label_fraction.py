"""Which training studies keep their label where a job uses a fraction of them; a larger fraction keeps all of a smaller one."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from draf_dist import noise
from draf_dist.data.splits import Stratum, StudyRow, component_of, pooled, strata
from draf_dist.training.job import FinetuneJob

# Of uid int64 (B,), which keep their label: bool (B,).
HasLabel = Callable[[Tensor], Tensor]


def has_label(job: FinetuneJob, uid: Tensor) -> Tensor:
    """Which studies, uid int64 (B,), keep their label, each by a coin of its own: bool (B,)."""
    return noise.uniform(noise.chain(job.seed, "label_fraction", uid), ()) < job.label_fraction


def labelled_studies(job: FinetuneJob, studies: Iterable[tuple[int, StudyRow]]) -> HasLabel:
    """The rule of a job; studies: uid and row of every training study."""
    if job.label_fraction_of == "studies":
        return partial(has_label, job)
    rows = list(studies)
    kept = set(labelled_subjects([row for _, row in rows], job.label_fraction, job.seed))
    uids = torch.tensor([uid for uid, row in rows if component_of(row.subject) in kept], dtype=torch.int64)
    return lambda uid: torch.isin(uid, uids.to(uid.device))


def labelled_subjects(studies: Iterable[StudyRow], fraction: float, seed: int) -> Iterator[str]:
    """The components of a fraction of the subjects of every site and label, to the nearest whole number and at least one.

    In each (site, label), small ones pooled as for the splits, subjects stand in the order of a keyed hash, of which the first are
    taken: so many for a smaller fraction, and more of the same for a larger one.
    """
    found: dict[Stratum, list[str]] = defaultdict(list)
    for component, stratum in pooled(strata(studies)).items():
        found[stratum].append(component)
    for components in found.values():
        components.sort(key=lambda component: (noise.chain(seed, "label_fraction", component), component))
        yield from components[: max(1, int(fraction * len(components) + 0.5))]

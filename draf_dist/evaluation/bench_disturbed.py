"""All systems under every condition of a benchmark: primary metric, NLL, regret, paired differences to the reference, Holm's p."""

from collections.abc import Callable, Sequence

import numpy as np

from draf_dist.evaluation.bench_results import ConditionResult, UnderCondition
from draf_dist.evaluation.bench_scores import Pooled, differences_of, holm_of, metrics_of, over_seeds
from draf_dist.evaluation.regret import pointwise_divergence
from draf_dist.evaluation.scoring import TASKS
from draf_dist.evaluation.statistics import Estimate, Floats, Resamples

NLL, REGRET = "nll", "regret"
# What one system predicted: by seed, then by case of the condition.
Seeds = Sequence[Sequence[Pooled]]


class Comparison:
    """Systems compared on the same resamples of subjects and seeds, under one condition after another."""

    def __init__(self, resamples: Resamples, reference: str, seed: int) -> None:
        self._counts = np.concatenate([np.ones((1, resamples.num_rows)), resamples.counts()])
        self._reference, self._seed = reference, seed

    def compare(
        self, name: str, cases: Sequence[str], systems: Sequence[str], read: Callable[[str], Seeds], *, exact: Floats | None
    ) -> ConditionResult:
        """All systems under the condition `name`. cases: modalities hit, one pooled prediction each; read: of one system at a time.

        exact: the posterior (n, 2) of the studies of every Pooled, where it is known.
        """
        replicates: dict[str, dict[str, Floats]] = {}
        by_case: dict[str, tuple[float | None, ...]] = {}
        for system in systems:
            replicates[system], by_case[system] = self._numbers(read(system), exact)
        reference = replicates[self._reference]
        holms = holm_of(replicates, self._reference)
        rows = [
            UnderCondition(
                system=system,
                metrics=metrics_of(found),
                differences={} if system == self._reference else differences_of(found, reference),
                holm={metric: p[system] for metric, p in holms.items() if system in p},
                by_case=by_case[system],
            )
            for system, found in replicates.items()
        ]
        return ConditionResult(name=name, cases=tuple(cases), rows=tuple(rows))

    def _numbers(self, seeds: Seeds, exact: Floats | None) -> tuple[dict[str, Floats], tuple[float | None, ...]]:
        """Metric -> (1 + R,), the mean over seeds and cases; and the primary metric of every case."""
        each = [[self._of_one(pooled, exact) for pooled in cases] for cases in seeds]
        found = {
            metric: over_seeds(np.array([np.mean([case[metric] for case in cases], axis=0) for cases in each]), seed=self._seed)
            for metric in each[0][0]
        }
        primary = TASKS[seeds[0][0].task].primary
        by_case = np.mean([[case[primary][0] for case in cases] for cases in each], axis=0)
        return found, tuple(Estimate.of(float(value)).value for value in by_case)

    def _of_one(self, pooled: Pooled, exact: Floats | None) -> dict[str, Floats]:
        means = {NLL: pooled.scored.pointwise_nll()}
        if exact is not None:
            means[REGRET] = pointwise_divergence(exact, pooled.probability)
        total = self._counts.sum(axis=1)
        found = {metric: self._counts @ values / total for metric, values in means.items()}
        return {TASKS[pooled.task].primary: pooled.scored.primary_of_resamples(self._counts)} | found

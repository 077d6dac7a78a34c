"""All predictions of one evaluation: planned in parts, predicted wherever the executor runs them, put together in order."""

import secrets
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from draf_dist.config.spec import fingerprint
from draf_dist.data.bad_data import BadData
from draf_dist.data.loader_stats import LoaderStats
from draf_dist.data.release import Release
from draf_dist.data.shard_reader import ShardReader
from draf_dist.errors import DataError, SpecError, explain
from draf_dist.evaluation.job import EvaluateJob
from draf_dist.evaluation.parts import FOLDER, Condition, Found, Part, Place, Setting, clean_parts, sweep_parts
from draf_dist.evaluation.predict import check_coverage
from draf_dist.evaluation.predictions import CLEAN, Applied, Predictions, concatenate
from draf_dist.evaluation.run_parts import predict_all
from draf_dist.evaluation.subject import Subject
from draf_dist.executor import Executor, Serial
from draf_dist.schema.release import SPLITS, Split

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Workers:
    """Where parts are predicted, and with what each worker computes."""

    executor: Executor
    place: Place


ONE_PROCESS = Workers(Serial(), Place())


@dataclass(frozen=True)
class Predicted:
    """What was predicted: clean splits, what reading each of them met, and the sweep's by condition (empty without a sweep)."""

    clean: dict[Split, Predictions]
    read: dict[Split, LoaderStats]
    swept: dict[Condition, dict[Applied, Predictions]]


@dataclass
class _Plan:
    """Parts by what they are of, in order."""

    releases: Mapping[Split, Release]
    clean: dict[Split, list[Part]] = field(default_factory=dict)
    swept: list[Part] = field(default_factory=list)
    uids: dict[tuple[str, Split], NDArray[np.int64]] = field(default_factory=dict)

    @property
    def parts(self) -> list[Part]:
        """All of them."""
        return [*(part for parts in self.clean.values() for part in parts), *self.swept]

    def read_uids(self, release: Release, split: Split) -> NDArray[np.int64]:
        """The uids of a split in its order."""
        of = release.pinned_url, split
        if of not in self.uids:
            reader = ShardReader(release, split)
            self.uids[of] = reader.uids(np.arange(reader.num_samples, dtype=np.int64))
        return self.uids[of]


def parts_folder(subject: Subject, job: EvaluateJob, place: Place) -> str:
    """Where in the run folder the parts of this evaluation lie, and of no other: evaluating/<16 hex digits>."""
    what = {
        "model": subject.model_sha256,
        "release": subject.release.version,
        "job": job.model_dump(mode="json"),
        "place": [place.device, place.threads],
    }
    return f"{FOLDER}/{fingerprint(what)[:16]}"


def predict_run(subject: Subject, job: EvaluateJob, folder: str, workers: Workers, on_progress: Progress) -> Predicted:
    """Predictions of validation, of every split asked for that holds a study, each study exactly once, and of the sweep.

    folder: parts_folder; parts lie there until they are needed no more. on_progress(done, total): of parts.

    Raises:
        SpecError: validation holds no study.
        DataError: files are damaged, more than may be left out; a study that was not predicted exactly once.
        GateError: parts are gone again and again.
    """
    plan = _planned(subject, job, folder, workers.place)
    found = predict_all(subject.run.store, plan.parts, plan.uids, workers.executor, on_progress)
    clean, read = {}, {}
    for split, parts in plan.clean.items():
        release = plan.releases[split]
        where = f"{release.pinned_url}: split {split}"
        read[split] = read_together([found[part] for part in parts], subject.job.bad_data, where)
        clean[split] = _merged(parts, found)[CLEAN][Applied()]
        check_coverage(clean[split], release.manifest.receipts[split], read[split].lost_samples)
    return Predicted(clean, read, _merged(plan.swept, found))


def read_together(found: Sequence[Found], rule: BadData, where: str) -> LoaderStats:
    """What reading met in all parts of a split.

    Raises:
        DataError: more was left out than the rule allows of the split, however it lies in its parts.
    """
    total = sum((one.read for one in found), LoaderStats())
    if rule.is_exceeded(total.left_out, total.members):
        raise DataError(
            explain(
                where,
                expected=f"at most {rule.limit:.1%} of the members unusable",
                found=f"{total.left_out} of {total.members}",
                remedy="Run draf release verify; restore the files, or allow a larger share.",
            )
        )
    return total


def _planned(subject: Subject, job: EvaluateJob, folder: str, place: Place) -> _Plan:
    plan = _Plan({split: subject.trained_on if split == "val" else subject.release for split in SPLITS})
    bad_data, visit = subject.job.bad_data, secrets.token_hex(8)
    setting = Setting(subject.run.url, folder, subject.model_sha256, job.batch_size, job.seed, bad_data, place, visit)
    for split in SPLITS:
        release = plan.releases[split]
        if (split == "val" or split in job.splits) and (num_studies := _num_studies(release, split)):
            plan.clean[split] = clean_parts(setting, release.pinned_url, split, num_studies, job.passes)
            plan.read_uids(release, split)
    if "val" not in plan.clean:
        where = subject.trained_on.pinned_url
        raise SpecError(explain(where, expected="studies in the val split", found="none", remedy="Temperature is fitted there."))
    if job.sweep is not None and _num_studies(subject.release, job.sweep.split):
        uids = plan.read_uids(subject.release, job.sweep.split)
        plan.swept = sweep_parts(setting, subject.release.pinned_url, job.sweep, uids)
    return plan


def _num_studies(release: Release, split: Split) -> int:
    receipt = release.manifest.receipts.get(split)
    return 0 if receipt is None else receipt.count


def _merged(parts: Sequence[Part], found: Mapping[Part, Found]) -> dict[Condition, dict[Applied, Predictions]]:
    """Condition -> what was applied -> predictions, end to end in the order of the parts."""
    pieces: dict[Condition, dict[Applied, list[Predictions]]] = {part.condition: defaultdict(list) for part in parts}
    for part in parts:
        for one in found[part].predictions:
            pieces[part.condition][one.applied].append(one)
    return {condition: {applied: concatenate(some) for applied, some in by.items()} for condition, by in pieces.items()}

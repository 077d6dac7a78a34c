"""The types of evaluation.json: every number of the report and the data of every figure. No NaN, no subject."""

from typing import Literal

from pydantic import Field

from draf_dist.evaluation.job import EvaluateJob
from draf_dist.evaluation.statistics import Estimate
from draf_dist.evaluation.task_scores import TaskName
from draf_dist.metrics.temperature import Temperature
from draf_dist.models.mc import Scope
from draf_dist.schema.record import Record

Metrics = dict[str, Estimate]
Curve = tuple[float | None, ...]


class DiagramBin(Record):
    """One bin (low, high] of a reliability diagram."""

    low: float
    high: float
    count: int
    confidence: float
    frequency: float


class Diagram(Record):
    """A reliability diagram. question: of the predicted class ("top_label") or of class 1 ("class_one")."""

    question: Literal["top_label", "class_one"]
    scaled: bool
    bins: tuple[DiagramBin, ...]


class Floor(Record):
    """ECE of a perfectly calibrated model with the same confidences: mean and 95th percentile over simulated labels."""

    mean: float | None
    high: float | None


class ClassCurveData(Record):
    """Class-wise risk-coverage, thinned: share of all studies kept, share of the class kept, errors among the kept of the class."""

    name: str
    coverage: Curve
    kept: Curve
    risk: Curve


class AlarmCurveData(Record):
    """PPV and recall at the fixed threshold as coverage falls, thinned. Two classes only."""

    threshold: float
    coverage: Curve
    ppv: Curve
    recall: Curve


class RegretData(Record):
    """Nats lost to the exact posterior. observed: at the labels seen; expected: mean KL(posterior || model), never negative.

    posterior: the scores of the exact posterior itself on the same studies, its own ECE included: the reference.
    """

    observed: Estimate
    expected: Estimate
    expected_raw: Estimate
    posterior: Metrics


class LabelResult(Record):
    """One of several labels, over the studies in which it was observed.

    metrics: of temperature-scaled probabilities. diagrams: raw and scaled. risk_coverage: of those with the label.
    """

    name: str
    num_observed: int
    num_positive: int
    metrics: Metrics
    ece_floor: Floor
    diagrams: tuple[Diagram, ...]
    risk_coverage: ClassCurveData


class SurvivalCurve(Record):
    """Survival of some studies: by Kaplan and Meier, with its 95 % interval, and the mean of what was predicted of them."""

    name: str
    num_studies: int
    time: Curve
    observed: Curve
    low: Curve
    high: Curve
    predicted: Curve


class EventBin(Record):
    """Studies with about the same predicted probability, low to high, of an event; observed: 1 - S by Kaplan and Meier."""

    low: float
    high: float
    count: int
    predicted: float
    observed: float | None


class EventDiagram(Record):
    """Calibration at one edge: bins of equal mass by the probability of an event up to `at`; calibration_error: their mean gap."""

    at: float
    scaled: bool
    calibration_error: float | None
    bins: tuple[EventBin, ...]


class TimesResult(Record):
    """What there is of times alone. edges, horizon (until when survival is scored): in `unit`. curves: temperature-scaled."""

    unit: str
    edges: tuple[float, ...]
    horizon: float
    curves: tuple[SurvivalCurve, ...]
    diagrams: tuple[EventDiagram, ...]


class Group(Record):
    """A part of a split: a site, or a pattern of present modalities. Metrics are of temperature-scaled probabilities."""

    name: str
    present: tuple[bool, ...] = ()
    num_studies: int
    num_subjects: int
    class_counts: tuple[int, ...]
    metrics: Metrics
    regret: RegretData | None = None


class SplitResult(Record):
    """One split, clean. raw and scaled: all metrics before and after temperature scaling.

    class_counts: of About.classes. ece_floor, diagrams, risk_coverage and alarms are those of classes; labels and times take their
    place where these are asked for.
    """

    split: str
    num_studies: int
    num_unlabelled: int
    num_subjects: int
    class_counts: tuple[int, ...]
    num_undefined_classes: int = 0
    raw: Metrics
    scaled: Metrics
    ece_floor: Floor = Floor(mean=None, high=None)
    ece_class_one_floor: Floor | None = None
    diagrams: tuple[Diagram, ...] = ()
    risk_coverage: tuple[ClassCurveData, ...] = ()
    alarms: AlarmCurveData | None = None
    reliability: dict[str, float | None]
    by_site: tuple[Group, ...]
    by_pattern: tuple[Group, ...]
    regret: RegretData | None = None
    labels: tuple[LabelResult, ...] = Field((), exclude_if=lambda labels: not labels)
    times: TimesResult | None = Field(None, exclude_if=lambda times: times is None)


class Cell(Record):
    """One corruption, or one removal, against the same studies clean.

    operation and level as in the spec; modality: the one hit, or "all". metrics: auroc, nll and others when corrupted, and
    auroc_difference, nll_difference (clean - corrupted, paired), auroc_drop_percent = 100 (clean - corrupted) / clean; of times
    c_index in place of auroc.
    reliability, corruption_probability: means over the studies in which the modality is present.
    """

    operation: str
    index: int
    level: str
    severity: float
    modality: str
    num_studies: int
    metrics: Metrics
    reliability: dict[str, float | None]
    corruption_probability: dict[str, float | None]
    regret: RegretData | None = None


class Sweep(Record):
    """All cells of the robustness sweep. clean: the same studies and passes without corruption.

    left_out: operations that mean nothing on this split.
    """

    split: str
    passes: int
    num_studies: int
    clean: Metrics
    clean_reliability: dict[str, float | None]
    cells: tuple[Cell, ...]
    removals: tuple[Cell, ...]
    left_out: tuple[str, ...] = ()


class Signal(Record):
    """What one modality's uncertainty and weight go with; rank correlations, null where they do not exist.

    uncertainty_risk: kind -> Spearman(U, probability of class 1) on val. The others pool all cells of the sweep that hit this
    modality alone, and the clean ones: severity with reliability, with U, with c_hat; c_hat with U.
    """

    modality: str
    uncertainty_risk: dict[str, float | None]
    severity_reliability: float | None
    severity_uncertainty: float | None
    severity_corruption: float | None
    corruption_uncertainty: float | None


class About(Record):
    """What was evaluated. settings: the resolved job of the evaluation.

    classes: what class_counts counts: classes; of several labels each, of times censored and event. mc_scope: what the passes
    draw anew, all dropout or that of the heads alone.
    """

    run: str
    job_name: str
    release: str
    release_version: str
    trained_on: str
    model: str
    num_parameters: int
    weights_sha256: str
    modalities: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    settings: EvaluateJob
    task: TaskName = Field("class", exclude_if=lambda task: task == "class")
    mc_scope: Scope = Field("full", exclude_if=lambda scope: scope == "full")


class Evaluation(Record):
    """evaluation.json. predictions: the files that its numbers rest on, predictions/*.parquet -> sha256 of the content, in hex."""

    format: Literal[1] = 1
    about: About
    temperature: Temperature
    splits: tuple[SplitResult, ...]
    sweep: Sweep | None
    signals: tuple[Signal, ...]
    warnings: tuple[str, ...]
    predictions: dict[str, str] = {}

"""report.html: the evaluation as one self-contained page that needs no network, no script and no server."""

from draf_dist.evaluation import figures
from draf_dist.evaluation.figures import MISSING, Figure
from draf_dist.evaluation.label_scores import LABEL_COLUMNS
from draf_dist.evaluation.page import fill
from draf_dist.evaluation.results import Cell, Evaluation, SplitResult
from draf_dist.evaluation.scoring import TASKS
from draf_dist.evaluation.statistics import Estimate
from draf_dist.evaluation.time_figures import event_figure, survival_figure

TEMPLATE = "report.html.j2"
NOTHING = "–"


def render(evaluation: Evaluation) -> str:
    """The page. All text goes through autoescape; a null is shown as a dash whose hint is its reason."""
    filters = {"number": number, "interval": interval, "signed": signed, "estimate": estimate_text}
    sweep, modalities, task = evaluation.sweep, evaluation.about.modalities, TASKS[evaluation.about.task]
    return fill(
        "draf_dist.evaluation",
        TEMPLATE,
        filters,
        e=evaluation,
        task=task,
        metrics=task.metrics,
        label_columns=LABEL_COLUMNS,
        survival=[survival_figure(split.split, split.times) for split in evaluation.splits if split.times],
        calibration=[_calibration(split) for split in evaluation.splits],
        selective=[figures.selective_figure(split) for split in evaluation.splits if split.times is None],
        weights=figures.weight_figure(sweep, modalities) if sweep else None,
        corruption=figures.corruption_figure(sweep, modalities, task) if sweep else None,
        missing=figures.missing_figure(sweep, task) if sweep else None,
        cells=[cell for cell in sweep.cells if cell.operation not in MISSING] if sweep else [],
        missing_cells=[cell for cell in sweep.cells if cell.operation in MISSING] if sweep else [],
        worst=worst_loss(evaluation),
    )


def _calibration(split: SplitResult) -> Figure:
    return figures.calibration_figure(split) if split.times is None else event_figure(split.split, split.times)


def number(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits, or a dash."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """A number with its sign; what rounds to zero has none."""
    if value is None:
        return NOTHING
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def interval(estimate: Estimate, digits: int = 3) -> str:
    """[low, high], or nothing where there is no interval."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"[{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def estimate_text(estimate: Estimate, digits: int = 3) -> str:
    """A number and its interval in one string."""
    return f"{number(estimate.value, digits)} {interval(estimate, digits)}".rstrip()


def worst_loss(evaluation: Evaluation) -> Cell | None:
    """The cell with the largest loss of the primary metric, certain or not."""
    cells = [] if evaluation.sweep is None else evaluation.sweep.cells
    difference = f"{TASKS[evaluation.about.task].primary}_difference"
    known = [cell for cell in cells if cell.metrics[difference].value is not None]
    return max(known, key=lambda cell: cell.metrics[difference].value or 0.0, default=None)

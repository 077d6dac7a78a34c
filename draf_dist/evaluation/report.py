"""report.html: the evaluation as one self-contained page that needs no network, no script and no server."""

from draf_dist.evaluation import figures
from draf_dist.evaluation.figures import MISSING
from draf_dist.evaluation.page import fill
from draf_dist.evaluation.results import Cell, Evaluation
from draf_dist.evaluation.scores import METRICS
from draf_dist.evaluation.statistics import Estimate

TEMPLATE = "report.html.j2"
NOTHING = "–"


def render(evaluation: Evaluation) -> str:
    """The page. All text goes through autoescape; a null is shown as a dash whose hint is its reason."""
    filters = {"number": number, "interval": interval, "signed": signed, "estimate": estimate_text}
    sweep, modalities = evaluation.sweep, evaluation.about.modalities
    return fill(
        "draf_dist.evaluation",
        TEMPLATE,
        filters,
        e=evaluation,
        metrics=METRICS,
        calibration=[figures.calibration_figure(split) for split in evaluation.splits],
        selective=[figures.selective_figure(split) for split in evaluation.splits],
        weights=figures.weight_figure(sweep, modalities) if sweep else None,
        corruption=figures.corruption_figure(sweep, modalities) if sweep else None,
        missing=figures.missing_figure(sweep) if sweep else None,
        cells=[cell for cell in sweep.cells if cell.operation not in MISSING] if sweep else [],
        missing_cells=[cell for cell in sweep.cells if cell.operation in MISSING] if sweep else [],
        worst=worst_loss(evaluation),
    )


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
    """The cell with the largest loss of AUROC, certain or not."""
    cells = [] if evaluation.sweep is None else evaluation.sweep.cells
    known = [cell for cell in cells if cell.metrics["auroc_difference"].value is not None]
    return max(known, key=lambda cell: cell.metrics["auroc_difference"].value or 0.0, default=None)

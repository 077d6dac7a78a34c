"""report.html of a campaign: the leaderboard and Optuna's plots on one page that needs no network."""

from collections.abc import Iterator
from dataclasses import dataclass

import plotly.graph_objects as go
from markupsafe import Markup
from optuna import Study, visualization
from optuna.trial import TrialState
from plotly.offline import get_plotlyjs

from draf_dist.evaluation.page import fill
from draf_dist.tuning.campaign_job import CampaignJob
from draf_dist.tuning.leaderboard import Leaderboard
from draf_dist.tuning.rungs import RungEntry
from draf_dist.tuning.space import describe

TEMPLATE = "campaign.html.j2"
# A contour of every pair of them: more would be too small to read.
MOST_CONTOURS = 4
HEIGHT = 380


@dataclass(frozen=True)
class Plot:
    """A figure as HTML, and how to read it."""

    title: str
    read: str
    html: Markup


def render(campaign: CampaignJob, board: Leaderboard, study: Study, entries: list[RungEntry]) -> str:
    """The page; plotly's script is in it once."""
    return fill(
        "draf_dist.tuning",
        TEMPLATE,
        {},
        board=board,
        campaign=campaign,
        space={path: describe(parameter) for path, parameter in campaign.space.items()},
        rungs=_rung_rows(entries),
        plots=[Plot(title, read, _html(figure)) for title, read, figure in _figures(study, campaign)],
        plotly=Markup(get_plotlyjs()),
    )


def _figures(study: Study, campaign: CampaignJob) -> Iterator[tuple[str, str, go.Figure]]:
    name, paths = campaign.objective, list(campaign.space)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    yield "History", "The line is the best so far.", visualization.plot_optimization_history(study, target_name=name)
    if any(trial.intermediate_values for trial in complete):
        read = "One line a trial; one that ends early was stopped, or had stopped getting better."
        yield "By epoch", read, visualization.plot_intermediate_values(study)
    if len({trial.value for trial in complete}) > 1:
        read = "Share of the variation of the objective; with few trials hardly more than chance."
        yield "Importance", read, visualization.plot_param_importances(study, target_name=name)
    yield "Slices", "The objective against each parameter alone.", visualization.plot_slice(study, target_name=name)
    if len(paths) > 1:
        read = "Dark lines are good trials."
        yield "Parallel coordinates", read, visualization.plot_parallel_coordinate(study, target_name=name)
        read = "The objective over every two parameters, interpolated between the trials."
        yield "Contours", read, visualization.plot_contour(study, params=paths[:MOST_CONTOURS], target_name=name)


def _html(figure: go.Figure) -> Markup:
    many = len([key for key in figure.layout.to_plotly_json() if key.startswith("yaxis")]) > 4
    figure.update_layout(template="plotly_white", title=None, margin={"l": 60, "r": 20, "t": 20, "b": 60}, font={"size": 12})
    figure.update_layout(height=2 * HEIGHT if many else HEIGHT)
    return Markup(figure.to_html(include_plotlyjs=False, full_html=False, config={"displaylogo": False}))


def _rung_rows(entries: list[RungEntry]) -> list[tuple[int, int, int]]:
    """Epochs, how many trials came that far, and how many of them were stopped there."""
    rungs = sorted({entry.rung for entry in entries})
    return [(rung, sum(e.rung == rung for e in entries), sum(e.rung == rung and e.stopped for e in entries)) for rung in rungs]

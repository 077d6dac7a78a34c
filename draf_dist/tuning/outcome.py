"""What a campaign leaves behind: winner.yaml, hparams/, report.html and, last, leaderboard.json."""

from draf_dist.config.spec import yaml_text
from draf_dist.storage import Store
from draf_dist.training.run_folder import open_run
from draf_dist.training.tracking import Hparams, write_hparams
from draf_dist.tuning.folder import CampaignFolder, study_of
from draf_dist.tuning.leaderboard import Leaderboard, Row, rank_trials
from draf_dist.tuning.report import render

LEADERBOARD = "leaderboard.json"
REPORT = "report.html"
WINNER = "winner.yaml"
HPARAMS = "hparams"
NUMBERS = ("objective", "nll", "nll_scaled", "temperature", "auroc")


def write_outcome(folder: CampaignFolder) -> Leaderboard:
    """Ranks the trials and writes the files, unless all are there and those of these trials already.

    Raises:
        DrafError: no trial has a result.
    """
    found = rank_trials(folder.campaign, folder.records())
    content = found.model_dump_json(indent=2).encode()
    store, ranked = folder.store, [_hparams(row) for row in found.rows if row.rank is not None]
    if _is_whole(store, {trial.name for trial in ranked}) and store.read(LEADERBOARD) == content:
        return found
    store.write(WINNER, _winner(folder, found).encode())
    write_hparams(store, HPARAMS, ranked)
    with study_of(folder) as study:
        store.write(REPORT, render(folder.campaign, found, study, folder.entries()).encode())
    store.write(LEADERBOARD, content)
    return found


def _is_whole(store: Store, trials: set[str]) -> bool:
    shown = {path.split("/")[1] for path in store.list(HPARAMS) if path.count("/") > 1}
    return shown == trials and all(store.exists(name) for name in (WINNER, REPORT, LEADERBOARD))


def _winner(folder: CampaignFolder, board: Leaderboard) -> str:
    best = board.best
    job = open_run(f"{folder.trials_url}/{best.run}").job
    about = f"# Trial {best.trial} of campaign {board.name}: the least {board.objective} of validation, {best.objective:.4f}.\n"
    return about + f"# Its run: {folder.trials_url}/{best.run}\n" + yaml_text(job)


def _hparams(row: Row) -> Hparams:
    numbers = {name: getattr(row, name) for name in NUMBERS if getattr(row, name) is not None}
    return Hparams(f"trial-{row.trial:04}", dict(row.parameters), {**numbers, "epochs": float(row.epochs)})

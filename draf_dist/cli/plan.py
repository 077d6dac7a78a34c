"""`draf plan`: what a training job will read, before anything is read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from draf_dist.cli.output import JsonOption, SetOption, console, print_json, progress, table
from draf_dist.cli.retrain import show_plan
from draf_dist.errors import SpecError, explain

if TYPE_CHECKING:
    from draf_dist.data.release import Release
    from draf_dist.training.forecast import Forecast, SourceForecast
    from draf_dist.training.interval import Advice
    from draf_dist.training.jobs import AnyJob

Row = tuple[str, str, str]


@dataclass(frozen=True)
class CacheRoom:
    """The cache of this node as the environment sets it; folder and limit_bytes are None where shards are local files."""

    folder: str | None
    limit_bytes: int | None
    fits: bool


def plan(
    job: Annotated[Path, typer.Argument(help="The training job (YAML).")],
    overrides: SetOption = None,
    world: Annotated[int, typer.Option(min=1, help="Ranks that share a batch.")] = 1,
    measured: Annotated[
        str | None, typer.Option(help="URL of an earlier run of the same kind: says how often to save, too.", metavar="RUN")
    ] = None,
    failures_per_day: Annotated[
        float | None, typer.Option(min=0.001, help="Of the whole job, for --measured; as that run had them if not given.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what a job will read: steps, rows per rank, shuffle quality, cache, requests. Reads shard indexes, no sample.

    Of a retraining: what it trains, were it begun now. Exits 2 if the cache of this node (DRAF_CACHE_BYTES) is smaller than what
    the job holds open, as draf train would.
    With --measured: also how often to write checkpoints, from what saves, restarts and failures cost that run (Young, Daly).
    Example: draf plan jobs/finetune_synth.yaml --set release=s3://bucket/synth --set batch_size=256 --world 8
    """
    from draf_dist.data.release import open_release
    from draf_dist.training.forecast import forecast
    from draf_dist.training.plan import build_plan

    if failures_per_day is not None and measured is None:
        raise _nothing_measured()
    spec = _load(job, overrides or ())
    if spec is None:
        show_plan(None, json=json)
        return
    release = open_release(spec.release)
    with progress() as bar:
        task = bar.add_task("reading indexes", total=None)
        found = forecast(build_plan(spec, release), world, lambda done, total: bar.update(task, completed=done, total=total))
    room = _room(release, found.needed_bytes)
    advice = None if measured is None else _advise(measured, spec, found, failures_per_day)
    if json:
        told = asdict(found) | ({} if advice is None else {"checkpoint": asdict(advice)})
        print_json({"job": spec.name, "release": release.pinned_url, "seed": spec.seed, "cache": asdict(room), **told})
    else:
        _show(f"{spec.name}: {release.pinned_url}", found, room)
        if advice is not None:
            console.print(_described("checkpoints", _saving(advice)))
    if not room.fits:
        raise _too_small(found, room)


def _load(path: Path, overrides: Sequence[str]) -> "AnyJob | None":
    """The job in a file, or that which a retraining means at this moment; None if that has nothing to train."""
    from draf_dist.config.spec import read_yaml
    from draf_dist.training.jobs import load_job

    if read_yaml(path).get("kind") != "retrain":
        return load_job(path, overrides)
    from draf_dist.continual.retrain import plan_retraining
    from draf_dist.continual.retrain_job import load_retrain

    retraining = plan_retraining(load_retrain(path, overrides))
    return None if retraining is None else retraining.job


def _nothing_measured() -> SpecError:
    remedy = "Name an earlier run of the same kind: it says what a save and a restart cost."
    return SpecError(explain("--failures-per-day", expected="--measured RUN beside it", found="none", remedy=remedy))


def _advise(measured: str, spec: "AnyJob", found: "Forecast", failures_per_day: float | None) -> "Advice":
    from draf_dist.training.interval import advise
    from draf_dist.training.run_folder import open_run

    every, epoch = spec.checkpoint.every_steps, found.steps_per_epoch
    return advise(
        open_run(measured), every_steps=every, steps_per_epoch=epoch, world=found.world, failures_per_day=failures_per_day
    )


def _room(release: "Release", needed_bytes: int) -> CacheRoom:
    from draf_dist.data.local_shards import is_local
    from draf_dist.data.node_cache import default_cache
    from draf_dist.data.shard_reader import ShardReader

    if is_local(ShardReader(release, "train")):
        return CacheRoom(None, None, fits=True)
    cache = default_cache()
    return CacheRoom(str(cache.folder), cache.limit_bytes, fits=needed_bytes <= cache.limit_bytes)


def _too_small(found: "Forecast", room: CacheRoom) -> SpecError:
    assert room.limit_bytes is not None  # what is local always fits
    needed = found.needed_bytes
    return SpecError(
        explain(
            f"cache of this node, {room.folder}",
            expected=f"a limit of at least {size(needed)}, the working set of training and that of validation",
            found=size(room.limit_bytes),
            remedy=f"Set DRAF_CACHE_BYTES={needed} or more, or make open_samples, groups or batch_size of the job smaller.",
        )
    )


def _show(title: str, found: "Forecast", room: CacheRoom) -> None:
    console.print(_described(title, [*_steps(found), *_bytes(found, room)]))
    for source in found.sources:
        console.print(_described("the release" if len(found.sources) == 1 else f"source {source.name}", _source(source)))


def _described(title: str, rows: Sequence[Row]) -> Table:
    made = table(title, ("", "", "what it means"), rows)
    made.columns[-1].justify = "left"
    return made


def _steps(found: "Forecast") -> list[Row]:
    low, high = found.rows
    rows = str(low) if low == high else f"{low} to {high}"
    return [
        ("batch", f"{found.batch_size:,}", f"samples, over all ranks; the epoch's last: {found.last_batch:,}"),
        ("steps per epoch", f"{found.steps_per_epoch:,}", "between two validations"),
        ("rows per rank", rows, f"of {found.world}; the most is {found.imbalance:.1%} above the mean"),
        ("memory of the order", size(found.order_bytes), "in every process"),
    ]


def _bytes(found: "Forecast", room: CacheRoom) -> list[Row]:
    if room.limit_bytes is None:
        limit = ("cache limit", "not used", "the shards are local files")
    else:
        limit = ("cache limit", size(room.limit_bytes), f"{'enough' if room.fits else 'TOO SMALL'}; {room.folder}")
    return [
        ("bytes per epoch", size(found.epoch_bytes), "each block fetched once"),
        ("requests per epoch", f"{found.epoch_blocks:,}", f"at most: one for each block of {size(found.block_bytes)}"),
        ("before the first batch", size(found.first_batch_bytes), f"its blocks, for all ranks: {found.first_batch_blocks:,}"),
        ("working set", size(found.working_set_bytes), f"at most open at once; {found.ahead_steps} steps ahead included"),
        ("of validation", size(found.validation_bytes), f"likewise, besides: {size(found.needed_bytes)} in all"),
        limit,
        *_volumes(found),
    ]


def _volumes(found: "Forecast") -> list[Row]:
    epoch, step = found.epoch_volumes, found.step_volumes
    if not epoch.blocks:
        return []
    return [
        ("volumes per epoch", size(epoch.bytes), f"at most, read past the cache; requests: {epoch.blocks:,}"),
        ("volumes per step", size(step.bytes), f"at most, of all ranks; requests: {step.blocks:,}"),
    ]


def _source(source: "SourceForecast") -> list[Row]:
    return [
        ("samples", f"{source.num_samples:,}", f"in {size(source.read_bytes)}; number of shards: {source.num_shards:,}"),
        ("groups", f"{source.groups:,}", f"places of the epoch that feed a batch's {source.share:,}"),
        ("window", f"{source.window:,}", "samples of a group that are shuffled together"),
        ("shuffle of sites", _ratio(source.site_quality), "variance over a full shuffle's: 1 is perfect,"),
        ("shuffle of labels", _ratio(source.label_quality), f"more is worse; measured on {source.quality_batches:,} batches"),
    ]


def _saving(advice: "Advice") -> list[Row]:
    from draf_dist.training.progress import duration

    costs = advice.costs
    known = {
        "given": "as --failures-per-day says",
        "measured": f"number that the measured run had: {advice.failures}",
        "published": "as published for so many GPUs; the measured run had none",
    }
    restart = f"mean of {costs.restarts}" if costs.restarts else "as long as the first start took; there was no restart"
    return [
        ("checkpoint.every_steps", f"{advice.every_steps:,}", f"recommended: every {duration(advice.every_steps * costs.step_s)}"),
        ("costs then", f"{advice.waste:.2%}", f"of the time, for saves ({advice.epoch_saves:,} an epoch), lost work and restarts"),
        (
            "costs as the job is",
            f"{advice.job_waste:.2%}",
            f"every {advice.job_every_steps:,} steps: {advice.job_epoch_saves:,} an epoch",
        ),
        ("between failures", duration(advice.mtbf_s), known[advice.mtbf_source]),
        ("a save", f"{costs.save_s:.3f} s", f"training waits; median of {costs.saves}"),
        ("steps slowed by it", f"{costs.slowed_s:.3f} s", "in all"),
        ("until it is durable", f"{costs.durable_s:.3f} s", "the next save waits for it"),
        ("a restart", duration(costs.restart_s), restart),
        ("a step", f"{costs.step_s:.3f} s", "waiting for its batch included"),
    ]


def _ratio(quality: float | None) -> str:
    return "one kind" if quality is None else f"{quality:.2f}"


def size(num_bytes: int) -> str:
    """Bytes for people, in powers of 1000."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"

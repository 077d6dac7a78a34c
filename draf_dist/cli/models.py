"""`draf models register | list | show | gate | promote | rollback | predict`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from draf_dist.cli.output import DryRunOption, JsonOption, SetOption, console, print_json, progress, table
from draf_dist.errors import GateError, SpecError, explain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from draf_dist.continual.registry import Registry
    from draf_dist.continual.verdict import Verdict
    from draf_dist.continual.version import ModelVersion

app = typer.Typer(no_args_is_help=True)
NameArgument = Annotated[str, typer.Argument(help="The model.")]
WhichArgument = Annotated[str, typer.Argument(metavar="NAME[@alias|@version]", help="The model; its champion if nothing follows.")]
RegistryOption = Annotated[
    str | None,
    typer.Option("--registry", help="sqlite:///PATH; else DRAF_REGISTRY of the environment, else sqlite:///registry.db."),
]
ReasonOption = Annotated[str, typer.Option(help="Why, for the history.")]
VersionOption = Annotated[int | None, typer.Option("--version", help="Which version; the challenger if not given.")]


@app.command("register")
def register(
    run: Annotated[str, typer.Argument(help="URL of a finished fine-tuning run.")],
    model: Annotated[str, typer.Option(help="The model that it becomes a version of.")],
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Make a finished fine-tuning run a version of a model, and its challenger.

    Example: draf models register runs/first --model mortality
    """
    version = _registry(registry).register(model, run)
    if json:
        print_json(_about(version))
        return
    note = f" ({', '.join(version.aliases)})" if version.aliases else ""
    console.print(f"{model} version {version.version}{note}: {version.run_url}", soft_wrap=True, highlight=False)


@app.command("list")
def list_models(registry: RegistryOption = None, json: JsonOption = False) -> None:
    """All models with their champion and challenger.

    Example: draf models list
    """
    opened = _registry(registry)
    rows = []
    for name in opened.names():
        champion, challenger = opened.champion(name), opened.challenger(name)
        numbers = [None if each is None else each.version for each in (champion, challenger)]
        rows.append({"name": name, "champion": numbers[0], "challenger": numbers[1], "versions": len(opened.versions(name))})
    if json:
        print_json({"registry": str(opened.path), "models": rows})
        return
    cells = [["-" if cell is None else cell for cell in row.values()] for row in rows]
    console.print(table(f"models in {opened.path}", ("model", "champion", "challenger", "versions"), cells))


@app.command("show")
def show(
    model: Annotated[str, typer.Argument(metavar="NAME[@alias|@version]", help="The model, or one version of it.")],
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """A model's versions and history; or one version with the verdict on it.

    Example: draf models show mortality@challenger
    """
    opened = _registry(registry)
    name, at, which = model.partition("@")
    if at:
        _show_version(opened, _resolve(opened, name, which), json=json)
        return
    versions, history = opened.versions(name), opened.history(name)
    verdicts = {version.version: _verdicts(version, versions) for version in versions}
    if json:
        moves = [move.model_dump(mode="json") for move in history]
        about = [{**_about(version), "verdicts": verdicts[version.version]} for version in versions]
        print_json({"name": name, "versions": about, "history": moves})
        return
    rows = [
        (v.version, ", ".join(v.aliases) or "-", v.verdict.decision if v.verdict else "-", v.weights_sha256[:12], v.run_url)
        for v in versions
    ]
    console.print(table(name, ("version", "alias", "verdict", "weights", "run"), rows))
    _print_verdicts(name, verdicts)
    keys = ("time", "action", "version", "previous", "reason", "policy", "holdout")
    past = [[getattr(move, key) or "-" for key in keys] for move in history]
    console.print(table("history", ("time", "action", "champion", "before", "reason", "policy", "holdout"), past))


@app.command("gate")
def gate(
    name: NameArgument,
    holdout: Annotated[str, typer.Option(help="The frozen holdout, URL@version of a release.")],
    version: VersionOption = None,
    policy: Annotated[Path | None, typer.Option(help="The policy (YAML); the defaults if not given.")] = None,
    overrides: SetOption = None,
    out: Annotated[str | None, typer.Option(help="Folder for verdict.json and gate.html.")] = None,
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Judge a version against the champion, and keep the verdict. Exits 4 unless it is to promote.

    Example: draf models gate mortality --holdout s3://bucket/icu@3f1c9a0b5d2e7f64 --policy jobs/gate_default.yaml --out gates/first
    """
    from draf_dist.config.spec import apply_overrides, read_yaml, validate_spec
    from draf_dist.continual.gate import run_gate
    from draf_dist.continual.gate_report import REPORT, write_verdict
    from draf_dist.continual.policy import GatePolicy
    from draf_dist.continual.serve import check_model
    from draf_dist.storage import open_store

    tree = {} if policy is None else read_yaml(policy)
    apply_overrides(tree, overrides or ())
    spec = validate_spec(tree, GatePolicy, where="--set" if policy is None else str(policy))
    opened = _registry(registry)
    candidate, champion = _version_or_challenger(opened, name, version), opened.champion(name)
    if champion is None:
        remedy = "The first needs no verdict: draf models promote."
        raise GateError(explain(f"model {name}", expected="a champion to compare with", found="none", remedy=remedy))
    if candidate.version == champion.version or candidate.model_sha256 == champion.model_sha256:
        found, remedy = f"version {candidate.version}, which is the champion", "Name another version with --version."
        raise SpecError(explain(f"model {name}", expected="a version other than the champion", found=found, remedy=remedy))
    for version_judged in (champion, candidate):
        check_model(version_judged)
    with progress() as bar:
        task = bar.add_task("comparing", total=None)
        verdict = run_gate(
            champion.run_url,
            candidate.run_url,
            holdout,
            spec,
            lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total),
        )
    opened.record_verdict(name, candidate.version, verdict)
    if out is not None:
        write_verdict(open_store(out), verdict)
    if json:
        print_json(verdict.model_dump(mode="json"))
    else:
        print_verdict(verdict)
        if out is not None:
            console.print(f"Report: {out.rstrip('/')}/{REPORT}", soft_wrap=True, highlight=False)
    if verdict.decision != "promote":
        raise typer.Exit(GateError.exit_code)


@app.command("promote")
def promote(
    name: NameArgument,
    version: VersionOption = None,
    reason: ReasonOption = "",
    registry: RegistryOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Make a version the champion; needs a verdict `promote` against the present one.

    Example: draf models promote mortality
    """
    opened = _registry(registry)
    candidate = _version_or_challenger(opened, name, version)
    if dry_run:
        opened.promotable(name, candidate.version)
        _print_move("Would become", candidate, json=json)
        return
    _print_move("Is now", opened.promote(name, candidate.version, reason), json=json)


@app.command("rollback")
def rollback(
    name: NameArgument,
    reason: ReasonOption = "",
    registry: RegistryOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Make the champion before this one champion again.

    Example: draf models rollback mortality --reason "more alarms at night"
    """
    opened = _registry(registry)
    if dry_run:
        _print_move("Would become", opened.rollback_target(name)[0], json=json)
        return
    _print_move("Is now", opened.rollback(name, reason), json=json)


@app.command("predict")
def predict(
    model: WhichArgument,
    release: Annotated[str, typer.Option(help="The release, with or without a version.")],
    out: Annotated[str, typer.Option(help="The parquet file to write, a path or s3://bucket/key.")],
    split: Annotated[str, typer.Option(help="train, val, test or ood.")] = "test",
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Predict a split of a release with a registered model, calibrated; the same command writes the same bytes.

    Example: draf models predict mortality --release s3://bucket/icu --split test --out predictions.parquet
    """
    from draf_dist.continual.serve import predict as predict_with
    from draf_dist.evaluation.predictions import write_predictions
    from draf_dist.schema.release import SPLITS
    from draf_dist.storage import open_store

    chosen = next((known for known in SPLITS if known == split), None)
    if chosen is None:
        raise SpecError(explain("--split", expected=f"one of {', '.join(SPLITS)}", found=repr(split), remedy="Name one of them."))
    folder, slash, file = out.rpartition("/")
    if not file.strip():
        raise SpecError(explain("--out", expected="a file", found=repr(out), remedy="For example predictions.parquet."))
    name, _, which = model.partition("@")
    version = _resolve(_registry(registry), name, which or "champion")
    store = open_store(folder or slash or ".")
    with progress() as bar:
        task = bar.add_task("predicting", total=None)
        found = predict_with(
            version, release, chosen, lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)
        )
    write_predictions(store, file, [found])
    if json:
        print_json({"file": out, "model": name, "version": version.version, "num_studies": found.num_studies})
        return
    console.print(f"{found.num_studies} studies by {name} version {version.version}: {out}", soft_wrap=True, highlight=False)


def print_verdict(verdict: "Verdict") -> None:
    """The decision, and one line for every reason."""
    colour = {"promote": "green", "refuse": "red", "cannot_tell": "yellow"}[verdict.decision]
    named = f": {', '.join(verdict.sites)}" if verdict.sites else ""
    console.print(f"[bold {colour}]{verdict.decision.replace('_', ' ')}[/]{escape(named)}", highlight=False)
    for reason in verdict.reasons:
        console.print(f"  {escape(reason)}", highlight=False, soft_wrap=True)


def _registry(url: str | None) -> "Registry":
    from draf_dist.continual.registry import Registry

    return Registry(url)


def _resolve(registry: "Registry", name: str, which: str) -> "ModelVersion":
    """The version that an alias or a number names."""
    if which.isdecimal():
        return registry.version(name, int(which))
    found = {"champion": registry.champion, "challenger": registry.challenger}.get(which)
    if found is None:
        remedy = "For example mortality@champion or mortality@2."
        raise SpecError(explain(f"{name}@{which}", expected="champion, challenger or a number", found=repr(which), remedy=remedy))
    version = found(name)
    if version is None:
        remedy = "See draf models show."
        raise SpecError(explain(f"model {name}", expected=f"a {which}", found="none", remedy=remedy))
    return version


def _version_or_challenger(registry: "Registry", name: str, number: int | None) -> "ModelVersion":
    return _resolve(registry, name, "challenger" if number is None else str(number))


def _about(version: "ModelVersion") -> dict[str, Any]:
    """One version for machines; of the verdict what it decided."""
    verdict = version.verdict
    kept = None if verdict is None else verdict.model_dump(mode="json", include={"decision", "sites", "subjects_needed", "reasons"})
    return {
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "run": version.run_url,
        "weights_sha256": version.weights_sha256,
        "model_sha256": version.model_sha256,
        "job_sha256": version.job_sha256,
        "release": version.release,
        "temperature": version.temperature,
        "verdict": kept,
    }


def _verdicts(version: "ModelVersion", versions: "Sequence[ModelVersion]") -> list[dict[str, Any]]:
    """Every verdict on a version, oldest first: what was decided, by which policy, on which holdout, against which champion."""
    numbers = {each.weights_sha256: each.version for each in reversed(versions)}
    kept = []
    for verdict in version.verdicts:
        about = verdict.lineage
        champion = "" if about is None else about.champion.weights_sha256
        kept.append(
            {
                "decision": verdict.decision,
                "policy": verdict.policy_fingerprint,
                "holdout": "" if about is None else about.holdout,
                "champion_version": numbers.get(champion),
                "champion_weights_sha256": champion,
            }
        )
    return kept


def _print_verdicts(name: str, verdicts: "Mapping[int, list[dict[str, Any]]]") -> None:
    rows = [
        (
            number,
            each["decision"],
            each["policy"],
            each["holdout"],
            each["champion_version"] or "-",
            each["champion_weights_sha256"][:12],
        )
        for number, kept in verdicts.items()
        for each in kept
    ]
    if rows:
        console.print(table(f"verdicts on {name}", ("version", "verdict", "policy", "holdout", "against", "weights"), rows))


def _show_version(registry: "Registry", version: "ModelVersion", *, json: bool) -> None:
    about, verdicts = _about(version), _verdicts(version, registry.versions(version.name))
    if json:
        print_json({**about, "verdicts": verdicts})
        return
    rows = [(key.replace("_", " "), value) for key, value in about.items() if key not in ("verdict", "aliases")]
    rows.append(("aliases", ", ".join(version.aliases) or "-"))
    console.print(table(f"{version.name} version {version.version}", ("", ""), rows))
    if version.verdict is None:
        console.print("No verdict yet.")
    else:
        _print_verdicts(version.name, {version.version: verdicts})
        print_verdict(version.verdict)


def _print_move(what: str, version: "ModelVersion", *, json: bool) -> None:
    if json:
        print_json(_about(version))
        return
    console.print(f"{what} the champion: {version.name} version {version.version}.", highlight=False)

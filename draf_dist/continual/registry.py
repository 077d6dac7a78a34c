"""The model registry: MLflow on one SQLite file. What may become champion is decided here; what the gate found is kept here.

A version is a finished fine-tuning run. Everything known of it lies in tags, so MLflow's own tools show it too. The history of a
model is append-only and decides who is champion; MLflow's alias `champion` follows it.
"""

import fcntl
import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from draf_dist.continual.history import Move, Tags, line_of_champions, moves_in, promotion, roll_back
from draf_dist.continual.serve import check_model, model_sha256, temperature_of
from draf_dist.continual.verdict import Verdict
from draf_dist.continual.version import CHALLENGER, CHAMPION, ModelVersion
from draf_dist.errors import DrafError, GateError, SpecError, UnreachableError, explain
from draf_dist.evaluation.subject import open_subject

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as Stored
    from mlflow.entities.model_registry import RegisteredModel
    from mlflow.tracking import MlflowClient

DEFAULT_URL = "sqlite:///registry.db"
ENVIRONMENT = "DRAF_REGISTRY"
PREFIX = "sqlite:///"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
VERDICT = "draf.verdict."
# MLflow takes 100,000 characters a tag; the verdict of hundreds of sites is longer.
TAG_LENGTH = 90_000
# Models of a registry, and versions of a model, that are listed.
LIMIT = 1000


class Registry:
    """The models in one SQLite file; several processes may use it at once.

    url: sqlite:///PATH; if not given, that in the environment variable DRAF_REGISTRY, else registry.db in the working folder.

    Raises:
        SpecError: the URL is not sqlite:///PATH. Later, by any method: no registry there, or no such model or version.
        UnreachableError: by any method: the file can't be read or written.
    """

    def __init__(self, url: str | None = None) -> None:
        url = url or os.environ.get(ENVIRONMENT) or DEFAULT_URL
        if not url.startswith(PREFIX) or not url.removeprefix(PREFIX).strip():
            remedy = f"For example {DEFAULT_URL}, a file in this folder."
            raise SpecError(explain("registry", expected=f"{PREFIX}PATH", found=repr(url.partition(":")[0]), remedy=remedy))
        self.path = Path(url.removeprefix(PREFIX)).expanduser().absolute()

    def register(self, name: str, run_url: str) -> ModelVersion:
        """Makes a finished fine-tuning run a version of the model; a new version becomes the challenger.

        The same model of the same run is one version, however often it is registered; registering it again changes nothing. Fits
        the temperature on the validation split of the release that the run was trained on. Makes the registry and the model where
        there is none.

        Raises:
            SpecError: a name that can't be one, no such run, or one that is not finished.
            DataError: damaged files.
        """
        if not NAME.fullmatch(name):
            remedy = "For example mortality-icu."
            raise SpecError(explain("model name", expected="lower-case letters, digits, - and _", found=repr(name), remedy=remedy))
        subject = open_subject(run_url, None)
        # Before the lock: it reads a whole split.
        temperature, description = temperature_of(subject).value, model_sha256(subject.run)
        with self._changing():
            if not self._client.search_registered_models(filter_string=f"name = '{name}'"):
                self._client.create_registered_model(name)
            number = self._number_of(name, subject.run.url, description)
            if number is None:
                tags = {
                    "draf.weights_sha256": subject.weights_sha256,
                    "draf.model_sha256": description,
                    "draf.job_sha256": subject.job.sha256,
                    "draf.release": subject.job.release,
                    "draf.temperature": repr(temperature),
                }
                number = int(self._client.create_model_version(name, subject.run.url, tags=tags, await_creation_for=0).version)
                self._client.set_registered_model_alias(name, CHALLENGER, str(number))
            return self.version(name, number)

    def names(self) -> list[str]:
        """The models, in alphabetical order."""
        with self._reading():
            return sorted(model.name for model in self._client.search_registered_models(max_results=LIMIT))

    def versions(self, name: str) -> list[ModelVersion]:
        """The versions of a model, oldest first."""
        with self._reading():
            model = self._model(name)
            stored = self._client.search_model_versions(f"name = '{name}'", max_results=LIMIT)
            return [_version(each, model) for each in sorted(stored, key=lambda each: int(each.version))]

    def version(self, name: str, number: int) -> ModelVersion:
        """One version."""
        known = {version.version: version for version in self.versions(name)}
        if number not in known:
            remedy = f"There are: {', '.join(map(str, known)) or 'none'}."
            raise SpecError(explain(f"model {name}", expected="one of its versions", found=f"{number}", remedy=remedy))
        return known[number]

    def champion(self, name: str) -> ModelVersion | None:
        """The version in use; None before the first promotion."""
        return next((version for version in self.versions(name) if CHAMPION in version.aliases), None)

    def challenger(self, name: str) -> ModelVersion | None:
        """The version that stands for promotion; None where none does."""
        return next((version for version in self.versions(name) if CHALLENGER in version.aliases), None)

    def history(self, name: str) -> list[Move]:
        """Every promotion and rollback, oldest first."""
        with self._reading():
            return moves_in(self._model(name).tags)

    def record_verdict(self, name: str, version: int, verdict: Verdict) -> ModelVersion:
        """Keeps what the gate found of a version, after what it found before; the newest decides. The newest again changes nothing.

        Raises:
            GateError: the verdict is on other weights.
        """
        with self._reading(), self._changing():
            about = self.version(name, version)
            judged = verdict.lineage.challenger.weights_sha256 if verdict.lineage else "none"
            if judged != about.weights_sha256:
                where, expected = f"{name} version {version}", f"a verdict on its weights, sha256 {about.weights_sha256[:12]}"
                remedy = "Judge this version's run as the challenger."
                raise GateError(explain(where, expected=expected, found=f"one on {judged[:12]}", remedy=remedy))
            if about.verdict != verdict:
                self._append_verdict(name, str(version), verdict.model_dump_json())
            return self.version(name, version)

    def promote(self, name: str, version: int, reason: str = "") -> ModelVersion:
        """Makes a version the champion; does nothing if it is.

        The first champion of a model needs no verdict: there is nothing to compare it with.

        Raises:
            GateError: no verdict `promote` on it against the champion of this moment, or its run folder holds another model.
        """

        def move() -> Move | None:
            candidate, current = self.promotable(name, version)
            if current is None:
                return promotion(version, None, reason or "first champion", None)
            if current.version == version:
                return None
            return promotion(version, current.version, reason or "verdict promote", candidate.verdict)

        with self._reading(), self._changing():
            if self._tags(name).append(move) and CHALLENGER in self.version(name, version).aliases:
                self._client.delete_registered_model_alias(name, CHALLENGER)
            return self.version(name, version)

    def promotable(self, name: str, version: int) -> tuple[ModelVersion, ModelVersion | None]:
        """The version and the champion that it may follow; raises as `promote`, and changes nothing."""
        candidate, current = self.version(name, version), self.champion(name)
        if current is None or current.version != version:
            _check_verdict(candidate, current)
            check_model(candidate)
        return candidate, current

    def rollback(self, name: str, reason: str = "") -> ModelVersion:
        """Makes the champion before this one champion again; once more goes one further back.

        What was rolled back can be promoted again: the verdict on it was against the version that is champion now.

        Raises:
            GateError: there is no earlier champion, or its run folder holds another model.
        """

        def move() -> Move:
            back, current = self.rollback_target(name)
            return roll_back(back.version, current, reason or "asked for")

        with self._reading(), self._changing():
            moved = self._tags(name).append(move)
            assert moved is not None
            return self.version(name, moved.version)

    def rollback_target(self, name: str) -> tuple[ModelVersion, int]:
        """The version to return to, and the number of the champion; raises as `rollback`, and changes nothing."""
        line = line_of_champions(self.history(name))
        if len(line) < 2:
            remedy = "Promote another version instead."
            found = "none" if not line else f"version {line[0]} alone"
            raise GateError(explain(f"model {name}", expected="an earlier champion to return to", found=found, remedy=remedy))
        back = self.version(name, line[-2])
        check_model(back)
        return back, line[-1]

    def _append_verdict(self, name: str, version: str, text: str) -> None:
        """The first part last: without it, after a kill, the others count for nothing."""
        taken = [key for key in self._client.get_model_version(name, version).tags if key.startswith(VERDICT)]
        number = 1 + max((int(key.removeprefix(VERDICT).partition(".")[0]) for key in taken), default=-1)
        parts = [text[start : start + TAG_LENGTH] for start in range(0, len(text), TAG_LENGTH)]
        for index in reversed(range(len(parts))):
            self._client.set_model_version_tag(name, version, f"{VERDICT}{number:04d}.{index:03d}", parts[index])

    def _tags(self, name: str) -> Tags:
        set_tag, set_alias = self._client.set_registered_model_tag, self._client.set_registered_model_alias
        return Tags(dict(self._model(name).tags), partial(set_tag, name), partial(set_alias, name))

    def _number_of(self, name: str, run_url: str, description: str) -> int | None:
        """The version that this model of this run is already."""
        same = [each for each in self.versions(name) if (each.run_url, each.model_sha256) == (run_url, description)]
        return same[0].version if same else None

    def _model(self, name: str) -> "RegisteredModel":
        # What can't be a name can't be there, and must not get into a query either.
        found = self._client.search_registered_models(filter_string=f"name = '{name}'") if NAME.fullmatch(name) else []
        if not found:
            known = self.names()
            remedy = f"There are: {', '.join(known[:20])}." if known else "Register a run first: draf models register."
            raise SpecError(explain(str(self.path), expected="a registered model", found=f"no {name!r}", remedy=remedy))
        return found[0]

    @cached_property
    def _client(self) -> "MlflowClient":
        """MLflow, quiet: importing it takes seconds, so only who needs it does."""
        # It reports its use to its makers unless told not to; both names are looked at.
        os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        from mlflow.tracking import MlflowClient

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        url = f"{PREFIX}{self.path}"
        return MlflowClient(tracking_uri=url, registry_uri=url)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Refuses a file that is no registry before MLflow would make one of it."""
        if not self.path.exists() or (self.path.is_file() and self.path.stat().st_size == 0):
            remedy = f"draf models register makes one; or name another with --registry or {ENVIRONMENT}."
            raise SpecError(explain(str(self.path), expected="a registry", found="nothing", remedy=remedy))
        with self._explained():
            self._check_file()
            yield

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the registry against other processes; the lock goes with its holder, even a killed one."""
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._check_file()
            with self.path.with_name(f"{self.path.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield

    def _check_file(self) -> None:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        with closing(sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'registered_models'").fetchone()
        if found is None:
            remedy = "Name another file."
            raise SpecError(explain(str(self.path), expected="a registry", found="another database", remedy=remedy))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the database says, as an error of the project; without its text, which quotes statements."""
        try:
            yield
        except DrafError:
            raise
        except _errors_of_a_database() as error:
            expected, found = "a registry that can be read and written", type(error).__name__
            remedy = "Check the file and its permissions; a registry of another version of MLflow needs that version."
            raise UnreachableError(explain(str(self.path), expected=expected, found=found, remedy=remedy)) from error


def _errors_of_a_database() -> tuple[type[Exception], ...]:
    """Looked up when something has gone wrong, and not before: importing MLflow takes seconds."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return OSError, sqlite3.Error, SQLAlchemyError, MlflowException


def _version(stored: "Stored", model: "RegisteredModel") -> ModelVersion:
    number, tags = int(stored.version), stored.tags
    *earlier, verdict = _verdicts(tags) or [None]
    aliases = [CHAMPION] if line_of_champions(moves_in(model.tags))[-1:] == [number] else []
    aliases += [CHALLENGER] if model.aliases.get(CHALLENGER) in (number, str(number)) else []
    return ModelVersion(
        name=stored.name,
        version=number,
        run_url=stored.source or "",
        weights_sha256=tags["draf.weights_sha256"],
        job_sha256=tags["draf.job_sha256"],
        release=tags["draf.release"],
        temperature=float(tags["draf.temperature"]),
        verdict=verdict,
        aliases=tuple(aliases),
        model_sha256=tags.get("draf.model_sha256", ""),
        earlier_verdicts=tuple(each for each in earlier if each is not None),
    )


def _verdicts(tags: Mapping[str, str]) -> list[Verdict | None]:
    """Oldest first; of draf.verdict.NUMBER.PART, those whose first part, which was written last, is there."""
    parts = sorted(key for key in tags if key.startswith(VERDICT))
    whole = ("".join(tags[key] for key in keys) for keys in _grouped(parts) if keys[0].endswith(".000"))
    return [Verdict.model_validate_json(text) for text in whole]


def _grouped(keys: list[str]) -> list[list[str]]:
    return [list(group) for _, group in groupby(keys, key=lambda key: key.rpartition(".")[0])]


def _check_verdict(candidate: ModelVersion, current: ModelVersion | None) -> None:
    if current is None:
        return
    where, verdict = f"{candidate.name} version {candidate.version}", candidate.verdict
    expected = f"a verdict `promote` against version {current.version}, the champion"
    if verdict is None or verdict.lineage is None:
        remedy = "Judge it first: draf models gate."
        raise GateError(explain(where, expected=expected, found="none", remedy=remedy))
    if verdict.lineage.champion.weights_sha256 != current.weights_sha256:
        remedy = "Judge it again: draf models gate."
        raise GateError(explain(where, expected=expected, found="one against an older champion", remedy=remedy))
    if verdict.decision != "promote":
        found = f"`{verdict.decision}`" + (f" ({', '.join(verdict.sites)})" if verdict.sites else "")
        raise GateError(explain(where, expected=expected, found=found, remedy="See draf models show."))

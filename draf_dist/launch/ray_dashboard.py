"""The way to a cluster's Jobs API: with the token, within time limits, over a short loss of the connection, errors in our terms."""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from draf_dist.errors import DrafError, SpecError, UnreachableError, explain
from draf_dist.launch.ray_cluster import environment

# To connect, and between two bytes of an answer. The cluster may take ten seconds to find the agent that starts a job.
TIMEOUT_S = (5.0, 60.0)
# How long a connection may be away before that is an error: a tunnel that is opened again, a dashboard that starts again.
PATIENCE_S = 30.0
RETRY_INTERVAL_S = 1.0
# Either would make Ray's client go elsewhere, whatever address it is given.
_ELSEWHERE = {"RAY_ADDRESS": None, "RAY_API_SERVER_ADDRESS": None}

# What they say about an upload, we have said.
for _name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class Dashboard(JobSubmissionClient):
    """Ray's own client, made ready for following a job for days.

    Raises:
        UnreachableError: nothing answers, or it is no Ray cluster, or it refuses the token.
        SpecError: RAY_AUTH_TOKEN_PATH names no file.
    """

    def __init__(self, url: str) -> None:
        self._patience_s = 0.0
        self._token = find_token(os.environ)
        self.url = url
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        with environment(_ELSEWHERE):
            try:
                super().__init__(url, headers=headers)
            except (RuntimeError, ValueError, KeyError) as error:
                raise self._unreachable(f"something else ({type(error).__name__})") from error
        self._patience_s = PATIENCE_S

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        """Ray's own waits for ever. What only asks is asked again."""
        deadline = time.monotonic() + (self._patience_s if method == "GET" else 0.0)
        while True:
            try:
                return super()._do_request(method, endpoint, timeout=TIMEOUT_S, **options)
            except AuthenticationError as error:
                raise self._refused() from error
            except requests.RequestException as error:
                if time.monotonic() >= deadline:
                    raise self._unreachable(f"none that answers ({type(error).__name__})") from error
                time.sleep(RETRY_INTERVAL_S)

    def _raise_error(self, r: requests.Response) -> NoReturn:
        """Without the answer's own text, which may be a traceback from inside the cluster."""
        if r.status_code == requests.codes.not_found:
            remedy = "A cluster that was started anew knows nothing of before: submit again, and the run continues."
            raise UnreachableError(
                explain(self.url, expected="a cluster that knows this submission", found="another", remedy=remedy)
            )
        remedy = "See dashboard.log and dashboard_agent.log on the head; another Ray there may have taken a port."
        raise DrafError(explain(self.url, expected="Ray's Jobs API to answer", found=f"HTTP {r.status_code}", remedy=remedy))

    def _unreachable(self, found: str) -> UnreachableError:
        remedy = "Check `dashboard` in the profile, and the tunnel to it (docs/clusters.md)."
        return UnreachableError(explain(self.url, expected="the dashboard of a Ray cluster", found=found, remedy=remedy))

    def _refused(self) -> UnreachableError:
        found = "one that the cluster refuses" if self._token else "none"
        remedy = "Set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (else ~/.ray/auth_token is read), and check that the address is right."
        return UnreachableError(explain(self.url, expected="this cluster's token", found=found, remedy=remedy))


def find_token(variables: Mapping[str, str]) -> str | None:
    """The token where Ray itself looks for it: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token; None without one.

    Read here because Ray reads it once per process, and only if RAY_AUTH_MODE was `token` when it was imported.

    Raises:
        SpecError: RAY_AUTH_TOKEN_PATH names no file.
    """
    if variables.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return None
    if token := variables.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = variables.get("RAY_AUTH_TOKEN_PATH", "")
    path = Path(named or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        if not named:
            return None
        found = f"{named}, which can't be read"
        raise SpecError(explain("RAY_AUTH_TOKEN_PATH", expected="a file", found=found, remedy="Correct the path.")) from error

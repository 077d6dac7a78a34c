"""The way to a cluster's Jobs API: with the token, within time limits, over a short loss of the connection, errors in our terms."""

import logging
import os
import time
from typing import Any, NoReturn

import requests
from ray.job_submission import JobSubmissionClient

from draf_dist.errors import DrafError, UnreachableError, explain
from draf_dist.launch.bundle import is_this_machine
from draf_dist.launch.package import find_token
from draf_dist.launch.ray_cluster import environment

# To connect, and between two bytes of an answer. The cluster may take ten seconds to find the agent that starts a job.
TIMEOUT_S = (5.0, 60.0)
# How long a connection may be away before that is an error: a tunnel that is opened again, a dashboard that starts again.
PATIENCE_S = 30.0
RETRY_INTERVAL_S = 1.0
# What stands before a dashboard says so while that one is away.
_AWAY = (requests.codes.bad_gateway, requests.codes.service_unavailable, requests.codes.gateway_timeout)
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
            except (RuntimeError, ValueError, KeyError, requests.RequestException) as error:
                raise self._unreachable(f"something else ({type(error).__name__})") from error
        self._patience_s = PATIENCE_S

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        """Ray's own waits for ever. What only asks is asked again."""
        deadline = time.monotonic() + (self._patience_s if method == "GET" else 0.0)
        while True:
            try:
                answer = self._send(method, endpoint, **options)
                if method != "GET" or answer.status_code not in _AWAY:
                    return answer
                why, cause = f"HTTP {answer.status_code}", None
            except requests.RequestException as error:
                why, cause = type(error).__name__, error
            if time.monotonic() >= deadline:
                raise self._unreachable(f"none that answers ({why})") from cause
            time.sleep(RETRY_INTERVAL_S)

    def _send(
        self, method: str, endpoint: str, *, data: bytes | None = None, json_data: dict[str, Any] | None = None
    ) -> requests.Response:
        """One request. Ray's own would send ~/.netrc in place of the token, and the token through a proxy even to this machine."""
        address = self._address + endpoint
        with requests.Session() as session:
            session.trust_env = False
            session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
            session.proxies = {} if is_this_machine(address) else requests.utils.get_environ_proxies(address)
            # An answer that leads elsewhere would take the token along.
            answer = session.request(
                method, address, data=data, json=json_data, headers=self._own_headers(), timeout=TIMEOUT_S, allow_redirects=False
            )
        if answer.status_code in (requests.codes.unauthorized, requests.codes.forbidden):
            raise self._refused()
        return answer

    def _own_headers(self) -> dict[str, str]:
        """Ray's, but for its token: that is one of another cluster where this process has joined one before."""
        others = {name: value for name, value in (self._headers or {}).items() if name.lower() != "authorization"}
        return {**others, **({"Authorization": f"Bearer {self._token}"} if self._token else {})}

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

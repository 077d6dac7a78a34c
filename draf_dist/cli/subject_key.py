"""The secret that turns subjects into pseudonyms, from the environment alone."""

import os

from draf_dist.errors import SpecError, explain

VARIABLE = "DRAF_SUBJECT_KEY"
PUBLIC_KEY = b"draf_dist: public subject key of synthetic data"
SHORTEST_BYTES = 16


def subject_key(*, public: bool) -> bytes:
    """The key for a source: a fixed public one for synthetic subjects, else DRAF_SUBJECT_KEY.

    Raises:
        SpecError: the variable is not set or too short to keep subjects from being guessed.
    """
    if public:
        return PUBLIC_KEY
    secret = os.environ.get(VARIABLE, "").encode()
    if len(secret) < SHORTEST_BYTES:
        found = f"{len(secret)} bytes" if secret else "nothing"
        raise SpecError(
            explain(
                f"environment variable {VARIABLE}",
                expected=f"a secret of at least {SHORTEST_BYTES} bytes",
                found=found,
                remedy=f"Make one with `openssl rand -hex 32`, keep it for ever, and export {VARIABLE}: "
                "without it no later delivery can be joined to this release.",
            )
        )
    return secret

"""Names that can be stored: keyed hashes in place of what the hospital wrote."""

import hashlib
import hmac


def subject_pseudonym(key: bytes, subject: str) -> str:
    """The pseudonymous key of a subject: 32 hex digits of HMAC-SHA256; the same subject at two sites gets the same one."""
    return _keyed(key, "subject", subject).hex()[:32]


def study_uid(key: bytes, *, site: str, subject: str, anchor: str) -> int:
    """The uid of a study: 63 bits of HMAC-SHA256, stable over runs and machines, never negative (-1 is padding)."""
    return int.from_bytes(_keyed(key, "study", site, subject, anchor)[:8], "big") >> 1


def sample_uid(key: bytes, *, source: str, sample: str) -> int:
    """The uid of a sample that has a name of its own within its source, as in a foreign tar; otherwise as `study_uid`."""
    return int.from_bytes(_keyed(key, "sample", source, sample)[:8], "big") >> 1


def uid_name(uid: int) -> str:
    """The uid as the stem of member names: 16 hex digits."""
    return f"{uid:016x}"


def _keyed(key: bytes, *parts: str) -> bytes:
    # Lengths go in front so that ("ab", "c") and ("a", "bc") differ.
    message = b"".join(len(encoded).to_bytes(4, "big") + encoded for encoded in (part.encode() for part in parts))
    return hmac.new(key, message, hashlib.sha256).digest()

"""What is uploaded with a job: its two files, and the code where the image does not hold it. Never data, never secrets."""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import draf_dist
from draf_dist.errors import SpecError, explain, together
from draf_dist.launch.bundle import Bundle

# Ray refuses larger ones with HTTP 413, after they were sent.
MAX_BYTES = 100 * 2**20
CODE = "draf_dist"
CODE_SUFFIXES = (".py", ".j2", ".npy", "py.typed")

_DATA = (
    *(".dcm", ".dicom", ".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".svs", ".edf", ".vcf", ".bam", ".fastq"),
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".zarr", ".npy", ".npz", ".h5", ".hdf5", ".mat"),
    *(".parquet", ".arrow", ".feather", ".csv", ".tsv", ".xlsx", ".jsonl", ".db", ".sqlite"),
    *(".tar", ".tgz", ".gz", ".zip", ".pkl", ".pt", ".pth", ".ckpt", ".safetensors"),
)
_KEY_SUFFIXES = (".pem", ".key", ".p12", ".pfx", ".jks", ".kdbx", ".kubeconfig")
_KEY_NAMES = (".env", ".netrc", ".pgpass", "auth_token", "credentials", "kubeconfig", "id_rsa", "id_ed25519", "id_ecdsa")

# What pins a release is no user, as in `s3://bucket@0123456789abcdef`.
_PIN = r"[^\s/@]+@(?:[0-9a-f]{16}|[0-9a-f]{64})(?![\w.:-])"
_SECRETS = {
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a token of a well-known service": re.compile(
        r"\b(?:gh[pousr]_[0-9A-Za-z]{20,}|github_pat_[0-9A-Za-z_]{20,}|glpat-[\w-]{16,}|hf_[0-9A-Za-z]{30,}|"
        r"xox[abprs]-[0-9A-Za-z-]{10,}|AIza[0-9A-Za-z_-]{35}|sk-ant-[\w-]{16,})"
    ),
    "a JSON web token": re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\."),
    "a signed URL": re.compile(
        r"(?:\b(?:X-Amz-Signature|X-Amz-Security-Token|X-Goog-Signature|SharedAccessSignature|access_token)|[?&;](?:sig|Signature))"
        r"=[\w%]",
        re.IGNORECASE,
    ),
    "a URL with credentials": re.compile(r"://(?!{PIN})[\w.~%+-]+(?::[^\s/@]*)?@\w".replace("{PIN}", _PIN)),
}
# Keys of a profile that name a secret of the platform are none themselves.
_SECRET_KEY = re.compile(
    r"^\s*(?!(?:auth_secret|storage_secret|image_pull_secret):)[\w.-]*(?:password|passwd|passphrase|secret|token|api_?key|access_?key)[\w.-]*:\s*\S",
    re.IGNORECASE | re.MULTILINE,
)
# Variables whose values must not be repeated anywhere.
_SECRET_VARIABLES = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_KEY|SUBJECT_KEY", re.IGNORECASE)
_SHORTEST_SECRET = 8


@dataclass(frozen=True)
class Package:
    """Files by the path at which they will lie in the job's folder on the cluster."""

    files: Mapping[str, bytes]

    @property
    def sizes(self) -> list[tuple[str, int]]:
        """(path, bytes), the biggest first."""
        return sorted(((path, len(content)) for path, content in self.files.items()), key=lambda entry: (-entry[1], entry[0]))

    @property
    def total(self) -> int:
        """Bytes of all files together."""
        return sum(map(len, self.files.values()))

    @contextmanager
    def unpacked(self) -> Iterator[Path]:
        """A folder that holds the files and nothing else, until the end of the block."""
        with tempfile.TemporaryDirectory(prefix="draf-submit-") as name:
            folder = Path(name)
            for path, content in self.files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
            yield folder


def pack(bundle: Bundle, *, with_code: bool = False, environment: Mapping[str, str] = os.environ) -> Package:
    """What will be uploaded. with_code: this machine's draf_dist too, which then goes before the one of the cluster's image.

    environment: variables whose secret values are looked for in the files.

    Raises:
        SpecError: data, a secret, or too much; every file is named with what was found, never the secret.
    """
    files = {name: text.encode() for name, text in bundle.files.items()}
    if with_code:
        files |= code(Path(draf_dist.__file__).parent)
    package = Package(files)
    if package.total > MAX_BYTES:
        raise _too_large(package)
    command = " ".join(bundle.command("."))
    if problems := [*refusals(files, environment), *refusals({"command": command.encode()}, environment)]:
        raise SpecError(together(problems))
    return package


def code(folder: Path) -> dict[str, bytes]:
    """The files of an installed package that a wheel of it would hold.

    Raises:
        SpecError: data or key files lie among them: somebody has put them into the wrong folder.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    named = {f"{CODE}/{path.relative_to(folder).as_posix()}": path for path in paths}
    if problems := [_refused(name, why) for name in named if (why := _why_not_by_name(name))]:
        raise SpecError(together(problems))
    return {name: path.read_bytes() for name, path in named.items() if name.endswith(CODE_SUFFIXES)}


def refusals(files: Mapping[str, bytes], environment: Mapping[str, str]) -> list[str]:
    """What must not leave this machine, one line each."""
    return [
        _refused(path, why)
        for path, content in files.items()
        for why in (_why_not_by_name(path), *_secrets_in(path, content.decode("utf-8", "replace"), environment))
        if why
    ]


def _why_not_by_name(path: str) -> str | None:
    pure = PurePosixPath(path.lower())
    if any(part in _KEY_NAMES or part.startswith(".env.") for part in pure.parts) or pure.name.endswith(_KEY_SUFFIXES):
        return "a file for secrets, by its name"
    ours = pure.parts[0] == CODE and pure.suffix == ".npy"
    data = next((suffix for part in pure.parts for suffix in _DATA if part.endswith(suffix)), None)
    return f"data, by its name ({data})" if data and not ours else None


def _secrets_in(path: str, text: str, environment: Mapping[str, str]) -> Iterator[str]:
    if path.endswith(".npy"):
        return
    yield from (what for what, pattern in _SECRETS.items() if pattern.search(text))
    if path.endswith((".yaml", ".yml")) and _SECRET_KEY.search(text):
        yield "a key that is named like a secret"
    yield from (what for what, value in _secrets_of(environment) if len(value) >= _SHORTEST_SECRET and _stands_in(text, value))


def _secrets_of(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What it is called, and the secret, of all that this shell knows."""
    yield from ((f"the value of ${name}", value.strip()) for name, value in environment.items() if _SECRET_VARIABLES.search(name))
    # The file is there also where a variable goes before it, or where this shell asks for no token.
    others = {name: value for name, value in environment.items() if name not in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE")}
    # A path that leads nowhere names no secret that could be in a file; whoever connects is told of it (see ray_dashboard).
    with suppress(SpecError):
        if token := find_token(others):
            yield "Ray's token", token


def _stands_in(text: str, secret: str) -> bool:
    """As it is, or as a URL has to write it."""
    return secret in text or quote(secret, safe="") in text


def _too_large(package: Package) -> SpecError:
    biggest = ", ".join(f"{path} {size / 2**20:.1f} MiB" for path, size in package.sizes[:3])
    found = f"{package.total / 2**20:.1f} MiB ({biggest})"
    return SpecError(
        explain("upload", expected=f"at most {MAX_BYTES // 2**20} MiB", found=found, remedy="Leave out what is no code.")
    )


def _refused(path: str, why: str) -> str:
    remedy = "Data lies in the object store, secrets in the platform's secret store: see docs/clusters.md."
    return explain(f"upload: {path}", expected="neither data nor secrets", found=why, remedy=remedy)


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

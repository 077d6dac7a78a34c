"""The images, as far as they can be checked without Docker: pins, the user, what enters the build, where Ray is found."""

import fnmatch
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from manifests import PROFILES

import draf_dist
from draf_dist.launch.cluster_profile import load_cluster
from draf_dist.launch.kuberay_pods import USER

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
every_image = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
PIN = re.compile(r"(?<![\w.-])([A-Za-z0-9][\w.-]*)==([\w.+!]+)")


def instructions(path: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) with continued lines joined; comments left out."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in joined)]


def stages(path: Path) -> list[list[tuple[str, str]]]:
    """The instructions of every stage, its FROM first."""
    found: list[list[tuple[str, str]]] = []
    for instruction in instructions(path):
        if instruction[0] == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found


def pins(text: str) -> dict[str, str]:
    return {name.lower(): version for name, version in PIN.findall(text)}


def enters_the_build(path: str) -> bool:
    """Whether .dockerignore lets a path in: the last pattern that matches it or a folder above it decides."""
    inside = True
    parts = PurePosixPath(path).parts
    heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        candidates = parts if pattern.startswith("**/") else heads
        if any(fnmatch.fnmatch(candidate, pattern.removeprefix("**/")) for candidate in candidates):
            inside = line.startswith("!")
    return inside


def copied(path: Path) -> list[str]:
    """What is copied from the repository, not from another stage."""
    copies = [rest.split() for word, rest in instructions(path) if word == "COPY"]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


def test_there_is_an_image_for_cpus_and_one_for_gpus() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.gpu"]


@every_image
def test_the_base_is_named_by_version(path: Path) -> None:
    for stage in stages(path):
        base = stage[0][1].split()[0]
        assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", base)


@every_image
def test_every_pin_is_the_tested_one(path: Path) -> None:
    tested = pins((ROOT / "constraints.txt").read_text())
    found = pins("\n".join(rest for word, rest in instructions(path) if word == "RUN"))
    assert found == {"torch": tested["torch"]}
    launcher = pins((ROOT / "docker" / "launcher.txt").read_text())
    # boto3 of one version wants botocore of the same.
    assert launcher["boto3"] == tested["botocore"]
    assert {name: tested[name] for name in launcher.keys() & tested.keys()} == {
        name: launcher[name] for name in launcher.keys() & tested.keys()
    }


@every_image
def test_whatever_is_installed_is_held_to_the_constraints(path: Path) -> None:
    installs = [part for word, rest in instructions(path) if word == "RUN" for part in rest.split("&&") if "pip install" in part]
    assert len(installs) == 2
    for install in installs:
        assert "--constraint constraints.txt" in install or "--no-deps" in install
    assert "torch==" in installs[0]


def test_only_the_image_for_cpus_takes_torch_from_the_index_of_cpu_builds() -> None:
    from_index = {path.suffix for path in DOCKERFILES if "https://download.pytorch.org/whl/cpu" in path.read_text()}
    assert from_index == {".cpu"}


@every_image
def test_what_runs_is_the_user_that_pods_run_as(path: Path) -> None:
    last = stages(path)[-1]
    users = [rest for word, rest in last if word == "USER"]
    assert users == [f"{USER}:{USER}"]
    assert f"useradd --uid {USER}" in " ".join(rest for word, rest in last if word == "RUN")
    after = [word for word, _ in last[[word for word, _ in last].index("USER") :]]
    assert "COPY" not in after


@every_image
def test_nothing_comes_from_a_url_unseen_and_no_secret_is_given(path: Path) -> None:
    for word, rest in instructions(path):
        assert word not in ("ADD", "ARG")
        assert not re.search(r"\b(curl|wget)\b.*https?://", rest)
        assert not re.search(r"(?i)(token|secret|password|access_key)\s*=", rest)


@every_image
def test_commands_of_others_are_not_wrapped(path: Path) -> None:
    assert not [word for word, _ in instructions(path) if word in ("ENTRYPOINT", "HEALTHCHECK")]


@every_image
def test_ray_is_found_in_login_shells_and_in_others(path: Path) -> None:
    environment = " ".join(rest for word, rest in stages(path)[-1] if word == "ENV")
    assert "PATH=/opt/draf/bin:$PATH" in environment
    # Ray's cluster launcher looks for the home where it mounts the token in the image's environment.
    assert "HOME=/home/draf" in environment
    profile = ROOT / "docker" / "profile.sh"
    shown = subprocess.run(
        ["sh", "-c", f". {profile}; echo $PATH"], env={"PATH": "/usr/bin"}, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "/opt/draf/bin:/usr/bin"


@every_image
def test_what_is_copied_exists_and_enters_the_build(path: Path) -> None:
    for source in copied(path):
        assert (ROOT / source).exists()
        assert enters_the_build(source)


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        ".env",
        "data/raw/scan.dcm",
        "runs/a/job.yaml",
        "demo/release/HEAD.json",
        "store.env",
        "id_rsa",
        "docker/notes.txt",
        "tests/conftest.py",
        "draf_dist/__pycache__/errors.cpython-311.pyc",
        "draf_dist/cli/__pycache__/app.cpython-311.pyc",
    ],
)
def test_neither_data_nor_keys_nor_history_enter_the_build(path: str) -> None:
    assert not enters_the_build(path)


def test_code_enters_the_build() -> None:
    assert enters_the_build("draf_dist/cli/app.py")
    assert enters_the_build("draf_dist/data/loader.py")


def test_what_enters_the_build_makes_a_complete_wheel(tmp_path: Path) -> None:
    context, wheels = tmp_path / "context", tmp_path / "wheels"
    context.mkdir()
    wheels.mkdir()
    for source in copied(DOCKERFILES[0]):
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, context / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, context)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(wheels)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=context, capture_output=True, check=True)
    (wheel,) = wheels.glob(f"draf_dist-{draf_dist.__version__}-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("draf_dist/")}
    package = ROOT / "draf_dist"
    wanted = {path for suffix in ("*.py", "*.j2", "*.npy", "py.typed") for path in package.rglob(suffix)}
    assert held == {f"draf_dist/{path.relative_to(package)}" for path in wanted}


def test_the_profiles_name_images_of_this_version_by_what_they_hold() -> None:
    for path in PROFILES:
        cluster = load_cluster(path)
        kind = "gpu" if cluster.train.gpus_per_worker else "cpu"
        assert cluster.image.endswith(f"draf_dist:{draf_dist.__version__}-{kind}")

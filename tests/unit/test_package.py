"""What is uploaded: two files, the code if asked for; never data, never secrets, never too much."""

import json
from pathlib import Path

import pytest

import draf_dist
from draf_dist.cli.app import main
from draf_dist.errors import SpecError
from draf_dist.launch.bundle import Bundle
from draf_dist.launch.package import MAX_BYTES, Package, code, pack, refusals

PLAIN = Bundle("first-01234567", "s3://bucket/runs/first", {"job.yaml": "name: first\n", "cluster.yaml": "kind: cluster\n"})
ROOT = Path(__file__).resolve().parents[2]
# In two halves, so that no scanner of the repository takes them for real ones.
AWS_KEY = "AKIA" + "IOSFODNN7EXAMPLE"
PRIVATE_KEY = "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEow\n"
TOKENS = [
    "ghp" + "_" + "a" * 36,
    "github" + "_pat_" + "a1_" * 10,
    "glpat" + "-" + "a1_-" * 5,
    "sk-ant" + "-api03-" + "a1_-" * 5,
]
SIGNED = ["?sv=1&sig=", "?access_token=", "?X-Amz-Security-Token=", "#SharedAccessSignature="]
JWT = "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0NTY3ODkwIn0.abc"


def test_the_files_lie_in_the_folder_and_nothing_else_does() -> None:
    package = Package({"job.yaml": b"a", "draf_dist/cli/app.py": b"bb"})
    with package.unpacked() as folder:
        found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == package.files
    assert not folder.exists()
    assert package.sizes == [("draf_dist/cli/app.py", 2), ("job.yaml", 1)]


def test_without_code_only_the_two_files_are_packed() -> None:
    assert set(pack(PLAIN).files) == {"job.yaml", "cluster.yaml"}


def test_with_code_the_package_goes_whole_without_caches_of_the_interpreter() -> None:
    files = set(pack(PLAIN, with_code=True).files)
    assert {"draf_dist/cli/app.py", "draf_dist/evaluation/report.html.j2", "draf_dist/noise/normal_quantiles.npy"} <= files
    on_disk = {path.relative_to(ROOT).as_posix() for path in Path(draf_dist.__file__).parent.rglob("*.py")}
    assert on_disk <= files
    assert not [path for path in files if "__pycache__" in path]


@pytest.mark.parametrize(
    "name", ["scan.dcm", "ct.nii.gz", "labels.parquet", "x.npy", "shard.tar", "v.zarr/c/0", "cohort.csv", "a.PNG", "b.jpeg", "m.pt"]
)
def test_data_is_refused_by_its_name(name: str) -> None:
    (problem,) = refusals({name: b""}, {})
    assert problem.startswith(f"upload: {name}: expected neither data nor secrets, found data")


@pytest.mark.parametrize(
    "name", ["server.pem", "id_rsa", ".env", ".env.production", ".ray/auth_token", ".aws/credentials", "tls.key"]
)
def test_key_files_are_refused_by_their_name(name: str) -> None:
    (problem,) = refusals({name: b""}, {})
    assert "found a file for secrets" in problem


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (PRIVATE_KEY, "a private key"),
        (f"note: {AWS_KEY}", "an AWS access key"),
        ("hf_" + "a" * 34, "a token of a well-known service"),
        *((token, "a token of a well-known service") for token in TOKENS),
        *((f"release: https://h/x{query}0123abcd", "a signed URL") for query in SIGNED),
        (JWT, "a JSON web token"),
        ("release: https://h/x?X-Amz-Signature=0123abcd", "a signed URL"),
        ("release: s3://user:hunter2@bucket/x", "a URL with credentials"),
        ("release: s3://hunter2@bucket/x", "a URL with credentials"),
        ("key_passphrase: hunter2", "a key that is named like a secret"),
        ("db_password: hunter2", "a key that is named like a secret"),
        ("auth: subject-key-of-this-hospital", "the value of $DRAF_SUBJECT_KEY"),
        ("auth: 8letters", "the value of $key_passphrase"),
        ("auth: with%2Fa%2Fslash", "the value of $AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_a_secret_in_a_file_is_told_by_its_kind_and_never_repeated(text: str, what: str) -> None:
    environment = {"DRAF_SUBJECT_KEY": "subject-key-of-this-hospital", "key_passphrase": "8letters", "A_TOKEN": "7letter"}
    environment |= {"AWS_SECRET_ACCESS_KEY": "with/a/slash", "HOME": "/home/somebody"}
    (problem,) = refusals({"job.yaml": text.encode()}, environment)
    assert problem.startswith(f"upload: job.yaml: expected neither data nor secrets, found {what}.")
    assert not [word for word in ("hunter2", AWS_KEY, "MIIEow", "0123abcd", "of-this-hospital") if word in problem]


@pytest.mark.parametrize(
    "text",
    [
        "release: s3://bucket@0123456789abcdef",
        "release: s3://bucket/synth@0123456789abcdef",
        "kubernetes:\n  auth_secret: ray-auth-token\n  storage_secret: object-store\n",
        "service_account: draf-ray-node@project.iam.gserviceaccount.com",
    ],
)
def test_names_and_pinned_releases_are_no_secrets(text: str) -> None:
    assert refusals({"cluster.yaml": text.encode()}, {"HOME": "/home/somebody"}) == []


def test_a_secret_in_the_command_is_refused() -> None:
    signed = Bundle("first-01234567", "https://host/run?sig=0123abcd", PLAIN.files)
    with pytest.raises(SpecError, match="upload: command: .* found a signed URL"):
        pack(signed)


def test_all_that_is_wrong_is_told_together() -> None:
    with pytest.raises(SpecError) as caught:
        pack(Bundle("x-01234567", "s3://b/r", {"job.yaml": PRIVATE_KEY, "cluster.yaml": "x: s3://u:p@b"}))
    assert len(str(caught.value).splitlines()) == 2


def test_a_file_of_data_among_the_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("")
    (tmp_path / "scan.dcm").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / ".env").write_text("")
    with pytest.raises(SpecError, match=r"draf_dist/scan.dcm.*data(.|\n)*draf_dist/sub/.env.*secrets"):
        code(tmp_path)


def test_more_than_ray_takes_is_refused_before_it_is_sent() -> None:
    big = {"job.yaml": "#" * (MAX_BYTES // 2 + 1), "cluster.yaml": "#" * (MAX_BYTES // 2)}
    with pytest.raises(SpecError, match=r"upload: expected at most 100 MiB, found 100.0 MiB \(job.yaml 50.0 MiB"):
        pack(Bundle("x-01234567", "s3://b/r", big))


def test_a_dry_run_shows_the_upload_and_needs_no_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "submit",
        str(ROOT / "jobs/finetune_synth.yaml"),
        "--cluster",
        str(ROOT / "cluster/profiles/laptop.yaml"),
        "--dry-run",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--json"])
    assert ended.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown["files"]) == {"job.yaml", "cluster.yaml"}
    assert shown["size_bytes"] == sum(shown["files"].values())


def test_what_excludes_one_another_is_refused() -> None:
    command = ["submit", str(ROOT / "jobs/finetune_synth.yaml"), "--cluster", str(ROOT / "cluster/profiles/laptop.yaml")]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--status", "--stop"])
    assert ended.value.code == SpecError.exit_code


def test_a_manifest_is_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["submit", str(ROOT / "jobs/finetune_synth.yaml"), "--cluster", str(ROOT / "cluster/profiles/laptop.yaml")]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--render", "kuberay", "--json"])
    assert ended.value.code == SpecError.exit_code
    assert "--render --json: expected one of them" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_the_token_of_the_cluster_is_looked_for_also_where_a_file_holds_it(tmp_path: Path, mode: str) -> None:
    (tmp_path / "named").write_text("of-the-file\n")
    environment = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "named"), "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "another-one"}
    (problem,) = refusals({"job.yaml": b"name: of-the-file"}, environment)
    assert "found Ray's token" in problem
    assert refusals({"job.yaml": b"name: x"}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "nothing")}) == []

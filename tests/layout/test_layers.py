"""The walls of the house: imports point down only, siblings do not import one another, heavy libraries stay where they belong."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "draf_dist"

# Highest first. Parts on one line are siblings.
LAYERS = [
    {"cli"},
    {"continual"},
    {"tuning"},
    {"launch"},
    {"evaluation"},
    {"training"},
    {"objectives"},
    {"data", "augment", "models", "losses", "metrics"},
    {"sources", "protocols"},
    {"schema", "noise", "config", "storage", "executor"},
    {"errors"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

# Heavy library -> the only places that may import it.
HOMES = {
    "ray": ("launch/", "tuning/"),
    "optuna": ("tuning/",),
    "deepspeed": ("training/deepspeed_engine.py", "training/deepspeed_files.py"),
    "webdataset": ("data/shards.py",),
    "obstore": ("storage/s3_ranges.py",),
    "zarr": ("data/volumes",),
    "monai": ("models/encoders/", "data/preprocess", "metrics/"),
    "mlflow": ("continual/registry.py",),
    "tensorboard": ("training/tracking.py",),
    "torchvision": (),
    "pickle": (),
}


def part_of(path: Path) -> str:
    """The part a file belongs to: its first folder below the package, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            # `from torch.utils import tensorboard` imports a module too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_violations(part: str, imported: str) -> bool:
    """Whether a part may not import a part of the package."""
    if imported == part:
        return False
    siblings_at_the_base = LAYERS.index({"schema", "noise", "config", "storage", "executor"})
    if LEVEL[part] == LEVEL[imported]:
        return LEVEL[part] != siblings_at_the_base or imported == "storage"
    return LEVEL[imported] < LEVEL[part]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    part = part_of(path)
    assert part in LEVEL, f"{part} stands in no layer"
    for name in imports_of(path):
        if name.startswith("draf_dist."):
            imported = name.split(".")[1]
            if imported in LEVEL:
                assert not layer_violations(part, imported), f"{part} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_live_in_few_places(path: Path) -> None:
    inside = str(path.relative_to(PACKAGE))
    for name in imports_of(path):
        for library, homes in HOMES.items():
            if name == library or name.startswith(f"{library}.") or name.startswith(f"torch.utils.{library}"):
                assert inside.startswith(homes) if homes else False, f"{inside} imports {library}"


def test_the_layer_rule_can_fail() -> None:
    assert layer_violations("models", "training")
    assert layer_violations("models", "data")
    assert not layer_violations("training", "models")


def test_imports_form_no_cycle() -> None:
    graph = {module_name(path): {n for n in imports_of(path) if n.startswith("draf_dist.")} for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in graph and module not in done:
            for imported in graph[module]:
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    return ".".join(relative.parts[:-1] if relative.name == "__init__" else relative.parts)


def test_only_the_package_is_importable() -> None:
    for folder in ("datasets", "jobs", "tune", "cluster", "docker"):
        assert (ROOT / folder).is_dir(), f"{folder}/ is missing"
        assert not list((ROOT / folder).rglob("__init__.py"))


def test_every_file_stays_readable() -> None:
    too_long = {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not too_long

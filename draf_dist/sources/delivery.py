"""A sealed delivery: a folder of raw files whose delivery.json, written last, lists every one of them with its sha256.

No message names a file by its path, which often holds a patient's name: it is told by its place in the list and its kind.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import ValidationError

from draf_dist.config.spec import fingerprint
from draf_dist.errors import DataError, SpecError, explain, together
from draf_dist.schema.delivery import DELIVERY_FILE, DeliveredFile, Delivery
from draf_dist.sources.card_model import Card, ModalityCard, MultiHot, SeriesCard, SiteFolders, TableModalityCard, VariableCard
from draf_dist.storage import LocalStore, room_on
from draf_dist.storage.local import UNFINISHED

MAX_MANIFEST_BYTES = 2**30
LISTED_FILES = 10
SEAL = "draf delivery seal"
CardT = TypeVar("CardT", bound=Card)


def seal(
    folder: Path,
    delivery_id: str,
    *,
    sites: Sequence[str] = (),
    previous_delivery: str | None = None,
    created_at: datetime | None = None,
) -> Delivery:
    """Lists every file below the folder in delivery.json, written at once. A folder sealed so already is left as it is.

    created_at: default now.

    Raises:
        SpecError: no such folder, an id or file name that can't be used, or a delivery.json of another id or other content.
        DataError: a link or device among the files, or no file at all.
    """
    for leftover in folder.glob(f"{UNFINISHED}*"):
        leftover.unlink()  # of a seal that was killed
    files = tuple(_described(folder, path) for path in _paths(folder))
    if not files:
        raise DataError(explain(str(folder), expected="the files of the delivery", found="none", remedy="Copy them there first."))
    content = {
        "delivery_id": delivery_id,
        "created_at": (created_at or datetime.now(UTC)).replace(microsecond=0),
        "sites": tuple(sites),
        "previous_delivery": previous_delivery,
        "files": files,
    }
    try:
        delivery = Delivery.model_validate(content)
    except ValidationError as error:
        raise SpecError(
            explain(str(folder), expected="a delivery", found=_first(error), remedy="Correct it and seal again.")
        ) from None
    # The list is as long as the folder: written to a temporary name, then renamed, so that no half of it is ever read.
    with room_on(folder):
        if LocalStore(folder).create(DELIVERY_FILE, delivery.model_dump_json(indent=1).encode() + b"\n"):
            return delivery
    return _sealed_so_already(folder, delivery)


def read_delivery(folder: Path) -> Delivery:
    """delivery.json of a folder.

    Raises:
        SpecError: there is no such folder, or no delivery.json in it: the delivery has not arrived.
        DataError: the file is not what `seal` writes.
    """
    path = folder / DELIVERY_FILE
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise SpecError(explain(str(folder), expected="the folder of a delivery", found=found, remedy="Check the path."))
    if path.is_symlink() or not path.is_file():
        remedy = f"It is written last: wait until the copy has ended, then seal it with {SEAL} {folder} --id ID."
        raise SpecError(explain(str(path), expected="the list of a delivery that has arrived", found="none", remedy=remedy))
    if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
        raise DataError(
            explain(str(path), expected=f"at most {MAX_MANIFEST_BYTES} bytes", found=f"{size}", remedy="Seal it again.")
        )
    try:
        return Delivery.model_validate_json(path.read_bytes())
    except ValidationError as error:
        remedy = f"Ask the sender, or remove the file and seal the folder again with {SEAL}."
        raise DataError(explain(str(path), expected="a delivery", found=_first(error), remedy=remedy)) from None


def delivery_sha256(delivery: Delivery) -> str:
    """What makes two deliveries the same: sha256 of the canonical JSON, 64 hex digits. Line ends and order of keys don't count."""
    return fingerprint(delivery)


def check_files(folder: Path, delivery: Delivery) -> None:
    """Reads every file and holds it against the list.

    Raises:
        DataError: files that are missing, changed, not listed, or no plain files: all together, the first ten one by one.
    """
    problems = [problem for number, file in enumerate(delivery.files, 1) if (problem := _problem(folder, number, file))]
    listed = {file.path for file in delivery.files}
    unlisted = Counter(_kind_and_place(path) for path in _paths(folder) if path not in listed)
    problems += [f"{what} that the list does not have: {count}" for what, count in sorted(unlisted.items())]
    if not problems:
        return
    more = [f"... and {len(problems) - LISTED_FILES} more."] if len(problems) > LISTED_FILES else []
    remedy = "It is not what was sealed: fetch it again from the sender. Nothing was written."
    where = f"{folder / DELIVERY_FILE}: delivery {delivery.delivery_id}"
    head = explain(where, expected=f"{len(delivery.files)} files as listed", found=f"{len(problems)} differences", remedy=remedy)
    raise DataError(together([head, *(f"  {problem}" for problem in problems[:LISTED_FILES]), *more]))


def card_of_sites(card: CardT, sites: Sequence[str]) -> CardT:
    """The card with these of its sites alone, and of every entry per site only theirs: what one hospital's delivery needs.

    The card itself where its sites have no folders of their own, or where it lacks one of these.
    """
    folders = card.sites.folders if isinstance(card.sites, SiteFolders) else ()
    if not sites or not set(sites) < set(folders):
        return card
    changes = {
        "sites": SiteFolders(folders=_at(sites, folders)),
        "split": card.split.model_copy(update={"held_out_sites": _at(sites, card.split.held_out_sites)}),
        "tables": {name: each.model_copy(update={"rename": _at(sites, each.rename)}) for name, each in card.tables.items()},
        "modalities": tuple(_modality_at(sites, modality) for modality in card.modalities),
    }
    return card.model_copy(update=changes)


def _modality_at(sites: Sequence[str], modality: ModalityCard) -> ModalityCard:
    changes: dict[str, Any] = {"absent_at": _at(sites, modality.absent_at)}
    if isinstance(modality, SeriesCard | TableModalityCard):
        changes["variables"] = tuple(_variable_at(sites, variable) for variable in modality.variables)
    if isinstance(modality, TableModalityCard):
        changes["columns"] = tuple(each.model_copy(update={"unit": _code_at(sites, each.unit)}) for each in modality.columns)
        changes["multi_hot"] = tuple(_multi_hot_at(sites, hot) for hot in modality.multi_hot)
    return modality.model_copy(update=changes)


def _variable_at(sites: Sequence[str], variable: VariableCard) -> VariableCard:
    changes = {"code": _code_at(sites, variable.code), "unit": _code_at(sites, variable.unit)}
    if isinstance(variable.categories, dict):
        changes["categories"] = {name: _code_at(sites, words) for name, words in variable.categories.items()}
    return variable.model_copy(update=changes)


def _multi_hot_at(sites: Sequence[str], hot: MultiHot) -> MultiHot:
    return hot.model_copy(update={"codes": {name: _code_at(sites, code) for name, code in hot.codes.items()}})


def _code_at(sites: Sequence[str], code: Any) -> Any:
    """A code or unit: one for all sites stays, one a site is cut."""
    return _at(sites, code) if isinstance(code, dict) else code


def _at(sites: Sequence[str], per_site: Any) -> Any:
    """The entries of some sites in a mapping by site, or in a sequence of sites; in the order that they have."""
    if isinstance(per_site, dict):
        return {site: value for site, value in per_site.items() if site in sites}
    return tuple(site for site in per_site if site in sites)


def _problem(folder: Path, number: int, file: DeliveredFile) -> str | None:
    name, path = f"file {number} of the list ({_kind(file.path)})", folder / file.path
    if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
        return f"{name}: a link"
    if not path.is_file():
        return f"{name}: missing"
    if (size := path.stat().st_size) != file.size_bytes:
        return f"{name}: {size} bytes, not {file.size_bytes}"
    return None if _sha256(path) == file.sha256 else f"{name}: other bytes than were sealed"


def _paths(folder: Path) -> Iterator[str]:
    """Every file below the folder but delivery.json, sorted, relative.

    Raises:
        SpecError: there is no such folder.
        DataError: something that is neither a file nor a folder.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise SpecError(explain(str(folder), expected="the folder of a delivery", found=found, remedy="Check the path."))
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            remedy = "Put the files themselves there."
            raise DataError(explain(str(folder), expected="plain files only", found="a link or device", remedy=remedy))
        if path.is_file() and relative != DELIVERY_FILE:
            yield relative


def _described(folder: Path, relative: str) -> DeliveredFile:
    try:
        # A name that can't be stored safely is refused here, before its file is read.
        draft = DeliveredFile(path=relative, size_bytes=(folder / relative).stat().st_size, sha256="0" * 64)
    except ValidationError as error:
        remedy = "Rename it."
        raise SpecError(
            explain(f"{folder}: a {_kind(relative)}", expected="a plain name", found=_first(error), remedy=remedy)
        ) from None
    return draft.model_copy(update={"sha256": _sha256(folder / relative)})


def _sealed_so_already(folder: Path, delivery: Delivery) -> Delivery:
    earlier = read_delivery(folder)
    if earlier.model_copy(update={"created_at": delivery.created_at}) == delivery:
        return earlier
    found = f"one of delivery {earlier.delivery_id}" + (", of other files" if earlier.files != delivery.files else "")
    remedy = "A sealed delivery does not change: give the new files a folder and an id of their own."
    raise SpecError(explain(str(folder / DELIVERY_FILE), expected="no other list", found=found, remedy=remedy))


def _kind(relative: str) -> str:
    """What may be told of a file's name: how it ends, if that is a usual ending."""
    suffix = PurePosixPath(relative).suffix.lower()
    return f"{suffix} file" if re.fullmatch(r"\.[a-z]{1,4}", suffix) else "file"


def _kind_and_place(relative: str) -> str:
    """What may be told of a file that nobody listed: its kind, whether it is hidden, and how deep it lies."""
    path = PurePosixPath(relative)
    hidden = "hidden (a name that begins with a dot, as .DS_Store) " if path.name.startswith(".") else ""
    level = len(path.parts) - 1
    return f"{hidden}{_kind(relative)} {f'{level} folders down' if level > 1 else 'one folder down' if level else 'at the top'}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first(error: ValidationError) -> str:
    """The first problem, without the value that caused it; an unknown key is not named, it may be a patient's name."""
    first = error.errors()[0]
    loc = first["loc"][:-1] if first["type"] == "extra_forbidden" else first["loc"]
    place = ".".join(str(part + 1 if isinstance(part, int) else part) for part in loc) or "top level"
    if first["type"] == "extra_forbidden":
        return f"a key that is not one of those in docs/deliveries.md at {place}"
    return f"{first['msg']} at {place}"

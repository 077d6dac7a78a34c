"""Specs: YAML 1.2 in, validated pydantic models out, all problems of a file reported together."""

import difflib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Tag, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from draf_dist.errors import SpecError, explain, together


class Spec(BaseModel):
    """Base of every spec: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SpecT = TypeVar("SpecT", bound=BaseModel)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file (`NO` stays a string, `1e-3` is a number).

    Raises:
        SpecError: there is no such file, it is not YAML, or its top level is not a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        found = "a folder" if path.is_dir() else "no such file"
        raise SpecError(explain(str(path), expected="a YAML file", found=found, remedy="Check the path.")) from error
    except UnicodeDecodeError as error:
        raise SpecError(explain(str(path), expected="UTF-8 text", found="other bytes", remedy="Save it as UTF-8.")) from error
    return parse_yaml(text, where=str(path))


def parse_yaml(text: str, *, where: str) -> dict[str, Any]:
    """The mapping in a YAML 1.2 text; `where` names it in errors."""
    try:
        loaded = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SpecError(explain(f"{where}{line}", expected="YAML", found=str(problem), remedy="Mend the syntax.")) from error
    if not isinstance(loaded, dict):
        kind = "nothing" if loaded is None else type(loaded).__name__
        raise SpecError(explain(where, expected="a mapping of keys to values", found=kind, remedy="See docs for an example."))
    return loaded


def load_spec(path: Path | str, model: type[SpecT], overrides: Sequence[str] = ()) -> SpecT:
    """The spec in a YAML file, with `dotted.key=value` overrides applied before validation."""
    tree = read_yaml(path)
    apply_overrides(tree, overrides)
    return validate_spec(tree, model, where=str(path))


def validate_spec(tree: dict[str, Any], model: type[SpecT], *, where: str) -> SpecT:
    """The tree as a model.

    Raises:
        SpecError: one line for every problem, with the nearest valid name for an unknown key.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise SpecError(together(_problems(where, error.errors(), model))) from error


def model_of_kind(kind: Any, models: Mapping[str, type[SpecT]], *, where: str, see: str) -> type[SpecT]:
    """Which model a file's `kind` asks for; a union's own message would not say which kind is near. see: where to look otherwise.

    Raises:
        SpecError: none of them.
    """
    if isinstance(kind, str) and kind in models:
        return models[kind]
    near = difflib.get_close_matches(str(kind), models, n=1)
    remedy = f"Did you mean {near[0]!r}?" if near else see
    found = "nothing" if kind is None else repr(kind)[:80]
    raise SpecError(explain(f"{where}: kind", expected=f"one of {', '.join(models)}", found=found, remedy=remedy))


# The tag of a union's member that has no kind: none that could be chosen.
NO_KIND = "none"


def kind_or(default: str) -> Callable[[object], str]:
    """The discriminator of a union one of whose members need not say its kind: that of `default`."""

    # The name stands in pydantic's errors; by it they are told from those of unions without a kind.
    def kind_of(value: object) -> str:
        return str(value.get("kind", default)) if isinstance(value, Mapping) else getattr(value, "kind", default)

    return kind_of


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> None:
    """Sets dotted keys in place; values are read as YAML, so `1e-3` is a number and `[a, b]` a list.

    Raises:
        SpecError: an override without `=`, or one that goes through a value that is no mapping.
    """
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise SpecError(explain("--set", expected="dotted.key=value", found=repr(override), remedy="For example --set seed=1."))
        *parents, last = dotted.split(".")
        node = tree
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                found = f"a {type(child).__name__}"
                raise SpecError(
                    explain(f"--set {dotted}", expected=f"{parent} to be a mapping", found=found, remedy="Set it as a whole.")
                )
            # A copy: where the file uses an anchor in two places, the other one stays as it is.
            node[parent] = node = dict(child)
        node[last] = _override_value(dotted, text)


def _override_value(dotted: str, text: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        remedy = "Mend the brackets and quotes; the shell needs quotes around the whole."
        raise SpecError(explain(f"--set {dotted}", expected="a YAML value", found=repr(text[:80]), remedy=remedy)) from error


def dump_yaml(model: BaseModel, path: Path) -> None:
    """Writes every field, defaults filled in."""
    path.write_text(yaml_text(model), encoding="utf-8")


def yaml_text(model: BaseModel) -> str:
    """Every field as YAML, defaults filled in."""
    yaml = YAML()
    yaml.default_flow_style = False
    text = io.StringIO()
    yaml.dump(model.model_dump(mode="json"), text)
    return text.getvalue()


def canonical_json(value: BaseModel | dict[str, Any] | list[Any]) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8. What fingerprints are taken of."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fingerprint(value: BaseModel | dict[str, Any] | list[Any]) -> str:
    """sha256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _problems(where: str, details: Iterable[Any], model: type[BaseModel]) -> Iterator[str]:
    for detail in details:
        if not _only_follows(detail):
            yield _problem(where, detail, model)


def _only_follows(detail: Any) -> bool:
    """Whether pydantic says it only because of another problem, which it says too."""
    if detail["type"] == "too_short":
        # Items that are wrong don't count: there are enough of them.
        return bool(detail["ctx"]["actual_length"] < len(detail["input"]))
    return bool(detail["type"] == "default_factory_not_called")


def _problem(where: str, detail: Any, model: type[BaseModel]) -> str:
    path = tuple(detail["loc"])
    place = f"{where}: {key}" if (key := ".".join(_as_written(model, path))) else where
    match detail["type"]:
        case "extra_forbidden":
            siblings = _siblings(model, path[:-1])
            known = f"Known keys: {', '.join(siblings)}."
            return explain(place, expected="a known key", found=repr(path[-1]), remedy=_nearest(str(path[-1]), siblings) or known)
        case "union_tag_invalid" | "union_tag_not_found" if "kind" in detail["ctx"]["discriminator"]:
            # Not its own text, which lists the tags, quotes the whole section and names no key.
            kinds = [str(kind) for kind in _tags(_candidates_at(model, path)) if kind != NO_KIND]
            tag = detail["ctx"].get("tag")
            found = "nothing" if tag is None else repr(tag)
            remedy = _nearest(str(tag), kinds) or "Choose one of them."
            return explain(f"{place}.kind", expected=f"one of {', '.join(kinds)}", found=found, remedy=remedy)
        case "value_error" if isinstance(detail["input"], Mapping):
            # Said by the spec itself, of several keys together: the whole section would not help, nor would its first 80 letters.
            return f"{place}: {str(detail['ctx']['error']).rstrip('.')}."
    found = "nothing" if detail["type"] == "missing" else repr(detail["input"])[:80]
    return f"{place}: {detail['msg'].removeprefix('Value error, ')}, found {found}."


def _nearest(word: str, words: Iterable[str]) -> str:
    """A question for the nearest one; nothing where none is near."""
    near = difflib.get_close_matches(word, list(words), n=1) or difflib.get_close_matches(word.lower(), list(words), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


class _Candidate(NamedTuple):
    """A model that may stand at a place, and the tags by which a union there knows it."""

    model: type[BaseModel]
    tags: tuple[Any, ...] = ()


def _siblings(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Valid keys at a path of an error; unions are followed through the tags that pydantic puts in the path."""
    return sorted({name for candidate in _candidates_at(model, path) for name in candidate.model.model_fields})


def _candidates_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[_Candidate]:
    return _walked(model, path)[1]


def _as_written(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys of a path as they stand in the file, without the tags of unions; they are what --set takes."""
    return _walked(model, path)[0]


def _walked(model: type[BaseModel], path: tuple[Any, ...]) -> tuple[list[str], list[_Candidate]]:
    """The keys of a path without the tags of unions, and what may stand there."""
    keys: list[str] = []
    candidates = [_Candidate(model)]
    after_key = False
    for part in path:
        if is_tag := after_key and part in _tags(candidates) and (len(candidates) > 1 or not _fields(candidates, part)):
            candidates = [candidate for candidate in candidates if part in candidate.tags]
        else:
            keys.append(str(part))
            # An index of a list or a key of a mapping does not change which model comes next.
            candidates = [found for field in _fields(candidates, part) for found in _models_in(field.annotation)] or candidates
        after_key = not is_tag
    return keys, candidates


def _fields(candidates: Iterable[_Candidate], name: Any) -> list[FieldInfo]:
    return [fields[name] for candidate in candidates if name in (fields := candidate.model.model_fields)]


def _tags(candidates: Iterable[_Candidate]) -> list[Any]:
    return [tag for candidate in candidates for tag in candidate.tags]


def _models_in(annotation: Any, said: tuple[Any, ...] = ()) -> list[_Candidate]:
    """said: tags that stand around the annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [_Candidate(annotation, said or _kinds_of(annotation))]
    said = tuple(mark.tag for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Tag)) or said
    return [found for argument in getattr(annotation, "__args__", ()) for found in _models_in(argument, said)]


def _kinds_of(model: type[BaseModel]) -> tuple[Any, ...]:
    """The words that a model's own `kind` may be."""
    kind = model.model_fields.get("kind")
    return () if kind is None else get_args(kind.annotation)

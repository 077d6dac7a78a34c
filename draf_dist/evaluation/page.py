"""Reports as single HTML pages: the one way in which templates are read and filled in."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def fill(package: str, template: str, filters: Mapping[str, Any], **values: Any) -> str:
    """A template of a package with these values: all text goes through autoescape, a name without a value is an error."""
    environment = Environment(
        loader=PackageLoader(package, ""),
        autoescape=select_autoescape(["html", "j2"], default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template).render(values)

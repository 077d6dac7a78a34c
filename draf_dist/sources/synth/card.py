"""The card of the synthetic export: what a hospital data engineer would have written about it."""

import io
from typing import Any

from ruamel.yaml import YAML

from draf_dist.sources.synth.admissions import AGE_RANGE
from draf_dist.sources.synth.evidence import CODES
from draf_dist.sources.synth.local_units import CANONICAL, MOLAR_MASS_G_MOL, RANGES
from draf_dist.sources.synth.profiles import LABS, VITALS, SiteProfile, site_profile
from draf_dist.sources.synth.radiograph import SIDE
from draf_dist.sources.synth.site_cohort import OFFSET_H

_HEAD = """\
# Synthetic hospitals with a planted truth, as `draf synth` writes them. No real people. What is planted: docs/synth.md
"""
# With fewer sites than this none is held out: there would be too little left to train on.
_MIN_SITES_TO_HOLD_OUT = 3


def card_text(num_sites: int) -> str:
    """card.yaml for an export of so many sites. With three or more, the last one is held out (split `ood`)."""
    sites = [site_profile(number) for number in range(num_sites)]
    return _text(_card(sites, held_out=sites[-1:] if num_sites >= _MIN_SITES_TO_HOLD_OUT else []))


def delivery_card_text(number: int) -> str:
    """card.yaml for a delivery of site `number` (from 0) alone: the same schema, codes and units of its own, nothing held out."""
    return _text(_card([site_profile(number)], held_out=[]))


def _text(card: dict[str, Any]) -> str:
    yaml = YAML()
    yaml.default_flow_style = None
    yaml.width = 128
    buffer = io.StringIO()
    yaml.dump(card, buffer)
    return _HEAD + buffer.getvalue()


def _card(sites: list[SiteProfile], held_out: list[SiteProfile]) -> dict[str, Any]:
    return {
        "kind": "hospital_export",
        "name": "synth",
        "description": "Synthetic intensive-care admissions: radiograph, vital signs, laboratory, history; death is predicted.",
        "licence": {"name": "CC0-1.0", "terms": "Generated; describes nobody."},
        "split": {"held_out_sites": [site.name for site in held_out], "public_subject_key": True},
        "sites": {"folders": [site.name for site in sites]},
        "tables": _tables(sites),
        "studies": {"table": "studies", "anchor": {"column": "admission", "offset_h": OFFSET_H}},
        "label": "death",
        "labels": {"death": {"column": "outcome", "classes": ["survived", "died"], "values": _outcomes(sites)}},
        "modalities": [_cxr(), _vitals(sites), _labs(sites), _history(sites)],
    }


def _tables(sites: list[SiteProfile]) -> dict[str, Any]:
    studies: dict[str, Any] = {"path": "{site}/studies.csv", "study": "study_id", "subject": "subject_id", "static": True}
    rename = {site.name: {theirs: ours for ours, theirs in site.columns.items()} for site in sites if site.columns}
    if rename:
        studies["rename"] = rename
    long = {"study": "study_id", "time": "time", "code": "code", "value": "value", "unit": "unit"}
    return {
        "studies": studies,
        "images": {"path": "{site}/images.csv", "study": "study_id", "time": "taken_at"},
        "vitals": {"path": "{site}/vitals.csv", **long},
        "labs": {"path": "{site}/labs.csv", **long},
    }


def _outcomes(sites: list[SiteProfile]) -> dict[str, str]:
    return {word: label for site in sites for word, label in ((site.survived, "survived"), (site.died, "died"))}


def _cxr() -> dict[str, Any]:
    return {
        "kind": "image",
        "name": "cxr",
        "table": "images",
        "file": "file",
        "path": "{site}/images/{file}",
        "window_h": [-OFFSET_H, 0],
        "height": SIDE // 2,
        "width": SIDE // 2,
    }


def _vitals(sites: list[SiteProfile]) -> dict[str, Any]:
    variables = [_variable(name, {site.name: site.vitals[name][0] for site in sites}) for name in VITALS]
    return {
        "kind": "series",
        "name": "vitals",
        "table": "vitals",
        "window_h": [-OFFSET_H, 0],
        "step_h": 1,
        "aggregate": "mean",
        "variables": variables,
    }


def _labs(sites: list[SiteProfile]) -> dict[str, Any]:
    variables = [_variable(name, {site.name: site.labs[name][0] for site in sites}) for name in LABS]
    return {
        "kind": "table",
        "name": "labs",
        "table": "labs",
        "window_h": [-OFFSET_H, 0],
        "aggregate": "last",
        "variables": variables,
    }


def _history(sites: list[SiteProfile]) -> dict[str, Any]:
    sexes = {word: value for site in sites for word, value in ((site.female, 1), (site.male, 0))}
    codes = {name: {site.name: site.diagnoses[name] for site in sites} for name in CODES.names}
    return {
        "kind": "table",
        "name": "history",
        "table": "studies",
        "variables": [
            {"name": "age", "unit": "year", "range": list(AGE_RANGE)},
            {"name": "female", "code": "sex", "type": "binary", "values": sexes},
            {"name": "coding_completeness", "unit": "%", "range": [0.0, 100.0]},
        ],
        "multi_hot": [{"column": "diagnoses", "separator": ";", "codes": codes}],
    }


def _variable(name: str, codes: dict[str, str]) -> dict[str, Any]:
    variable: dict[str, Any] = {"name": name, "code": codes, "canonical": CANONICAL[name], "range": list(RANGES[name])}
    if name in MOLAR_MASS_G_MOL:
        variable["molar_mass_g_mol"] = MOLAR_MASS_G_MOL[name]
    if name == "potassium":
        variable["valence"] = 1
    return variable

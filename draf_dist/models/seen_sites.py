"""Whether a model is asked about sites that it was not trained at: what learns a site's habits should then be looked at twice.

Presence bits and the cross-modal gate learn what is usual to be measured, and to go together, where they were trained; at a site
left out of training they cost (UCI heart, one site left out: gate -.013, bits -.0035 AUROC; findings, second part).
"""

from collections.abc import Collection, Mapping

from draf_dist.config.spec import Spec


def trained_sites(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> tuple[str, ...]:
    """Sites with a study in the training split, of the counts of a release's manifest: site -> split -> what -> number."""
    return tuple(site for site, splits in counts.items() if splits.get("train", {}).get("studies", 0))


def site_warning(config: Spec, trained: Collection[str], asked: Collection[str]) -> str | None:
    """What to tell a reader if parts of the model learn a site's habits and sites are asked about that training did not have.

    config: of the model. trained, asked: names of sites.
    """
    strange = sorted(set(asked) - set(trained))
    habits = site_habits(config)
    if not strange or not habits:
        return None
    return (
        f"Site {', '.join(strange)}: not in training, and the model has {' and '.join(habits)}, which learn what is usual at a "
        "site. Compare with a model without before trusting it there. See severity in docs/models.md."
    )


def site_habits(config: Spec) -> tuple[str, ...]:
    """The parts of a model, by its config and those of the models within it, that learn what is usual at a site."""
    within = [value for _, value in config if isinstance(value, Spec)]
    own = ("presence bits",) if getattr(config, "presence_bits", False) else ()
    gate = ("a cross-modal gate",) if getattr(config, "kind", None) == "severity_cross_modal_gate" else ()
    return tuple(dict.fromkeys((*own, *gate, *(habit for one in within for habit in site_habits(one)))))

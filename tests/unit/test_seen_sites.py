"""The warning where a model that learns a site's habits is asked about another site."""

import pytest

from draf_dist.config.spec import Spec
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.models.fusion.severity_gate import SeverityGateConfig
from draf_dist.models.fusion.severity_rejection import SeverityRejectionConfig
from draf_dist.models.seen_sites import site_habits, site_warning, trained_sites

BITS, GATE = "presence bits", "a cross-modal gate"


@pytest.mark.parametrize(
    ("config", "habits"),
    [
        (MeanConfig(), ()),
        (DrafConfig(presence_bits=True), (BITS,)),
        (SeverityGateConfig(), (GATE,)),
        (SeverityGateConfig(fusion=MeanConfig(presence_bits=True)), (GATE, BITS)),
        (SeverityRejectionConfig(), ()),
        (SeverityRejectionConfig(fusion=DrafConfig(presence_bits=True)), (BITS,)),
    ],
)
def test_what_of_a_model_learns_habits(config: Spec, habits: tuple[str, ...]) -> None:
    assert site_habits(config) == habits
    message = site_warning(config, ["north"], ["north", "south"])
    assert (message is not None) == bool(habits)


def test_the_warning_names_the_sites_that_were_not_in_training() -> None:
    config = SeverityGateConfig(presence_bits=True)
    message = site_warning(config, trained=["north"], asked=["west", "north", "east"])
    assert message is not None
    assert message.startswith("Site east, west: not in training, and the model has presence bits and a cross-modal gate")
    assert site_warning(config, trained=["north", "east"], asked=["east"]) is None


def test_sites_of_training_are_those_with_studies_there() -> None:
    counts = {
        "north": {"train": {"studies": 7, "cxr": 3}, "val": {"studies": 2}},
        "south": {"train": {"studies": 0}, "test": {"studies": 5}},
        "west": {"ood": {"studies": 9}},
    }
    assert trained_sites(counts) == ("north",)

"""What `draf prepare` says of the studies that it left out."""

import pytest

from draf_dist.cli.describe_release import SHOWN_REJECTIONS, print_quarantine
from draf_dist.schema.release import Quarantine, QuarantinedStudy


@pytest.mark.parametrize("more", [0, 13])
def test_the_first_studies_are_named_and_the_others_counted(more: int, capsys: pytest.CaptureFixture[str]) -> None:
    number = SHOWN_REJECTIONS + more
    studies = tuple(QuarantinedStudy(site="north", where=f"stays.csv row {row}", reason="no label") for row in range(number))
    quarantine = Quarantine(num_studies=number, limit=0.5, reasons={"no label": number}, studies=studies, out_of_range={})
    print_quarantine(quarantine, {"north": {"train": {"studies": 100 - number}}})
    said = capsys.readouterr().out
    assert f"Quarantine: {number} studies ({number:.1f}% of 100)" in said
    assert said.count("stays.csv row") == SHOWN_REJECTIONS
    assert ("and 13 more: quarantine.json" in said) == (more == 13)

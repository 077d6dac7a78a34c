"""The command line itself: what happens where no verb has a say."""

import pytest

from draf_dist.cli import doctor
from draf_dist.cli.app import main


def test_ctrl_c_outside_training_says_what_to_do_and_exits_5(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(store: str | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    assert ended.value.code == 5
    assert "Run the same command again" in capsys.readouterr().err

"""What the demo proves of itself, read back from its own artefacts."""

import hashlib
import json
import re
from pathlib import Path

import pyarrow.parquet as pq

from draf_dist.cli.demo_kill import Kill
from draf_dist.cli.demo_stages import PRETRAINED, REFERENCE, RUN, hold
from draf_dist.data.release import Release
from draf_dist.data.verify import verify
from draf_dist.training.journal import Line

LOADED_FROM_OUTSIDE = re.compile(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?https?:|@import""")


def check_artefacts(release: Release, out: Path, kill: Kill) -> dict[str, str]:
    """Check -> what was found.

    Raises:
        DataError: a check does not hold.
    """
    report = verify(release)
    run, reference = out / RUN, out / REFERENCE
    return {
        "release": f"{report.num_samples} studies, {report.num_members} members whole",
        "pre-trained encoder": _encoder(out / PRETRAINED, run),
        "recovery": _recovery(run, kill),
        "receipts": _receipts(release, run),
        "losses": _losses(run, reference, kill.step),
        "weights": same_weights(run, reference),
        "predictions": _predictions(release, run),
        "report": _report(run),
    }


def _encoder(pretrained: Path, run: Path) -> str:
    """Fine-tuning began from the encoder that pre-training left."""
    from draf_dist.training.job import FinetuneJob
    from draf_dist.training.run_folder import open_run

    job = open_run(str(run)).job
    assert isinstance(job, FinetuneJob)
    (modality, url), *_ = job.pretrained.items()
    digest = hashlib.sha256((pretrained / "model" / "encoder.safetensors").read_bytes()).hexdigest()
    hold(url.endswith(digest), "pre-trained encoder", f"sha256 {digest}", url)
    first, *_, last = (line for line in open_run(str(pretrained)).metrics() if line["event"] == "epoch")
    return f"{modality}, sha256 {digest[:16]}; validation loss {first['loss']:.2f} -> {last['loss']:.2f}"


def _recovery(run: Path, kill: Kill) -> str:
    """A second attempt on as many ranks began after the kill."""
    from draf_dist.training.run_folder import open_run

    attempts = [line for line in open_run(str(run)).ledger() if line["event"] == "attempt"]
    worlds = [line["world"] for line in attempts]
    hold(worlds == [2, 2], "recovery", "two attempts of two ranks each", f"attempts of {worlds}")
    seconds = attempts[1]["time"] - kill.time
    return f"rank {kill.rank} of 2 killed by SIGKILL after step {kill.step}; training again {seconds:.1f} s later"


def _receipts(release: Release, run: Path) -> str:
    """Both attempts together consumed every study of every epoch exactly once."""
    from draf_dist.training.ledger import effective_commits, receipts_by_epoch
    from draf_dist.training.run_folder import open_run

    lines = open_run(str(run)).ledger()
    attempts = {commit["attempt"] for commit in effective_commits(lines)}
    hold(attempts == {1, 2}, "receipts", "commits of attempts 1 and 2", str(sorted(attempts)))
    expected = release.manifest.receipts["train"]
    receipts = receipts_by_epoch(lines)
    wrong = sorted(epoch for epoch, found in receipts.items() if found != expected)
    hold(bool(receipts) and not wrong, "receipts", f"{expected.count} studies in every epoch", f"others in epochs {wrong}")
    return f"{len(receipts)} epochs x {expected.count} studies over 2 attempts, hash {expected.uid_sum}"


def _losses(run: Path, reference: Path, killed_at: int) -> str:
    """The loss of every step equals the unkilled run's, bit for bit."""
    from draf_dist.training.run_folder import open_run

    resumed, unkilled = (step_losses(open_run(str(folder)).metrics()) for folder in (run, reference))
    began = open_run(str(run)).ledger()
    start = next(line["start"] for line in began if line["event"] == "attempt" and line["attempt"] == 2)
    hold(0 < start <= killed_at, "losses", f"a resumption between step 1 and {killed_at}", f"step {start}")
    differing = sorted(step for step in resumed.keys() | unkilled.keys() if resumed.get(step) != unkilled.get(step))
    hold(not differing, "losses", "those of the unkilled run", f"others at steps {differing[:5]}")
    return f"{len(resumed)} steps bit for bit; killed after {killed_at}, resumed from {start}"


def step_losses(lines: list[Line]) -> dict[int, str]:
    """Step -> its loss and terms, as a text that is equal where every bit is."""
    # repr of a float is exact, so equal text means equal bits.
    return {line["step"]: json.dumps([line["loss"], line["terms"]]) for line in lines if line["event"] == "step"}


def same_weights(run: Path, reference: Path) -> str:
    """Both runs exported the same weights, bit for bit."""
    digests = [hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest() for folder in (run, reference)]
    hold(digests[0] == digests[1], "weights", "those of the undisturbed run", "others")
    return f"equal, sha256 {digests[0][:16]}"


def _predictions(release: Release, run: Path) -> str:
    counts = []
    for split in ("val", "test", "ood"):
        rows = pq.read_table(run / "predictions" / f"{split}.parquet").num_rows
        expected = release.manifest.receipts[split].count
        hold(rows == expected, f"predictions/{split}.parquet", f"{expected} studies", str(rows))
        counts.append(f"{split} {rows}")
    return ", ".join(counts)


def _report(run: Path) -> str:
    from draf_dist.evaluation.evaluate import check_predictions, read_evaluation
    from draf_dist.storage import open_store

    store = open_store(str(run))
    evaluation = read_evaluation(store)
    hold(evaluation is not None, "evaluation.json", "an evaluation", "none")
    if evaluation is not None:
        check_predictions(store, evaluation)
    text = (run / "report.html").read_text(encoding="utf-8")
    outside = LOADED_FROM_OUTSIDE.search(text)
    hold(outside is None, "report.html", "nothing that is loaded from elsewhere", outside.group() if outside else "")
    hold("<svg" in text and "</html>" in text, "report.html", "a whole page with its figures", f"{len(text)} characters")
    return f"{len(text.encode()) / 1024:.0f} KiB, self-contained"

"""Arms `ours` and `ours-joint`: our loader on the plain tars, which `draf prepare --from-webdataset` has indexed where they lie."""

from collections.abc import Callable, Iterator

from loader_job import BATCH, WORKERS, Images, Job
from torch import Tensor

from draf_dist.data.loader import Loader
from draf_dist.data.order import Order
from draf_dist.data.release import open_release

PACKAGES = ("draf_dist", "obstore", "torch", "simplejpeg")
SETTINGS = f"the tars as they are, indexed; Loader(threads={WORKERS}), order of 64 groups, crc32 of every file checked"


def open_epochs(job: Job) -> Callable[[int], Iterator[Images]]:
    joint = job.arm == "ours-joint"
    release = open_release(job.source("ours-joint" if joint else "ours"))
    sizes = tuple(shard.num_samples for shard in release.shards("train"))
    order = Order(sizes, release.version, job.seed, BATCH)
    loader = Loader(release, "train", order, threads=WORKERS)
    column = release.schema.names.index("image")

    def epoch(number: int) -> Iterator[Images]:
        # Begun anew in every epoch, as the peers are: batches of the next epoch that are made ahead would be a gift to its clock.
        for _, batch in loader.batches(number * order.steps_per_epoch, (number + 1) * order.steps_per_epoch):
            there = batch.present[:, column] & (batch.weight > 0)
            image = batch.inputs["image"]
            assert isinstance(image, Tensor)
            yield Images(image.permute(0, 2, 3, 1).numpy(), there.numpy())

    return epoch

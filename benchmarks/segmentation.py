"""What a trained segmentation makes of whole volumes: Dice by region, how well its uncertainty finds its errors, and a picture.

    python benchmarks/segmentation.py RUN --split test --json FILE --picture FILE.png

Every volume of the split is covered by patches of the size that the model was trained on, neighbours sharing `--overlap` voxels;
every voxel is predicted once, by `--passes` draws of the network's weights.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from draf_dist import noise
from draf_dist.data.whole_volumes import WholeVolume, whole_volumes
from draf_dist.evaluation.subject import open_subject
from draf_dist.evaluation.whole_masks import WholeMaps, predicted_tiles, volume_score, whole_maps
from draf_dist.metrics.segmentation import ErrorDetection, Overlap
from draf_dist.models.link import link_of
from draf_dist.models.segmentation import BayesianUnet
from draf_dist.models.variational import weight_keys
from draf_dist.schema.batch import Batch
from draf_dist.training.mask_scores import StudyScore

SEED = 0
# Patches that are predicted at once.
ROWS = 4


def main() -> None:
    """Scores a split and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run of a segmentation")
    parser.add_argument("--release", help="another release than the run's own")
    parser.add_argument("--split", default="test")
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--overlap", type=int, default=8)
    parser.add_argument("--json", type=Path, dest="out")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    subject = open_subject(given.run, given.release)
    model, schema = subject.exported.model.eval(), subject.release.schema
    assert isinstance(model, BayesianUnet)
    link = link_of(model.tasks[model.label])

    def passes(batch: Batch) -> Iterable[Tensor]:
        keys = noise.sample_keys(SEED, "mc", None, batch.uid, given.passes)
        return model.passes(subject.normaliser(batch), keys, weight_keys(SEED, None, given.passes, keys.device))

    scores: list[StudyScore] = []
    for volume in whole_volumes(subject.release, given.split, overlap=given.overlap):
        if volume.mask is None:
            continue
        tiles = list(predicted_tiles(volume, passes, link, ROWS))
        scores.append(volume_score(volume, tiles, schema.num_outputs))
        if given.picture is not None and len(scores) == 1:
            draw(volume, whole_maps(volume, tiles), given.picture, schema.label.outputs)
    found = summary(scores, schema.label.outputs)
    print(json.dumps(found, indent=1))
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


def summary(scores: Sequence[StudyScore], structures: Sequence[str]) -> dict[str, Any]:
    """By region the Dice of every volume and their mean; by uncertainty the AUROC of every volume, their mean, and that of all."""
    dice = np.stack([score.overlap.dice for score in scores])
    return {
        "volumes": len(scores),
        "nll": float(np.mean([score.nll for score in scores])),
        "dice": {
            name: {"mean": float(np.nanmean(values)), "each": [round(float(value), 4) for value in values]}
            for name, values in zip(structures, dice.T, strict=True)
        },
        "dice_of_regions": float(np.nanmean(dice[:, 1:])),
        "wrong_voxels": float(np.mean([_wrong(score.overlap) for score in scores])),
        "error_auroc": {
            name: {
                "mean": float(np.mean([score.errors[name].auroc for score in scores])),
                "each": [round(score.errors[name].auroc, 4) for score in scores],
                "pooled": _sum([score.errors[name] for score in scores]).auroc,
            }
            for name in scores[0].errors
        },
    }


def _wrong(overlap: Overlap) -> float:
    return 1.0 - float(overlap.both.sum() / overlap.true.sum())


def _sum(parts: Sequence[ErrorDetection]) -> ErrorDetection:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def draw(volume: WholeVolume, maps: WholeMaps, path: Path, structures: Sequence[str]) -> None:
    """The middle slice along each axis: image, mask, prediction, errors and uncertainties."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    assert volume.mask is not None
    image, truth = next(iter(volume.volumes.values()))[0], volume.mask[0]
    columns = {"image": image, "mask": truth, "prediction": maps.predicted, "wrong": (maps.predicted != truth) & (truth >= 0)}
    columns |= dict(maps.uncertainty)
    figure, axes = plt.subplots(3, len(columns), figsize=(3 * len(columns), 9))
    colours = mpl.colormaps["tab10"].resampled(len(structures))
    for axis in range(3):
        for column, (name, values) in enumerate(columns.items()):
            is_mask = name in ("mask", "prediction")
            cut = np.take(values, values.shape[axis] // 2, axis)
            shown = axes[axis, column].imshow(
                cut, origin="lower", cmap=colours if is_mask else "gray" if name == "image" else "inferno",
                vmin=-0.5 if is_mask else None, vmax=len(structures) - 0.5 if is_mask else None, interpolation="nearest",
            )  # fmt: skip
            axes[axis, column].set_axis_off()
            axes[axis, column].set_title(name if axis == 0 else "")
            if name in maps.uncertainty:
                figure.colorbar(shown, ax=axes[axis, column], fraction=0.04)
    figure.legend(handles=[Patch(color=colours(i), label=name) for i, name in enumerate(structures)], loc="lower center", ncols=6)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()

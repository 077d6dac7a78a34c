"""A picture of predicted masks: of some studies a slice, its mask, the prediction, errors and uncertainties side by side."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draf_dist.data.masks import BACKGROUND
from draf_dist.data.whole_volumes import WholeVolume
from draf_dist.evaluation.plots import COLOURS
from draf_dist.evaluation.whole_masks import TileMaps, whole_maps
from draf_dist.schema.label import IGNORED

PANELS = ("image", "mask", "prediction", "wrong")
PANEL_INCHES, DOTS_PER_INCH = 2.2, 100
# Of places of which nobody says what they are.
UNKNOWN_COLOUR = "#9ca3af"


@dataclass(frozen=True)
class MaskSlice:
    """An axial slice of a study, each (H, W). image: any unit; truth: int, IGNORED where nobody says; uncertainty: by name."""

    title: str
    image: NDArray[np.generic]
    truth: NDArray[np.integer]
    predicted: NDArray[np.int64]
    uncertainty: dict[str, NDArray[np.float32]]


def slice_of(volume: WholeVolume, tiles: Iterable[TileMaps], modality: str, title: str) -> MaskSlice:
    """Of a volume with a mask the slice that shows most of it: of all voxels with a structure, it has the most.

    modality: the volume that is shown, its first channel.
    """
    assert volume.mask is not None
    maps, truth = whole_maps(volume, tiles), volume.mask[0]
    at = int((truth > BACKGROUND).sum(axis=(1, 2)).argmax())
    uncertainty = {name: values[at] for name, values in maps.uncertainty.items()}
    return MaskSlice(title, volume.volumes[modality][0, at], truth[at], maps.predicted[at], uncertainty)


def drawn(slices: Sequence[MaskSlice], structures: Sequence[str]) -> bytes:
    """A PNG, a row a slice: image, mask, prediction, wrong voxels, uncertainties; front is up, the right side of the body right.

    structures: names by index, the background first. An uncertainty has one scale in all rows.
    """
    # Half a second that an evaluation of anything else need not wait; no pyplot, which keeps a state and looks for a screen.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = tuple(slices[0].uncertainty)
    size = (PANEL_INCHES * (len(PANELS) + len(names)), PANEL_INCHES * len(slices) + 0.8)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(len(slices), len(PANELS) + len(names), squeeze=False)
    colours = ["#000000", *(COLOURS[number % len(COLOURS)] for number in range(len(structures) - 1))]
    for row, one in zip(axes, slices, strict=True):
        _draw_masks(row, one, [UNKNOWN_COLOUR, *colours])
    for number, name in enumerate((*PANELS, *names)):
        axes[0, number].set_title(name)
    for number, name in enumerate(names):
        below = axes[:, len(PANELS) + number]
        top = max(float(one.uncertainty[name].max()) for one in slices)
        shown = [
            axis.imshow(one.uncertainty[name], cmap="inferno", vmin=0, vmax=top) for axis, one in zip(below, slices, strict=True)
        ]
        figure.colorbar(shown[0], ax=below, location="bottom", shrink=0.8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        # Arrays begin at the back.
        axis.invert_yaxis()
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, structures, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_masks(row: Any, one: MaskSlice, colours: Sequence[str]) -> None:
    """PANELS of a slice into a row of axes; colours: of IGNORED, the background, every structure."""
    from matplotlib.colors import ListedColormap

    row[0].imshow(one.image, cmap="gray")
    row[0].set_ylabel(one.title)
    for axis, mask in zip(row[1:3], (one.truth, one.predicted), strict=True):
        axis.imshow(mask, cmap=ListedColormap(colours), vmin=IGNORED - 0.5, vmax=len(colours) - 1.5, interpolation="nearest")
    row[3].imshow((one.predicted != one.truth) & (one.truth != IGNORED), cmap="gray", vmin=0, vmax=1)

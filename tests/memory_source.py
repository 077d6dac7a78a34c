"""A source whose studies are computed: small, the same for the same arguments, with every modality sometimes absent."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from draf_dist.schema.label import LabelSpec
from draf_dist.schema.modality import DataSchema, ImageSpec, SeriesSpec, TableSpec, VariableSpec
from draf_dist.schema.study import Rejection, Study
from draf_dist.sources.base import SourceCounts

KEY = b"sixteen or more bytes of key"
VITALS = (VariableSpec(name="hr", unit="1/min", low=20, high=250), VariableSpec(name="t"))
HISTORY = (VariableSpec(name="age", low=0, high=120), VariableSpec(name="icd", type="binary"))
SCHEMA = DataSchema(
    modalities=(
        ImageSpec(name="cxr", height=16, width=12),
        SeriesSpec(name="vitals", variables=VITALS, num_steps=4, step_h=1),
        TableSpec(name="history", variables=HISTORY),
    ),
    label=LabelSpec(name="death", classes=("survived", "died")),
    sites=("north", "south", "west"),
)
Change = Callable[[int, Study], Study | Rejection]


@dataclass
class MemorySource:
    """`num_studies` studies; `change` may replace the i-th. Every tenth subject has two studies, at two sites."""

    num_studies: int = 60
    image_shape: tuple[int, int, int] = (1, 20, 30)
    held_out_sites: frozenset[str] = frozenset({"west"})
    name: str = "small"
    schema: DataSchema = SCHEMA
    public_subject_key: bool = False
    card_sha256: str = hashlib.sha256(b"card").hexdigest()
    counts: SourceCounts = field(default_factory=SourceCounts)
    change: Change = lambda i, study: study

    def studies(self) -> Iterator[Study | Rejection]:
        for i in range(self.num_studies):
            yield self.change(i, self._study(i))

    def _study(self, i: int) -> Study:
        generator = np.random.default_rng(i)
        subject = f"patient {i - 1 if i % 10 == 1 else i}"
        values = generator.normal(80, 5, (4, 2)).astype(np.float32)
        values[generator.random((4, 2)) < 0.3] = np.nan
        inputs = {
            "cxr": generator.integers(0, 256, self.image_shape, dtype=np.uint8),
            "vitals": values,
            "history": np.array([[generator.integers(20, 90), generator.integers(0, 2)]], dtype=np.float32),
        }
        absent = ("cxr", "vitals", None, None)[i % 4]
        present = {name: array for name, array in inputs.items() if name != absent}
        digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in present.items() if name == "cxr"}
        return Study(
            subject=subject,
            site=self.schema.sites[(i // 2 + i % 2) % 3] if i % 5 else self.schema.sites[0],
            anchor=f"2020-01-{1 + i % 28:02d}",
            inputs=present,
            label=int(generator.random() < 0.3),
            image_digests=digests,
            quality={"cxr": 0.5} if i % 3 == 0 else {},
        )


def only(i: int, function: Callable[[Study], Study | Rejection]) -> Change:
    """Changes the i-th study and no other."""
    return lambda number, study: function(study) if number == i else study


def with_image(study: Study, pixels: np.ndarray, digest: str) -> Study:
    return replace(study, inputs={**study.inputs, "cxr": pixels}, image_digests={"cxr": digest})

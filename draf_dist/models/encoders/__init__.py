"""One encoder a file. Adding one is one file and one line in the union."""

import difflib
from typing import Annotated

from pydantic import Field

from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain
from draf_dist.models.encoders.genomics import GenomicsConfig
from draf_dist.models.encoders.gru import GruConfig
from draf_dist.models.encoders.image2d import Image2dConfig
from draf_dist.models.encoders.monai_net import MonaiConfig
from draf_dist.models.encoders.patch_bag import PatchBagConfig
from draf_dist.models.encoders.series import SeriesTransformerConfig
from draf_dist.models.encoders.tabular import TabularConfig
from draf_dist.models.encoders.volume3d import Volume3dConfig
from draf_dist.models.mc import Scope
from draf_dist.schema.modality import DataSchema, ModalitySpec

EncoderConfig = Annotated[
    Image2dConfig
    | Volume3dConfig
    | MonaiConfig
    | SeriesTransformerConfig
    | GruConfig
    | PatchBagConfig
    | TabularConfig
    | GenomicsConfig,
    Field(discriminator="kind"),
]


class EncoderChoice(Spec):
    """The encoder of every modality: one per kind, and by name where a modality needs another.

    mc_scope: what Monte-Carlo passes draw anew; `head`, the dropout of the projections alone, at about the cost of one pass.
    """

    image: EncoderConfig = Image2dConfig()
    # Left out of the stored form where they are not set: jobs from before there was such a thing keep their names.
    volume: EncoderConfig = Field(Volume3dConfig(), exclude_if=lambda encoder: encoder == Volume3dConfig())
    series: EncoderConfig = SeriesTransformerConfig()
    table: EncoderConfig = TabularConfig()
    by_name: dict[str, EncoderConfig] = {}
    mc_scope: Scope = Field("full", exclude_if=lambda scope: scope == "full")

    def of(self, spec: ModalitySpec) -> EncoderConfig:
        """The encoder of one modality."""
        by_kind = {"image": self.image, "volume": self.volume, "series": self.series, "table": self.table}
        return self.by_name.get(spec.name, by_kind[spec.kind])

    def check_names(self, schema: DataSchema) -> None:
        """Refuses encoders for modalities that the data don't have.

        Raises:
            SpecError: a name in by_name that is none of the schema's.
        """
        for name in self.by_name:
            if name not in schema.names:
                near = difflib.get_close_matches(name, schema.names, n=1)
                remedy = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(schema.names)}."
                raise SpecError(
                    explain("model.encoders.by_name", expected="a modality of the release", found=repr(name), remedy=remedy)
                )

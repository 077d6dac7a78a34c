"""The network of masked-value pre-training: a series encoder, and a linear decoder that says what was hidden."""

import torch
from torch import Tensor, nn

from draf_dist.models.encoders.gru import GruEncoder
from draf_dist.models.encoders.series import SeriesTransformer
from draf_dist.schema.batch import SeriesInput

# Those that say something of every step. A bag says something of its whole.
StepEncoder = SeriesTransformer | GruEncoder


class MaskedValuesNet(nn.Module):
    """A series with hidden values in, an estimate of every value of the grid out.

    The decoder reads [token of the step, features of the series]: through the second the loss reaches the pooling and the
    projection, so nothing that fine-tuning loads is as it was at random.
    """

    def __init__(self, encoder: StepEncoder, width: int, num_variables: int) -> None:
        """width: of the encoder's features."""
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Linear(encoder.hidden + width, num_variables)

    def forward(self, series: SeriesInput, keys: Tensor) -> Tensor:
        """One pass of dropout, with keys int64 (B,): z-scores (B, T, F)."""
        tokens = self.encoder.tokens(series, keys[None])
        features = self.encoder.pool(tokens, series, keys[None])
        everywhere = features[:, :, None].expand(-1, -1, tokens.shape[2], -1)
        decoded: Tensor = self.decoder(torch.cat([tokens, everywhere], dim=-1))[0]
        return decoded

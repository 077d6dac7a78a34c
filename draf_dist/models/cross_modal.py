"""Whether a modality goes with the subject's others: a score trained, without labels, to tell swapped modalities (findings, 2).

e_m = LN(MLP_m x), ctx_m = mean over present j != m of V_mj e_j, cs_m = w . relu(A [e * ctx, |e - ctx|]) + t cos(e, ctx) + b, the
mean of 3 nets; z_m = (cs - q50) / (q99 - q50) on clean validation. Another subject's modality is as clean as one's own, so no look
at the modality alone can tell. It can be told in three of four cases at best: enough for a soft gate, not for rejection.

All of this is the findings'. Ours: the sizes; an image or volume enters by its thumbnail; where a modality is the only one present
there is nothing to compare, and z is 0; the nets are fitted before the fusion model is trained, on clean rows that are held in
memory, and frozen: their weights are buffers, stored with the model, and no optimizer sees them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from draf_dist import noise
from draf_dist.models.absent import clear_absent
from draf_dist.models.backbones import module_name
from draf_dist.models.severity_image import thumbnail, thumbnail_size
from draf_dist.schema.batch import Batch, ModalityInput, SeriesInput
from draf_dist.schema.categories import batch_as_numbers, num_numbers
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, SeriesSpec, VolumeSpec

NETS = 3
HIDDEN, WIDTH, COMPARED = 64, 16, 32
STEPS, ROWS_AT_ONCE = 600, 128
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.1
# Of every modality of a row to be another subject's.
SWAPPED = 0.25
MEDIAN, HIGH = 0.5, 0.99
_LEAST_SPREAD = 1e-6


def content(value: ModalityInput) -> Tensor:
    """The x (B, D) of a modality: standardised values, 0 where not observed; of an image its thumbnail."""
    return value.values.flatten(1) if isinstance(value, SeriesInput) else thumbnail(value)


def content_size(spec: ModalitySpec) -> int:
    """D of a modality's content."""
    match spec:
        case ImageSpec():
            return thumbnail_size(spec.channels, 2)
        case VolumeSpec():
            return thumbnail_size(spec.channels, 3)
        case SeriesSpec():
            return spec.num_steps * len(spec.variables)
    return num_numbers(spec)


class Embedding(nn.Module):
    """e = LN(W1 relu(W0 x + b0) + b1) of one modality, of 3 nets at once; the weights are buffers."""

    weight0: Tensor
    weight1: Tensor
    bias0: Tensor
    bias1: Tensor

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        for layer, (inputs, outputs) in enumerate(((num_inputs, HIDDEN), (HIDDEN, WIDTH))):
            self.register_buffer(f"weight{layer}", uniform(NETS, inputs, outputs))
            self.register_buffer(f"bias{layer}", torch.zeros(NETS, 1, outputs))

    def forward(self, values: Tensor) -> Tensor:
        """(B, D) to (nets, B, WIDTH)."""
        hidden = torch.baddbmm(self.bias0, values.expand(NETS, -1, -1), self.weight0).relu()
        return functional.layer_norm(torch.baddbmm(self.bias1, hidden, self.weight1), (WIDTH,))


class Comparison(nn.Module):
    """cs of embeddings: V (nets, M, M, Z, Z), A (nets, 2 Z, COMPARED), w, t and b of 3 nets; buffers all."""

    context: Tensor
    compare: Tensor
    weigh: Tensor
    cosine: Tensor
    bias: Tensor

    def __init__(self, num_modalities: int) -> None:
        super().__init__()
        self.register_buffer("context", uniform(NETS, num_modalities, num_modalities, WIDTH, WIDTH))
        self.register_buffer("compare", uniform(NETS, 2 * WIDTH, COMPARED))
        self.register_buffer("weigh", uniform(NETS, COMPARED, 1))
        self.register_buffer("cosine", torch.zeros(NETS, 1, 1))
        self.register_buffer("bias", torch.zeros(NETS, 1, 1))

    def forward(self, embedded: Tensor, present: Tensor) -> Tensor:
        """Embeddings (nets, B, M, Z) and present (B, M) to (nets, B, M); of no meaning where nothing else is present."""
        embedded = torch.where(present.unsqueeze(-1), embedded, 0.0)
        others = ~torch.eye(present.shape[1], dtype=torch.bool, device=present.device)
        maps = torch.where(others[:, :, None, None], self.context, 0.0)
        count = others.to(embedded.dtype) @ present.to(embedded.dtype).unsqueeze(-1)
        context = torch.einsum("nbjz,nmjzy->nbmy", embedded, maps) / count.clamp_min(1)
        pair = torch.cat([embedded * context, (embedded - context).abs()], dim=-1)
        looked = torch.einsum("nbmz,nzc->nbmc", pair, self.compare).relu()
        score = torch.einsum("nbmc,nco->nbm", looked, self.weigh)
        return score + self.cosine * functional.cosine_similarity(embedded, context, dim=-1) + self.bias


class Nets(nn.Module):
    """From contents to cs, of each net."""

    def __init__(self, schema: DataSchema) -> None:
        super().__init__()
        self.names = schema.names
        self.embeddings = nn.ModuleDict({module_name(spec.name): Embedding(content_size(spec)) for spec in schema.modalities})
        self.comparison = Comparison(len(self.names))

    def forward(self, contents: dict[str, Tensor], present: Tensor) -> Tensor:
        """(nets, B, M) of contents (B, D) and present (B, M)."""
        embedded = [self.embeddings[module_name(name)](contents[name]) for name in self.names]
        found: Tensor = self.comparison(torch.stack(embedded, dim=2), present)
        return found


class CrossModalScore(nn.Module):
    """z (B, M) of a normalised batch; a row's score looks at no other row. Buffers: median, slope (M,), and the nets'.

    Until it is fitted it says 0 of everything.
    """

    median: Tensor
    slope: Tensor

    def __init__(self, schema: DataSchema) -> None:
        super().__init__()
        self.schema = schema
        self.nets = Nets(schema)
        self.register_buffer("median", torch.zeros(len(schema.names)))
        self.register_buffer("slope", torch.zeros(len(schema.names)))

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """(cs - q50) / (q99 - q50), f32 (B, M); 0 where a modality is absent or alone."""
        with torch.autocast(batch.present.device.type, enabled=False):
            score = self.score(batch)
        return torch.where(comparable(batch.present), (score - self.median) * self.slope, 0.0)

    def score(self, batch: Batch) -> Tensor:
        """The cs (B, M), mean of the nets; of no meaning where a modality is absent or alone."""
        found: Tensor = self.nets(contents_of(batch_as_numbers(self.schema, batch)), batch.present).mean(0)
        return found

    def fit(self, train: Iterable[Batch], validation: Iterable[Batch], seed: int) -> None:
        """Trains the nets on clean, normalised batches, then sets what is usual on clean validation, modality by modality.

        A modality that validation never has beside another one keeps z = 0.
        """
        rows = CleanRows.of(batch_as_numbers(self.schema, batch) for batch in train)
        if not comparable(rows.present).any():
            return
        train_nets(self.nets, rows, seed)
        scores, counted = [], []
        with torch.no_grad():
            for batch in validation:
                scores.append(self.score(batch))
                counted.append(comparable(batch.present) & (batch.weight > 0).unsqueeze(1))
        if scores:
            self.standardise(torch.cat(scores), torch.cat(counted))

    @torch.no_grad()
    def standardise(self, scores: Tensor, counted: Tensor) -> None:
        """Sets q50 and 1 / (q99 - q50) from clean scores (N, M), those that are counted."""
        for column in range(scores.shape[1]):
            clean = scores[counted[:, column], column]
            if len(clean):
                middle, high = (torch.quantile(clean.double(), share) for share in (MEDIAN, HIGH))
                self.median[column] = middle
                self.slope[column] = 1 / (high - middle).clamp_min(_LEAST_SPREAD)


@dataclass(frozen=True)
class CleanRows:
    """Contents of N clean rows by modality, f32 (N, D); present bool (N, M); uid int64 (N,)."""

    contents: dict[str, Tensor]
    present: Tensor
    uid: Tensor

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> "CleanRows":
        """The rows of batches that count, copied: a loader uses its memory again."""
        contents: dict[str, list[Tensor]] = {}
        present, uid = [torch.zeros(0, 0, dtype=torch.bool)], [torch.zeros(0, dtype=torch.int64)]
        for batch in batches:
            kept = batch.weight > 0
            present = [*(part for part in present if part.shape[1]), batch.present[kept]]
            uid.append(batch.uid[kept])
            for name, values in contents_of(batch).items():
                contents.setdefault(name, []).append(values[kept])
        return cls({name: torch.cat(parts) for name, parts in contents.items()}, torch.cat(present), torch.cat(uid))

    def drawn(self, chosen: Tensor, partners: Tensor, swapped: Tensor) -> dict[str, Tensor]:
        """Contents of the chosen rows (n,), of partners (n, M) where swapped, bool (n, M)."""
        return {
            name: torch.where(swapped[:, column, None], values[partners[:, column]], values[chosen])
            for column, (name, values) in enumerate(self.contents.items())
        }


def comparable(present: Tensor) -> Tensor:
    """Bool (B, M): modalities that are present beside another one."""
    return present & (present.sum(1, keepdim=True) > 1)


def contents_of(batch: Batch) -> dict[str, Tensor]:
    """Every modality's content."""
    return {name: content(value) for name, value in clear_absent(batch).items()}


def train_nets(nets: Nets, rows: CleanRows, seed: int) -> None:
    """600 steps of Adam on 128 rows in which a quarter of the modalities is another row's: the cross-entropy of telling which.

    A function of the rows, their order and the seed alone. Another row of the same subject counts as another subject's: there are
    few. nets begin where they are.
    """
    weights = {name: value.clone().requires_grad_() for name, value in nets.named_buffers()}
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = swap_loss(nets, weights, rows, noise.chain(seed, "cross_modal", step))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        for name, value in nets.named_buffers():
            value.copy_(weights[name])


def swap_loss(nets: Nets, weights: dict[str, Tensor], rows: CleanRows, key: int) -> Tensor:
    """The cross-entropy of telling swapped modalities, the mean over those that can be compared, summed over the nets."""
    chosen, partners, swapped = draw(rows, key)
    present = rows.present[chosen]
    logits = functional_call(nets, weights, (rows.drawn(chosen, partners, swapped), present))
    losses = functional.binary_cross_entropy_with_logits(logits, swapped.to(logits.dtype).expand_as(logits), reduction="none")
    counted = comparable(present)
    # Summed: none of the nets learns from what another one says.
    return torch.where(counted, losses, 0.0).sum() / counted.sum().clamp_min(1)


def draw(rows: CleanRows, key: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n,), for each and every modality a partner that has it (n, M), and whether it is swapped, bool (n, M)."""
    device, modalities = rows.uid.device, rows.present.shape[1]
    keys = noise.hash64(key, torch.arange(ROWS_AT_ONCE, device=device))
    numbers = noise.uniform(keys, (1 + 2 * modalities,))
    chosen = (numbers[:, 0] * len(rows.uid)).long()
    partners = torch.zeros(ROWS_AT_ONCE, modalities, dtype=torch.int64, device=device)
    for column in range(modalities):
        having = rows.present[:, column].nonzero()[:, 0]
        if len(having):
            partners[:, column] = having[(numbers[:, 1 + column] * len(having)).long()]
    other = rows.uid[partners] != rows.uid[chosen].unsqueeze(1)
    swapped = (numbers[:, 1 + modalities :] < SWAPPED) & rows.present[chosen] & other
    return chosen, partners, swapped


def uniform(*shape: int) -> Tensor:
    """As nn.Linear starts: within 1 / sqrt(inputs), which are the last axis but one."""
    bound = 1 / math.sqrt(shape[-2])
    return torch.empty(shape).uniform_(-bound, bound)

"""SimCLR as one would write it by hand in plain torch: what benchmarks/simclr.py measures ours against.

The same network and loss; views of about the same strength by torch.rand on the device, all geometry in one grid_sample; both views
in one forward; autocast, AdamW, clip_grad_norm_. No order that can be repeated, no records of what was done, no heads of its own.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM, TAU = 1e-3, 0.01, 1.0, 0.1


class PlainLoop:
    """images: normalised, f32 (B, C, H, W) on the device."""

    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.network, self.device, self.dtype = network.to(device).train(), device, dtype
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def steps(self, batches: Iterator[Tensor]) -> Iterator[float]:
        """The loss of every step: read back, as a loop that shows it does."""
        for images in batches:
            first, second = self.views(images)
            embedding = self.forward(torch.cat([first, second]))
            loss = self.loss(embedding)
            self.backward(loss)
            self.update()
            yield loss.item()

    def views(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both of the same crop, as ours are."""
        side = 0.4 + 0.2 * torch.rand(len(images), 1, 1, 1, device=self.device)
        centre = side / 2 + (1 - side) * torch.rand(len(images), 1, 1, 2, device=self.device)
        return view(images, centre, side), view(images, centre, side)

    def forward(self, images: Tensor) -> Tensor:
        keys = torch.randint(2**62, (len(images),), device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            embedding: Tensor = self.network(images, keys).embedding
        return embedding.float()

    def loss(self, embedding: Tensor) -> Tensor:
        """NT-Xent over both views of all rows."""
        unit = functional.normalize(embedding, dim=1)
        similarity = (unit @ unit.T / TAU).fill_diagonal_(-torch.inf)
        other = torch.arange(len(unit), device=self.device).roll(len(unit) // 2)
        return functional.cross_entropy(similarity, other)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def view(images: Tensor, centre: Tensor, side: Tensor) -> Tensor:
    """Crop, rotation and scale, elastic field, gamma, noise, boxes."""
    shape, device = (len(images), 1, 1, 1), images.device
    image = functional.grid_sample(images, grid(images, centre, side), padding_mode="border", align_corners=False)
    low, high = image.amin((-2, -1), keepdim=True), image.amax((-2, -1), keepdim=True)
    gamma = torch.empty(shape, device=device).uniform_(math.log(0.8), math.log(1.25)).exp()
    image = low + (high - low) * ((image - low) / (high - low).clamp_min(1e-6)).pow(gamma)
    image = image + 0.1 * torch.rand(shape, device=device) * torch.randn_like(image)
    return image.masked_fill(boxes(images), 0.0)


def grid(images: Tensor, centre: Tensor, side: Tensor) -> Tensor:
    """Where each pixel is read from: (B, H, W, 2) in [-1, 1]."""
    rows, device = len(images), images.device
    angle = torch.empty(rows, device=device).uniform_(-7, 7) * (math.pi / 180)
    scale = torch.empty(rows, device=device).uniform_(0.9, 1.1)
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], 1).view(rows, 2, 2) / scale.view(rows, 1, 1)
    affine = functional.affine_grid(torch.cat([turn, torch.zeros(rows, 2, 1, device=device)], 2), list(images.shape), False)
    coarse = torch.rand(rows, 2, 8, 8, device=device) * 0.06 - 0.03
    field = functional.interpolate(coarse, images.shape[-2:], mode="bicubic", align_corners=False)
    return (affine + field.permute(0, 2, 3, 1)) * side + (2 * centre - 1)


def boxes(images: Tensor) -> Tensor:
    """Up to three boxes of a row: bool (B, 1, H, W)."""
    rows, device, found = len(images), images.device, None
    for number in range(3):
        sides = torch.empty(rows, 2, device=device).uniform_(0.1, 0.2)
        low = torch.rand(rows, 2, device=device) * (1 - sides)
        used = torch.rand(rows, device=device) < 1 - number / 3
        y, x = ((torch.arange(n, device=device) + 0.5) / n for n in images.shape[-2:])
        inside_y = (y >= low[:, :1]) & (y < low[:, :1] + sides[:, :1]) & used[:, None]
        inside_x = (x >= low[:, 1:]) & (x < low[:, 1:] + sides[:, 1:])
        box = inside_y[:, None, :, None] & inside_x[:, None, None, :]
        found = box if found is None else found | box
    assert found is not None
    return found

"""MAML in PyTorch with `torch.func`, tasks by `vmap`: a peer of `benchmarks.speed --against=torch`.

PyTorch is not a dependency: whoever has it can compare with it, on its GPU where there is one.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from maml.episodes import Episode
from maml.settings.settings import Settings

Weights = dict[str, Tensor]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class BatchNorm(nn.Module):
    """By the batch's statistics, with β and without γ, as the original has it."""

    def __init__(self, channels: int):
        """Makes β [channels], 0."""
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes x [n, C, H, W] per channel."""
        return nn.functional.batch_norm(x, None, None, bias=self.beta, training=True, eps=1e-3)


def network_of(settings: Settings) -> nn.Module:
    """The paper's network of the settings: convolutions with batch norm by the batch, or 1-40-40-1."""
    if not settings.classification:
        return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    side, _, channels = settings.input_shape
    layers: list[nn.Module] = []
    for _ in range(4):
        stride = 1 if settings.max_pool else 2
        before = 1 - (stride - 1) * (side % 2 == 0)  # TensorFlow pads even sides after the last pixel alone
        layers.append(nn.ZeroPad2d((before, 1, before, 1)))
        layers.append(nn.Conv2d(channels, settings.num_filters, 3, stride))
        layers.append(BatchNorm(settings.num_filters))
        layers += [nn.ReLU(), nn.MaxPool2d(2)] if settings.max_pool else [nn.ReLU()]
        channels, side = settings.num_filters, side // 2 if settings.max_pool else -(-side // 2)
    features = channels * side * side if settings.dataset.flatten else channels
    layers += [] if settings.dataset.flatten else [nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, settings.num_classes))


def meta_loss(settings: Settings, network: nn.Module) -> Callable[[Weights, list[Tensor]], tuple]:
    """(θ, a meta-batch [tasks, n, …]) ↦ the query loss and, beside it, the support loss before adaptation."""

    def loss(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(network, weights, (x,))
        if not settings.classification:
            return nn.functional.mse_loss(outputs, y)
        return nn.functional.cross_entropy(outputs, y, reduction="sum") / settings.update_batch_size

    def norms(weights: Weights) -> set[str]:
        kinds = dict(network.named_modules())
        return {n for n in weights if isinstance(kinds[n.rsplit(".", 1)[0]], BatchNorm)}

    def of_task(theta: Weights, x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> tuple:
        kept, weights, before = norms(theta), theta, None
        for _ in range(settings.num_updates):
            slope = grad(loss)(weights, x, y)
            before = loss(weights, x, y).detach() if before is None else before
            if settings.stop_grad:
                slope = {name: value.detach() for name, value in slope.items()}
            weights = {
                name: value if name in kept else value - settings.update_lr * slope[name]
                for name, value in weights.items()
            }
        return loss(weights, query_x, query_y), before

    def mean(theta: Weights, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        query, support = vmap(of_task, (None, 0, 0, 0, 0))(theta, *batch)
        return query.mean(), support.mean()

    return mean


def tensors(settings: Settings, episodes: Episode) -> list[Tensor]:
    """A meta-batch as PyTorch has it: images [tasks, n, C, H, W] between 0 and 1, labels of 64 bits."""

    def tensor(field: np.ndarray) -> Tensor:
        if field.dtype == np.uint8:
            field = np.moveaxis(field, -1, -3) / np.float32(settings.dataset.scale)
        whole = np.issubdtype(field.dtype, np.integer)
        return torch.tensor(field, dtype=torch.int64 if whole else torch.float32, device=DEVICE)

    return [tensor(np.asarray(field)) for field in episodes]


def meta_gradient(loss: Callable, theta: Weights, batch: list[Tensor]) -> tuple[tuple[Tensor, ...], dict]:
    """The meta-gradient, unclipped, by `meta_loss`, and the means of the losses."""
    query, support = loss(theta, batch)
    losses = {"support_loss": support.item(), "query_loss": query.item()}
    return torch.autograd.grad(query, list(theta.values())), losses


def step_of(settings: Settings, batches: Episode) -> Callable[[], dict[str, float]]:
    """One update by the next of the meta-batches [meta-batches, tasks, …], again and again."""
    torch.manual_seed(settings.seed)
    network = network_of(settings).to(DEVICE)
    theta = {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}
    optimizer = torch.optim.Adam(theta.values(), settings.meta_lr)
    clip, loss = settings.dataset.clip, meta_loss(settings, network)
    turns = itertools.cycle(list(zip(*tensors(settings, batches), strict=True)))

    def step() -> dict[str, float]:
        gradient, losses = meta_gradient(loss, theta, next(turns))
        for value, slope in zip(theta.values(), gradient, strict=True):
            value.grad = slope if clip is None else slope.clamp(-clip, clip)
        optimizer.step()
        return losses

    return step

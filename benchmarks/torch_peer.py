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


def network_of(settings: Settings) -> nn.Module:
    """The paper's network of the settings: convolutions with batch norm by the batch, or 1-40-40-1."""
    if not settings.classification:
        return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    side, _, channels = settings.input_shape
    layers: list[nn.Module] = []
    for _ in range(4):
        stride = 1 if settings.max_pool else 2
        layers.append(nn.Conv2d(channels, settings.num_filters, 3, stride, padding=1))
        layers.append(nn.BatchNorm2d(settings.num_filters, 1e-3, track_running_stats=False))
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
        return {n for n in weights if isinstance(kinds[n.rsplit(".", 1)[0]], nn.BatchNorm2d)}

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


def step_of(settings: Settings, batches: Episode) -> Callable[[], dict[str, float]]:
    """One update by the next of the meta-batches [meta-batches, tasks, …], again and again."""
    torch.manual_seed(settings.seed)
    network = network_of(settings).to(DEVICE)
    theta = {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}
    optimizer = torch.optim.Adam(theta.values(), settings.meta_lr)
    clip, loss = settings.dataset.clip, meta_loss(settings, network)

    def tensor(field: np.ndarray) -> Tensor:
        if field.dtype == np.uint8:
            field = np.moveaxis(field, -1, -3) / np.float32(settings.dataset.scale)
        whole = np.issubdtype(field.dtype, np.integer)
        return torch.as_tensor(field, dtype=torch.int64 if whole else torch.float32, device=DEVICE)

    ready = [[tensor(np.asarray(field)[i]) for field in batches] for i in range(len(batches.support_x))]
    turns = itertools.cycle(ready)

    def step() -> dict[str, float]:
        query, support = loss(theta, next(turns))
        gradient = torch.autograd.grad(query, list(theta.values()))
        for value, slope in zip(theta.values(), gradient, strict=True):
            value.grad = slope if clip is None else slope.clamp(-clip, clip)
        optimizer.step()
        return {"support_loss": float(support), "query_loss": float(query)}

    return step

"""The networks by name. A new one is a file in `maml/networks/` and a row here."""

from collections.abc import Mapping
from typing import NamedTuple


class Network(NamedTuple):
    """A row of `NETWORKS`: the function of (input_shape, outputs, …) that builds it, and a line on it.

    With `outputs=None` it builds the backbone alone, from inputs to an embedding [n, features].

    Fields:
        home: the function. It is given those of the flags' values that it declares as keyword arguments:
            filters, norm, max_pool, flatten, hidden, dtype.
        about: a line on it.
        flags: of the network's, those that it reads; others given with it are an error. None: unknown.
        images: it takes images alone.
        vectors: it takes vectors alone.
        norm: it has norms; False: none, whatever --norm is.
        options: keyword arguments beside these.
    """

    home: str
    about: str
    flags: tuple[str, ...] | None = ("norm",)
    images: bool = False
    vectors: bool = False
    norm: bool = True
    options: Mapping[str, object] = {}

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of an input that it takes; none: any."""
        return ("H", "W", "C") if self.images else ("D",) * self.vectors


NETWORKS: Mapping[str, Network] = {
    "conv4": Network(
        "maml.networks.conv4:conv4",
        "four convolutions (Vinyals et al. 2016)",
        flags=("norm", "num_filters", "max_pool"),
        images=True,
    ),
    "conv4_map": Network(
        "maml.networks.conv4_map:conv4_map",
        "to a map, for --learner=relation (Sung et al. 2018)",
        flags=("num_filters",),
        images=True,
    ),
    "conv4_torch": Network(
        "maml.networks.conv4:conv4",
        "conv4 with the initial values of PyTorch before 1.2, as Snell et al. 2017 began",
        flags=("norm", "num_filters", "max_pool"),
        images=True,
        options={"torch_values": True},
    ),
    "koch": Network(
        "maml.networks.koch:koch",
        "to an embedding, of 105×105, for --learner=siamese (Koch et al. 2015)",
        flags=("num_filters",),
        images=True,
        norm=False,
    ),
    "leo": Network(
        "maml.networks.leo:leo",
        "encoder, relation network and decoder of --learner=leo",
        flags=(),
        vectors=True,
        norm=False,
    ),
    "mlp": Network("maml.networks.mlp:mlp", "fully connected"),
    "resnet12": Network(
        "maml.networks.resnet12:resnet12",
        "12 convolutions in residual blocks of 64-160-320-640 channels (Lee et al. 2019)",
        images=True,
        options={"widths": (64, 160, 320, 640)},
    ),
    "resnet12_narrow": Network(
        "maml.networks.resnet12:resnet12",
        "the same of 64-128-256-512 channels (Oreshkin et al. 2018)",
        images=True,
        options={"widths": (64, 128, 256, 512)},
    ),
}

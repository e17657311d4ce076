"""Meta-SGD (Li, Zhou, Chen & Li 2017): MAML with learned step sizes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import keras
import tensorflow as tf

from maml.learners.base import State
from maml.learners.extra import extra_variable
from maml.learners.losses import LossFunction
from maml.learners.maml import Maml
from maml.networks.stateless import Weights, weight_names
from maml.settings.own import ADAPT, Flag

if TYPE_CHECKING:
    from maml.settings.settings import Settings


class _State(NamedTuple):
    """A task's fast weights θ′, and the step sizes α."""

    weights: Weights
    rates: Weights


class MetaSgd(Maml):
    """Meta-SGD: θ′ = θ − α ∘ ∇L(θ), where α is learned with θ, in length and sign.

    α is in `extra_variables`, under the names of the weights: "alpha/conv1/kernel".
    """

    flags = (
        ADAPT._replace(default=".*"),
        Flag("alpha_low", 0.005, "α starts uniform between this and --alpha_high"),
        Flag("alpha_high", 0.1, "α starts uniform between --alpha_low and this"),
        Flag(
            "alpha_per",
            "weight",
            "a step size α for every single weight, or for every layer",
            choices=("weight", "layer"),
        ),
    )

    def __init__(
        self,
        network: keras.Model,
        loss: LossFunction,
        *,
        inner_lr: float | None = None,
        alpha_low: float = 0.005,
        alpha_high: float = 0.1,
        alpha_per: str = "weight",
        adapt: str = ".*",
        **options,
    ):
        """Wraps a built network.

        Args:
            network, loss: see `Maml`.
            inner_lr: every α starts from it, as in learn2learn's program; None: as the next two say.
            alpha_low, alpha_high: α starts uniform between these, as in the paper.
            alpha_per: "weight": α has the shape of θ; "layer": a number for each layer.
            adapt: see `Maml`; by default every weight, norms included.
            options: see `Maml`. With `first_order` the gradients are held constant, and α still learns.
        """
        super().__init__(network, loss, inner_lr=inner_lr or 0.0, adapt=adapt, **options)
        low, high = (alpha_low, alpha_high) if inner_lr is None else (inner_lr, inner_lr)
        names = weight_names(network)
        chosen = [i for i, adapt in enumerate(self._adapted) if adapt]
        homes = [names[i].rpartition("/")[0] if alpha_per == "layer" else names[i] for i in chosen]
        made: dict[str, keras.Variable] = {}
        for i, home in zip(chosen, homes, strict=True):
            like = network.trainable_variables[i]
            shape = () if alpha_per == "layer" else like.shape
            if home not in made:
                start = low if low == high else keras.initializers.RandomUniform(low, high)
                made[home] = extra_variable(f"alpha/{home}", shape, start, like.dtype)
        self.extra_variables = list(made.values())
        order = list(made)
        self._rate_of = [order.index(home) for home in homes]

    @classmethod
    def arguments(cls, settings: "Settings") -> dict[str, object]:
        """Those of `Maml`; α starts from its own flags, not from --update_lr."""
        return super().arguments(settings) | {"inner_lr": None}

    def begin(self, theta: Weights, x: tf.Tensor, y: tf.Tensor) -> _State:
        """See `Algorithm.begin`."""
        count = len(self.network.trainable_variables)
        return _State(list(theta[:count]), list(theta[count:]))

    def fast_weights(self, state: State) -> Weights:
        """See `Maml.fast_weights`."""
        return state.weights

    def with_fast_weights(self, state: State, weights: Weights) -> State:
        """See `Maml.with_fast_weights`."""
        return state._replace(weights=weights)

    def rates(self, state: State) -> Sequence[tf.Tensor]:
        """α of each adapted weight; the same in every step."""
        return [state.rates[i] for i in self._rate_of]

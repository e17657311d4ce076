"""MAML++ (Antoniou, Edwards & Storkey, "How to train your MAML", ICLR 2019): six changes to MAML.

MSL, a loss after every inner step; LSLR, learned step sizes per weight tensor and step; DA, first order in
the first epochs; BNRS and BNWB, batch norm with weights of its own in every step; CA, a cosine schedule of
the outer step size. As in the authors' program the loss is a mean over examples, and batch norm always takes
the statistics of the batch at hand. Their program also collects running statistics per step, which it never
reads; they are not collected here.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import keras
import tensorflow as tf

from maml.episodes import Episode
from maml.learners.base import Measures, State, TaskGradient
from maml.learners.extra import extra_variable
from maml.learners.losses import LossFunction, mean_cross_entropy, mean_squared_error
from maml.learners.maml import Maml, joined
from maml.networks.stateless import Weights, gradients, weight_names
from maml.networks.step_batch_norm import StepBatchNorm, inner_step
from maml.settings.own import ADAPT, Flag
from maml.training.adam import TorchAdam

if TYPE_CHECKING:
    from maml.settings.settings import Settings


class _State(NamedTuple):
    """A task's fast weights θ′, the step sizes [steps + 1] each, the next step and the last step's row."""

    weights: Weights
    rates: Weights
    number: tf.Tensor
    row: tf.Tensor


@keras.saving.register_keras_serializable("maml")
class CosineByEpoch(keras.optimizers.schedules.LearningRateSchedule):
    """CA: from `first` to `last` on half a cosine over `epochs`, constant within an epoch; float64."""

    def __init__(self, first: float, last: float, epochs: int, iters_per_epoch: int):
        self.first, self.last, self.epochs, self.iters_per_epoch = first, last, epochs, iters_per_epoch

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """The rate of iteration `step`."""
        epoch = tf.cast(tf.cast(step, tf.int64) // self.iters_per_epoch, tf.float64)
        return self.last + (self.first - self.last) / 2 * (1 + tf.cos(math.pi * epoch / self.epochs))

    def get_config(self) -> dict[str, object]:
        """The arguments."""
        names = ("first", "last", "epochs", "iters_per_epoch")
        return {name: getattr(self, name) for name in names}


def loss_weights(steps: int, epochs: int, epoch: tf.Tensor | int) -> tf.Tensor:
    """MSL's weights [steps] of the losses after each inner step, float64; from `epochs` on only the last."""
    epoch = tf.cast(epoch, tf.float64)
    fall = epoch / (steps * max(epochs, 1))
    others = tf.maximum(1 / steps - fall, 0.03 / steps)
    last = tf.minimum(1 / steps + (steps - 1) * fall, 1 - (steps - 1) * 0.03 / steps)
    early = tf.concat([tf.fill([steps - 1], others), [last]], 0)
    return tf.where(epoch < epochs, early, tf.one_hot(steps - 1, steps, dtype=tf.float64))


class MamlPlusPlus(Maml):
    """MAML++. Every change is a switch of its own; without all of them it is MAML with a mean loss.

    Batch norm per step is the network's: `maml.networks.step_batch_norm.StepBatchNorm`.
    """

    flags = (
        ADAPT,
        Flag("inner_lr", 0.1, "α, of every step; with --lslr where it starts", lower=0),
        Flag("msl", True, "MSL: the loss is a weighted sum over the inner steps in the first epochs"),
        Flag("msl_epochs", 10, "epochs of MSL", lower=0, paper={"miniimagenet": 15}),
        Flag("lslr", True, "LSLR: learn a step size α for every weight tensor and inner step"),
        Flag("da", True, "DA: first order up to epoch --da_epoch, second order after it"),
        Flag("da_epoch", 50, "the last epoch of first order", lower=-1),
        Flag("per_step_norm", True, "BNRS and BNWB: γ and β of batch norm for every inner step"),
        Flag("learnable_bn_gamma", True, "learn γ of batch norm"),
        Flag("learnable_bn_beta", True, "learn β of batch norm"),
        Flag("ca", True, "CA: --meta_lr falls to --min_lr on a cosine over the epochs"),
        Flag("min_lr", 1e-5, "the outer step size at the end", lower=0, paper={"miniimagenet": 1e-3}),
        Flag("total_epochs", 100, "epochs of the cosine", lower=1),
        Flag("iters_per_epoch", 500, "iterations that are called an epoch", lower=1),
    )

    def __init__(
        self,
        network: keras.Model,
        loss: LossFunction,
        *,
        inner_lr: float = 0.1,
        msl: bool = True,
        msl_epochs: int = 10,
        lslr: bool = True,
        da: bool = True,
        da_epoch: int = 50,
        iters_per_epoch: int = 500,
        **options,
    ):
        """Wraps a built network.

        Args:
            network: see `Maml`; with `StepBatchNorm` for batch norm per step.
            loss: see `Maml`; the authors' is `mean_cross_entropy`.
            inner_lr: α or, with `lslr`, where the step sizes start.
            msl: train on the losses after all inner steps, see `loss_weights`, before epoch `msl_epochs`.
            msl_epochs: E.
            lslr: learn a step size for every adapted weight tensor and step. They are in `extra_variables`,
                [inner_steps + 1] each; the last entry is of no training step, as in the authors' program.
            da: first order up to and with epoch `da_epoch`; the step sizes are learned then too.
            da_epoch: see `da`.
            iters_per_epoch: iterations that are called an epoch.
            options: see `Maml`. With `first_order` there is no second order in any epoch.
        """
        super().__init__(network, loss, inner_lr=inner_lr, **options)
        self.msl, self.msl_epochs, self.lslr = msl and self.inner_steps > 1, msl_epochs, lslr
        self.da, self.da_epoch, self.iters_per_epoch = da, da_epoch, iters_per_epoch
        if lslr:
            names = [name for name, adapt in zip(weight_names(network), self._adapted, strict=True) if adapt]
            dtype = network.trainable_variables[0].dtype
            self.extra_variables = [
                extra_variable(f"alpha/{name}", (self.inner_steps + 1,), inner_lr, dtype) for name in names
            ]

    @classmethod
    def arguments(cls, settings: "Settings") -> dict[str, object]:
        """Its own flags, but those of the network and of the outer optimizer."""
        elsewhere = (
            "per_step_norm",
            "learnable_bn_gamma",
            "learnable_bn_beta",
            "ca",
            "min_lr",
            "total_epochs",
        )
        found = super().arguments(settings)
        return {"inner_lr": 0.1} | {name: v for name, v in found.items() if name not in elsewhere}

    @classmethod
    def loss_function(cls, settings: "Settings") -> LossFunction:
        """The mean over the examples."""
        return mean_cross_entropy if settings.classification else mean_squared_error

    @classmethod
    def network_options(cls, settings: "Settings") -> dict[str, object]:
        """The authors' network: leaky ReLU, max-pooling and a flattened map on both data sets."""
        own = cls.own_flags(settings)
        options: dict[str, object] = {"negative_slope": 0.01, "max_pool": True, "flatten": True}
        if settings.norm == "batch_norm":
            options["norm"] = functools.partial(
                StepBatchNorm,
                steps=settings.num_updates if own["per_step_norm"] else None,
                learn_gamma=own["learnable_bn_gamma"],
                learn_beta=own["learnable_bn_beta"],
            )
        return options

    @classmethod
    def meta_optimizer(cls, settings: "Settings") -> TorchAdam:
        """PyTorch's Adam, with CA."""
        own = cls.own_flags(settings)
        last = own["min_lr"] if own["ca"] else settings.meta_lr
        return TorchAdam(CosineByEpoch(settings.meta_lr, last, own["total_epochs"], own["iters_per_epoch"]))

    def epoch(self) -> tf.Tensor:
        """The epoch of the present iteration, from 0 on, int64."""
        return tf.convert_to_tensor(self.iteration) // self.iters_per_epoch

    def clipped(self, gradient: Weights) -> Weights:
        """See `Algorithm.clipped`; the step sizes' gradients are not clipped."""
        count = len(self.network.trainable_variables)
        # In the graph at hand, as the optimizer needs all or none of them.
        gradient = [tf.identity(g) for g in gradient]
        return [*super().clipped(gradient[:count]), *gradient[count:]]

    def begin(self, theta: Weights, x: tf.Tensor, y: tf.Tensor) -> _State:
        """See `Algorithm.begin`."""
        count = len(self.network.trainable_variables)
        return _State(list(theta[:count]), list(theta[count:]), tf.constant(0), tf.constant(0))

    def fast_weights(self, state: State) -> Weights:
        """See `Maml.fast_weights`."""
        return state.weights

    def with_fast_weights(self, state: State, weights: Weights) -> State:
        """See `Maml.with_fast_weights`."""
        return state._replace(weights=weights)

    def rates(self, state: State) -> Sequence[float | tf.Tensor]:
        """α of each adapted weight for the next step; steps beyond the last that has one take the last's."""
        if not self.lslr:
            return super().rates(state)
        return [rate[tf.minimum(state.number, self.inner_steps)] for rate in state.rates]

    def step(
        self, state: State, x: tf.Tensor, y: tf.Tensor, noise: int | None = None
    ) -> tuple[State, Measures]:
        """See `Maml.step`. Batch norm takes the row of this step, here and in `outputs` after it."""
        state = state._replace(row=tf.minimum(state.number, self.inner_steps - 1))
        state, measures = super().step(state, x, y, noise)
        return state._replace(number=state.number + 1), measures

    def outputs(
        self, state: State, x: tf.Tensor, support_x: tf.Tensor | None = None, noise: int | None = None
    ) -> tf.Tensor:
        """See `Algorithm.outputs`."""
        with inner_step(state.row):
            return super().outputs(state, x, support_x, noise)

    def task_loss(self, theta: Weights, episode: Episode) -> tuple[tf.Tensor, Measures]:
        """The loss that the present epoch trains on."""
        if not self.msl:
            return self._loss(theta, episode, every_step=False)
        return tf.cond(
            self.epoch() < self.msl_epochs,
            lambda: self._loss(theta, episode, every_step=True),
            lambda: self._loss(theta, episode, every_step=False),
        )

    def task_gradient(self, theta: Weights, episode: Episode) -> TaskGradient:
        """The gradient of `task_loss`, of the order of the present epoch."""

        # The choices are made outside of the gradients, so that what is not chosen is not computed.
        def gradient(first_order: bool, every_step: bool) -> tuple[Weights, Measures]:
            with self._of_order(first_order), tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(theta)
                loss, measures = self._loss(theta, episode, every_step)
            return gradients(tape, loss, theta), measures

        def of_order(first_order: bool) -> tuple[Weights, Measures]:
            if not self.msl:
                return gradient(first_order, False)
            return tf.cond(
                self.epoch() < self.msl_epochs,
                lambda: gradient(first_order, True),
                lambda: gradient(first_order, False),
            )

        if self.first_order or not self.da:
            return TaskGradient(*of_order(self.first_order))
        second = self.epoch() > self.da_epoch
        return TaskGradient(*tf.cond(second, lambda: of_order(False), lambda: of_order(True)))

    @contextlib.contextmanager
    def _of_order(self, first_order: bool) -> Iterator[None]:
        """Within it what is traced is of first order, or of second."""
        before, self.first_order = self.first_order, first_order
        try:
            yield
        finally:
            self.first_order = before

    def _loss(self, theta: Weights, episode: Episode, every_step: bool) -> tuple[tf.Tensor, Measures]:
        """MSL's weighted sum of the query losses after every step, or the loss after the last."""
        state, history, queries = self.begin_task(theta, episode), [], []
        for number in range(self.inner_steps):
            state, measures = self.step(state, episode.support_x, episode.support_y, noise=number)
            history.append(measures)
            if every_step or number == self.inner_steps - 1:
                outputs = self.outputs(state, episode.query_x, noise=self.inner_steps)
                queries.append(self.measure(outputs, episode.query_y))
        loss = queries[-1]["loss"]
        if every_step:
            weights = tf.cast(loss_weights(self.inner_steps, self.msl_epochs, self.epoch()), self.dtype)
            loss = tf.reduce_sum(weights * tf.stack([query["loss"] for query in queries]))
        return loss, joined(history, queries[-1])

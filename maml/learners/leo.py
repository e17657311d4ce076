"""LEO (Rusu et al., "Meta-Learning with Latent Embedding Optimization", ICLR 2019), on embeddings.

A class's linear weights are decoded from a low-dimensional code, which an encoder and a relation network make
of the support set. The inner loop descends on the codes, then on the decoded weights. As in the authors'
program there are K codes and weight vectors per class, whose logits are averaged, KL is estimated by one
sample, and penalties are means. Examples may be in any order, but every class of an episode has as many.
"""

import math
import zlib
from typing import TYPE_CHECKING, NamedTuple

import keras
import tensorflow as tf

from maml.counting import counted, mixed
from maml.episodes import Episode
from maml.errors import UserError
from maml.learners.base import Algorithm, Measures
from maml.learners.extra import extra_variable
from maml.learners.losses import LossFunction, mean_cross_entropy
from maml.learners.maml import joined
from maml.networks.stateless import Weights, gradients
from maml.settings.own import Flag

if TYPE_CHECKING:
    from maml.settings.settings import Settings

KERNELS = ("encoder", "relation1", "relation2", "relation3", "decoder")
MIN_DEVIATION = 1e-10


class _Theta(NamedTuple):
    """The meta-parameters by name: the kernels [in, out], the step sizes of codes [L] and weights [D]."""

    encoder: tf.Tensor
    relation1: tf.Tensor
    relation2: tf.Tensor
    relation3: tf.Tensor
    decoder: tf.Tensor
    inner_lr: tf.Tensor
    finetuning_lr: tf.Tensor


class _State(NamedTuple):
    """A task.

    Fields:
        theta: the meta-parameters.
        seed: of its noise.
        first, codes: [N, K, L], the codes before the first step, and now.
        weights: [N, K, D], decoded and fine-tuned.
        kl: the estimate of KL(q(z) ‖ p(z)); 0 in evaluation.
        number: of the next step.
    """

    theta: _Theta
    seed: tf.Tensor
    first: tf.Tensor
    codes: tf.Tensor
    weights: tf.Tensor
    kl: tf.Tensor
    number: tf.Tensor


class Leo(Algorithm):
    """LEO. θ is the kernels of `maml.networks.leo.leo`, and learned step sizes of codes and of weights."""

    flags = (
        Flag("num_latents", 64, "L, the size of a class's code", lower=1),
        Flag("inner_unroll_length", 5, "steps on the codes", lower=1),
        Flag("finetuning_unroll_length", 5, "steps on the decoded weights thereafter", lower=0),
        Flag("inner_lr_init", 1.0, "where the learned step sizes α of the codes start"),
        Flag("finetuning_lr_init", 0.001, "where the learned step sizes of the weights start"),
        Flag("dropout_rate", 0.307651, "dropout on the embeddings in training", lower=0),
        Flag("kl_weight", 0.756143, "β, weight of KL(q(z) ‖ p(z))", lower=0),
        Flag("encoder_penalty_weight", 5.756821e-6, "γ, weight of the encoder penalty", lower=0),
        Flag("l2_penalty_weight", 3.623413e-10, "λ1, weight of ½ Σ kernel²", lower=0),
        Flag("orthogonality_penalty_weight", 0.188103, "λ2, weight of the decoder's correlations", lower=0),
        Flag("gradient_threshold", 0.1, "clip every entry of the meta-gradient; 0: not", lower=0),
        Flag("gradient_norm_threshold", 0.1, "then clip the norm for each variable; 0: not", lower=0),
        Flag(
            "nan_penalty",
            1e-4,
            "factor of the kernels as gradient where a loss or gradient is not finite; 0: as --on_nan says",
            lower=0,
        ),
    )

    def __init__(
        self,
        network: keras.Model,
        loss: LossFunction = mean_cross_entropy,
        *,
        way: int,
        inner_unroll_length: int = 5,
        finetuning_unroll_length: int = 5,
        inner_lr_init: float = 1.0,
        finetuning_lr_init: float = 0.001,
        dropout_rate: float = 0.307651,
        kl_weight: float = 0.756143,
        encoder_penalty_weight: float = 5.756821e-6,
        l2_penalty_weight: float = 3.623413e-10,
        orthogonality_penalty_weight: float = 0.188103,
        gradient_threshold: float = 0.1,
        gradient_norm_threshold: float = 0.1,
        nan_penalty: float = 1e-4,
        **common,
    ):
        """Wraps the networks of `leo`. The defaults are the authors' for mini-ImageNet, 5-way 1-shot.

        Args:
            network: see `maml.networks.leo.leo`.
            loss: on the query set; the authors' is `mean_cross_entropy`.
            way: N.
            inner_unroll_length: steps on the codes.
            finetuning_unroll_length: steps on the decoded weights. The sum of both is `inner_steps`.
            inner_lr_init, finetuning_lr_init: where the learned step sizes start.
            dropout_rate: on the embeddings, in training.
            kl_weight, encoder_penalty_weight, l2_penalty_weight, orthogonality_penalty_weight: β, γ, λ1, λ2.
            gradient_threshold: bound on every entry of the meta-gradient; 0: none.
            gradient_norm_threshold: bound on the norm in each variable, thereafter; 0: none.
            nan_penalty: where a loss or the meta-gradient is not finite the meta-gradient is this times the
                kernels, and 0 in the step sizes, as in the authors' program; 0: no such rule.
            common: see `Algorithm`.

        Raises:
            UserError: if the tasks are no classification.
        """
        if not common.setdefault("classification", True):
            raise UserError("expected tasks of classes, got a regression. Use a learner as maml or reptile.")
        common["inner_steps"] = inner_unroll_length + finetuning_unroll_length
        super().__init__(network, loss, **common)
        if len(network.trainable_variables) != len(KERNELS):
            raise UserError(
                f"leo: expected the networks of maml.networks.leo.leo, got {network.name!r} with "
                f"{len(network.trainable_variables)} weights instead of {len(KERNELS)}."
            )
        self.way, self.unroll = way, inner_unroll_length
        self.dropout_rate, self.kl_weight = dropout_rate, kl_weight
        self.encoder_penalty_weight, self.l2_penalty_weight = encoder_penalty_weight, l2_penalty_weight
        self.orthogonality_penalty_weight = orthogonality_penalty_weight
        self.nan_penalty = nan_penalty
        self.thresholds = gradient_threshold, gradient_norm_threshold
        dim, latents = network.trainable_variables[0].shape
        dtype = network.trainable_variables[0].dtype
        self.extra_variables = [
            extra_variable("inner_lr", (latents,), inner_lr_init, dtype),
            extra_variable("finetuning_lr", (dim,), finetuning_lr_init, dtype),
        ]

    @classmethod
    def arguments(cls, settings: "Settings") -> dict[str, object]:
        """N and its own flags, but that of the network."""
        own = {name: value for name, value in super().arguments(settings).items() if name != "num_latents"}
        return own | {"way": settings.num_classes, "clip": None}

    def instead_of_not_finite(self, theta: Weights) -> Weights | None:
        """See `nan_penalty`: a pull toward where the loss is finite."""
        if not self.nan_penalty:
            return None
        kernels = len(KERNELS)
        rates = [tf.zeros_like(rate) for rate in theta[kernels:]]
        return [self.nan_penalty * kernel for kernel in theta[:kernels]] + rates

    @classmethod
    def loss_function(cls, settings: "Settings") -> LossFunction:
        """The mean over the examples."""
        return mean_cross_entropy

    @classmethod
    def network_options(cls, settings: "Settings") -> dict[str, object]:
        """L."""
        return {"latents": settings.own.get("num_latents", 64)}

    # --- Noise, which is off where there is none ------------------------------------------------------

    def seed_of(self, x: tf.Tensor) -> tf.Tensor:
        """A task's seed, uint64, from its embeddings [n, D]: every task has noise of its own."""
        # Integers, whose sum is the same in whatever order it is taken.
        x = tf.cast(x, tf.float32)
        parts = x / tf.maximum(tf.reduce_max(tf.abs(x)), 1e-30) * 2.0**24
        task = tf.cast(tf.reduce_sum(tf.cast(parts, tf.int64)), tf.uint64)
        return mixed(tf.bitwise.bitwise_xor(mixed(tf.cast(self.iteration, tf.uint64)), task))

    def uniform(self, seed: tf.Tensor, name: str, shape: tuple[int, ...]) -> tf.Tensor:
        """Uniform float64 numbers in (0, 1) of the shape [N, K, …], others for every name."""
        key = mixed(tf.bitwise.bitwise_xor(seed, tf.constant(zlib.crc32(name.encode()), tf.uint64)))
        bits = tf.bitwise.right_shift(counted(key, math.prod(shape)), tf.constant(12, tf.uint64))
        return tf.reshape((tf.cast(bits, tf.float64) + 0.5) * 2.0**-52, shape)

    def normal(self, seed: tf.Tensor, name: str, shape: tuple[int, ...]) -> tf.Tensor:
        """Standard normal noise of the shape [N, K, …], another for every name."""
        return tf.cast(tf.math.ndtri(self.uniform(seed, name, shape)), self.dtype)

    def keep(self, seed: tf.Tensor, name: str, shape: tuple[int, ...]) -> tf.Tensor:
        """1 where dropout keeps an entry, else 0, of the shape [n, D]."""
        return tf.cast(self.uniform(seed, name, shape) >= self.dropout_rate, self.dtype)

    def _dropped(self, x: tf.Tensor, seed: tf.Tensor, name: str | None) -> tf.Tensor:
        """x [n, D] after dropout of that name; None: as it is."""
        if name is None or not self.dropout_rate:
            return x
        return x * self.keep(seed, name, x.shape) / (1 - self.dropout_rate)

    def _sampled(
        self, parameters: tf.Tensor, offset: float, seed: tf.Tensor, name: str | None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """A sample of N(μ, σ²), and KL of that from N(0, 1), estimated by it; without a name μ and 0.

        Args:
            parameters: [N, K, 2 width]: μ, and u of σ = max(eᵘ − 1 + offset, 1e-10).
            offset: see there.
            seed, name: of the noise.
        """
        mean, u = tf.split(parameters, 2, axis=-1)
        if name is None:
            return mean, tf.zeros((), self.dtype)
        deviation = tf.maximum(tf.exp(u) - (1 - offset), MIN_DEVIATION)
        noise = self.normal(seed, name, mean.shape)
        sample = mean + deviation * noise
        # log q(z) of the noise itself: (z − μ)/σ loses all digits where σ is at its bound.
        log_q_minus_p = -tf.math.log(deviation) + (tf.square(sample) - tf.square(noise)) / 2
        return sample, tf.reduce_mean(log_q_minus_p)

    # --- The three verbs ----------------------------------------------------------------------------

    def begin(self, theta: Weights, x: tf.Tensor, y: tf.Tensor) -> _State:
        """See `Algorithm.begin`; x [N·K, D]."""
        return self._begin(theta, *self._by_class(x, y), training=False)

    def _by_class(self, x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        order = tf.argsort(y, stable=True)
        return tf.gather(x, order), tf.gather(y, order)

    def _begin(self, theta: Weights, x: tf.Tensor, y: tf.Tensor, *, training: bool) -> _State:
        """The state before the first step, of examples in the order of the classes."""
        theta, seed = _Theta(*theta), self.seed_of(x)
        parameters = self.code_parameters(theta, self._dropped(x, seed, "encoder" if training else None))
        codes, kl = self._sampled(parameters, 0.0, seed, "latent" if training else None)
        weights = self._decoded(theta, codes, seed, "decoder0" if training else None)
        return _State(theta, seed, codes, codes, weights, kl, tf.constant(0))

    def code_parameters(self, theta: _Theta, x: tf.Tensor) -> tf.Tensor:
        """μ and u of every class's code [N, K, 2L], from its examples x [N·K, D] in order of the classes."""
        h = x @ theta.encoder
        count, width = x.shape[0], h.shape[-1]
        left = tf.broadcast_to(h[:, tf.newaxis], (count, count, width))
        right = tf.broadcast_to(h[tf.newaxis], (count, count, width))
        pairs = tf.reshape(tf.concat([left, right], -1), (count * count, 2 * width))
        related = tf.nn.relu(tf.nn.relu(pairs @ theta.relation1) @ theta.relation2) @ theta.relation3
        of_example = tf.reduce_mean(tf.reshape(related, (count, count, -1)), axis=1)
        by_class = tf.reshape(of_example, (self.way, count // self.way, -1))
        return tf.broadcast_to(tf.reduce_mean(by_class, axis=1, keepdims=True), by_class.shape)

    def _decoded(self, theta: _Theta, codes: tf.Tensor, seed: tf.Tensor, name: str | None) -> tf.Tensor:
        """Weights [N, K, D] of codes [N, K, L]."""
        flat = tf.reshape(codes, (-1, codes.shape[-1])) @ theta.decoder
        parameters = tf.reshape(flat, (*codes.shape[:2], -1))
        dim = parameters.shape[-1] // 2
        return self._sampled(parameters, (2 / (self.way + dim)) ** 0.5, seed, name)[0]

    def step(
        self, state: _State, x: tf.Tensor, y: tf.Tensor, noise: int | None = None
    ) -> tuple[_State, Measures]:
        """One step on the codes and, after `inner_unroll_length` of these, on the weights."""
        x, y = self._by_class(x, y)
        if noise is not None:
            step = self._code_step if noise < self.unroll else self._weight_step
            return step(state, x, y, noise)
        return tf.cond(
            state.number < self.unroll,
            lambda: self._code_step(state, x, y, None),
            lambda: self._weight_step(state, x, y, None),
        )

    def _code_step(
        self, state: _State, x: tf.Tensor, y: tf.Tensor, noise: int | None
    ) -> tuple[_State, Measures]:
        """z ← z − α ∘ ∂L/∂z, through the decoder and the sampled weights."""
        names = [None, None] if noise is None else [f"decoder{noise}", f"decoder{noise + 1}"]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(state.codes)
            weights = self._decoded(state.theta, state.codes, state.seed, names[0])
            total, measures = self._support_loss(weights, state, x, y, noise)
        (gradient,) = gradients(tape, total, [state.codes])
        codes = state.codes - state.theta.inner_lr * gradient
        weights = self._decoded(state.theta, codes, state.seed, names[1])
        return state._replace(codes=codes, weights=weights, number=state.number + 1), measures

    def _weight_step(
        self, state: _State, x: tf.Tensor, y: tf.Tensor, noise: int | None
    ) -> tuple[_State, Measures]:
        """w ← w − α ∘ ∂L/∂w."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(state.weights)
            total, measures = self._support_loss(state.weights, state, x, y, noise)
        (gradient,) = gradients(tape, total, [state.weights])
        weights = state.weights - state.theta.finetuning_lr * gradient
        return state._replace(weights=weights, number=state.number + 1), measures

    def _support_loss(
        self, weights: tf.Tensor, state: _State, x: tf.Tensor, y: tf.Tensor, noise: int | None
    ) -> tuple[tf.Tensor, Measures]:
        """The cross entropy summed over the support set, which the inner loop descends on; the measures."""
        name = None if noise is None else f"support{noise}"
        logits = _logits(self._dropped(x, state.seed, name), weights)
        total = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
        return total, self.measure(logits, y)

    def outputs(
        self, state: _State, x: tf.Tensor, support_x: tf.Tensor | None = None, noise: int | None = None
    ) -> tf.Tensor:
        """Logits [n, N] of embeddings x [n, D]. There is no batch norm, so `support_x` is not read."""
        return _logits(self._dropped(x, state.seed, None if noise is None else "query"), state.weights)

    # --- Training -------------------------------------------------------------------------------------

    def task_loss(self, theta: Weights, episode: Episode) -> tuple[tf.Tensor, Measures]:
        """The query loss + β KL + γ encoder penalty + the penalties of the kernels."""
        support, history = (episode.support_x, episode.support_y), []
        state = self._begin(theta, *self._by_class(*support), training=True)
        for number in range(self.inner_steps):
            state, measures = self.step(state, *support, noise=number)
            history.append(measures)
        query = self.measure(self.outputs(state, episode.query_x, noise=self.inner_steps), episode.query_y)
        loss = query["loss"] + self.kl_weight * state.kl
        loss += self.encoder_penalty_weight * self.encoder_penalty(state)
        return loss + sum(self.kernel_penalties(_Theta(*theta))), joined(history, query)

    def encoder_penalty(self, state: _State) -> tf.Tensor:
        """The mean square of how far the inner loop went from the first codes, which alone are penalized."""
        return tf.reduce_mean(tf.square(tf.stop_gradient(state.codes) - state.first))

    def kernel_penalties(self, theta: _Theta) -> tuple[tf.Tensor, tf.Tensor]:
        """λ1 ½ Σ kernel², and λ2 times the mean square of the decoder's correlations without their ones."""
        squares = tf.add_n([tf.reduce_sum(tf.square(kernel)) for kernel in theta[: len(KERNELS)]])
        rows = tf.math.l2_normalize(theta.decoder, axis=1, epsilon=0.0)
        correlations = tf.matmul(rows, rows, transpose_b=True)
        ones = tf.eye(correlations.shape[0], dtype=self.dtype)
        correlated = tf.reduce_mean(tf.square(correlations - ones))
        return self.l2_penalty_weight / 2 * squares, self.orthogonality_penalty_weight * correlated

    def clipped(self, gradient: Weights) -> Weights:
        """The gradient with bounded entries, then with a bounded norm in each variable."""
        value, norm = self.thresholds
        if value:
            gradient = [tf.clip_by_value(g, -value, value) for g in gradient]
        return [tf.clip_by_norm(g, norm) for g in gradient] if norm else gradient


def _logits(x: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """[n, N] of x [n, D] and weights [N, K, D], the mean over a class's K weight vectors."""
    return tf.matmul(x, tf.reduce_mean(weights, axis=1), transpose_b=True)

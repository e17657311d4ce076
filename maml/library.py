"""MAML of a Keras model of one's own: wrap it, train it on episodes, adapt it to a task.

    learner = Learner(model, "mse", inner_lr=0.01, inner_steps=5)
    learner.fit(episodes, iterations=10_000)
    adapted = learner.adapt(support_x, support_y)
    adapted.predict(x)
    adapted.save("adapted.keras")

The inner and the outer loop are those of the program: `learner.maml` is a `maml.learner.Maml`.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from maml.episodes import Episode, EpisodeSource, EpisodeSpec, stream_blocks
from maml.errors import Failure, UserError
from maml.keras_models import fitting_episode, refuse_unfit, scalar_loss, takes_labels, with_exact_norms
from maml.learner import LossFunction, Maml, Weights

if TYPE_CHECKING:
    from maml.evaluate import TestResult

Loss = str | keras.losses.Loss | LossFunction
Episodes = EpisodeSource | Iterable[Sequence]  # of (support_x, support_y, query_x, query_y)

BLOCK = 100  # iterations per call where tasks are batched, as in `maml.train`
# Layers that are tested under `tf.vectorized_map` and XLA.
BATCHED = ("InputLayer", "Dense", "Flatten", "Activation", "ReLU", "Rescaling", "Dropout", "Embedding")
BATCHED += ("GlobalAveragePooling1D", "BatchNorm", "LayerNorm", "LayerNormalization")


class Learner:
    """A Keras model and how it is meta-learned; the model's weights are the initialisation θ."""

    def __init__(
        self,
        model: keras.Model,
        loss: Loss,
        *,
        inner_lr: float,
        inner_steps: int = 1,
        first_order: bool = False,
        classification: bool | None = None,
        meta_lr: float = 1e-3,
        clip: float | None = None,
        swap_norms: bool = False,
        vectorize: bool | None = None,
        jit_compile: bool | None = None,
        tasks_per_chunk: int | None = None,
    ):
        """Wraps a built model: Sequential, functional, or of a class that has `get_config` and
        whose `call` takes `training`.

        Training changes the weights of the model itself or, with `swap_norms`, of `learner.model`. All
        trainable weights are meta-learned, and all adapted, but those of layers with an attribute
        `adapted = False`: maml's BatchNorm and LayerNorm, and any you set it on. Dropout and other noise
        is on in `fit`, with other noise for every iteration, inner step and query set, the same for the
        tasks of an iteration; it is off in `adapt` and `evaluate`, which are deterministic.

        Args:
            model: of one input and one output; integer inputs (for Embedding) are never scaled or cast.
            loss: a Keras loss or its name, or a function of (targets, outputs); a mean is taken of what
                it returns. Keras' are means over the examples, the paper's code's is
                `maml.cross_entropy(K)`, whose gradients are N times as long.
            inner_lr: α, the step size of the inner loop.
            inner_steps: inner gradient steps in training.
            first_order: leave out second derivatives.
            classification: targets are integer labels, and accuracy is measured too. None: if the loss is
                a sparse categorical cross entropy.
            meta_lr: β, the step size of the outer loop's Adam.
            clip: clip every entry of the meta-gradient to ±clip.
            swap_norms: work on a copy in which Keras' LayerNormalization is `maml.LayerNormalization`,
                which computes the same, and BatchNormalization is `maml.BatchNorm`, which does not: no
                scale, and always the statistics of the batch at hand.
            vectorize, jit_compile, tasks_per_chunk: see `Maml`; None chooses what is safe.

        Raises:
            UserError: for a layer that would be silently wrong, a model that is not built, or a loss that
                does not go with it; says what to use instead.
        """
        if keras.backend.backend() != "tensorflow":
            raise UserError(
                f"Keras computes with {keras.backend.backend()}, needed tensorflow. Set the environment "
                f"variable KERAS_BACKEND=tensorflow before the first import of Keras."
            )
        self.model = with_exact_norms(model) if swap_norms else model
        refuse_unfit(self.model, first_order)
        if vectorize is None and not _all_batched(self.model):
            vectorize = False
        self.maml = Maml(
            self.model,
            scalar_loss(loss, self.model),
            inner_lr=inner_lr,
            inner_steps=inner_steps,
            first_order=first_order,
            classification=takes_labels(loss) if classification is None else classification,
            meta_lr=meta_lr,
            clip=clip,
            vectorize=vectorize,
            jit_compile=jit_compile,
            tasks_per_chunk=tasks_per_chunk,
        )
        self.iteration = 0
        self._adapt = tf.function(self._adapted, reduce_retracing=True)

    def fit(
        self,
        episodes: Episodes,
        *,
        iterations: int,
        meta_batch: int = 4,
        spec: EpisodeSpec | None = None,
        split: str = "train",
        progress: bool | None = None,
    ) -> dict[str, np.ndarray]:
        """Meta-trains; a second call goes on from the first, optimizer included.

        Args:
            episodes: what to learn from: anything that gives (support_x, support_y, query_x, query_y),
                each [n, …], of the same shapes in all episodes: a list or a `tf.data.Dataset`, which is
                begun again where it ends, or a generator, which must not end too soon. Or a data source
                with `check` and `sample` such as those of `maml.datasets`, which needs a spec.
            iterations: updates of the weights.
            meta_batch: episodes per update.
            spec: ways, shots, queries and seed, for a data source.
            split: of a data source.
            progress: show a bar; None: on a terminal.

        Returns:
            "query_loss" after adaptation [iterations], "support_loss" [iterations, inner_steps] before
            each inner step, "query_accuracy" and "support_accuracy" likewise, "gradient_norm".

        Raises:
            UserError: if the episodes do not fit the model.
            Failure: if a loss or the meta-gradient is not finite; that update was not made.
        """
        parts: list[dict[str, np.ndarray]] = []
        hidden = None if progress is None else not progress
        with tqdm(total=iterations, desc="meta-training", unit="it", leave=False, disable=hidden) as bar:
            for block, first, last in self._blocks(episodes, spec, split, meta_batch, iterations):
                measures = self.maml.metatrain_block(block, tf.constant(first), tf.constant(last))
                measures = {name: values.numpy()[first:last] for name, values in measures.items()}
                if (skipped := measures.pop("skipped") > 0).any():
                    self.iteration += int(skipped.argmax())
                    raise Failure(
                        f"iteration {self.iteration}: a loss or the meta-gradient is not finite, so that the "
                        f"update was not made. A smaller inner_lr or meta_lr, or clip=10, may help."
                    )
                self.iteration += last - first
                parts.append(measures)
                bar.update(last - first)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def evaluate(
        self,
        episodes: Episodes,
        *,
        tasks: int,
        steps: int | None = None,
        spec: EpisodeSpec | None = None,
        split: str = "test",
        transductive: bool = True,
    ) -> "TestResult":
        """Adapts to the first `tasks` episodes, and measures after 0…`steps` inner steps.

        Args:
            episodes, spec, split: as in `fit`; a list is gone through once.
            tasks: episodes.
            steps: inner steps; None: as many as in training.
            transductive: batch norm of the query set by its own statistics; False: by the support set's,
                as an adapted model has it.

        Returns:
            `.query` and `.support`: {"loss" | "accuracy": [tasks, steps + 1]}.
        """
        from maml.evaluate import measure_tasks  # brings flags along, which may be other than yours

        source = episodes if _is_source(episodes) else _Once(self, episodes)
        _need_spec(source, spec)
        steps = self.maml.inner_steps if steps is None else steps
        return measure_tasks(
            self.maml, source, spec, split, tasks=tasks, steps=steps, transductive=transductive
        )

    def adapt(
        self, support_x: np.ndarray | tf.Tensor, support_y: np.ndarray | tf.Tensor, steps: int | None = None
    ) -> keras.Model:
        """A copy of the model, adapted to a support set; deterministic.

        The copy is a Keras model of its own: it predicts, and can be saved as `.keras`, which Keras loads
        once something has been imported from maml, so that it knows maml's layers. Its BatchNorm layers
        normalise by the statistics of the support set under the adapted weights, so that a prediction does
        not depend on the other inputs: what `evaluate(transductive=False)` measures.

        Args:
            support_x: inputs [n, …].
            support_y: targets [n, …] or integer labels [n].
            steps: inner steps; None: as many as in training; 0 takes the statistics only.

        Raises:
            UserError: if they do not fit the model.
            Failure: if the adapted weights are not finite.
        """
        steps = self.maml.inner_steps if steps is None else steps
        if steps < 0:
            raise UserError(f"adapt: found steps={steps}, needed 0 or more.")
        episode = fitting_episode(self.maml, (support_x, support_y, support_x, support_y))
        weights, state = self._adapt(*map(tf.convert_to_tensor, episode[:2]), tf.constant(steps))
        if not all(np.isfinite(values).all() for values in weights):
            raise Failure(
                f"the weights are not finite after {steps} steps of α = {self.maml.inner_lr:g}. Take fewer "
                f"steps or a smaller inner_lr."
            )
        values = {id(v): value for v, value in zip(self.model.trainable_variables, weights, strict=True)}
        others = self.model.non_trainable_variables
        values |= {id(v): value for v, value in zip(others, state, strict=True)}
        adapted = keras.models.clone_model(self.model)
        if len(adapted.variables) < len(self.model.variables):  # a class of one's own, not built yet
            adapted(episode.support_x[:1])
        for variable, own in zip(adapted.variables, self.model.variables, strict=True):
            variable.assign(values[id(own)])
        return adapted

    def _adapted(self, x: tf.Tensor, y: tf.Tensor, steps: tf.Tensor) -> tuple[Weights, Weights]:
        """The weights after some inner steps on a support set, and the non-trainable values with them."""
        x, y, *_ = self.maml.to_floating(Episode(x, y, x, y))
        _, weights = tf.while_loop(
            lambda step, _: step < steps,
            lambda step, weights: (step + 1, self.maml.inner_step(weights, x, y)[0]),
            (0, self.maml.weights()),
        )
        return weights, self.maml.state_after(weights, x)

    # --- Episodes ---------------------------------------------------------------------------------

    def _blocks(
        self, episodes: Episodes, spec: EpisodeSpec | None, split: str, meta_batch: int, iterations: int
    ) -> Iterator[tuple[Episode, int, int]]:
        """Blocks of meta-batches, and which of them are the next: of all, `iterations`."""
        length = BLOCK if self.maml.tasks.vectorize else 1
        if _is_source(episodes):
            _need_spec(episodes, spec)
            begin, end = self.iteration, self.iteration + iterations
            blocks = stream_blocks(
                episodes, spec, split, meta_batch=meta_batch, block=length, start=begin // length
            )
            while begin < end:
                first = begin % length
                count = min(length - first, end - begin)
                yield next(blocks), first, first + count
                begin += count
            return
        stream = _again_and_again(episodes)
        for begin in range(0, iterations, length):
            count = min(length, iterations - begin)
            rows = self.stacked(stream, count * meta_batch)
            # One shape for all blocks, so that none is compiled anew.
            rows = [np.concatenate([x, x[:1].repeat((length - count) * meta_batch, 0)]) for x in rows]
            block = [tf.constant(x.reshape(length, meta_batch, *x.shape[1:])) for x in rows]
            yield Episode(*block), 0, count

    def stacked(self, stream: Iterator[Sequence], count: int) -> Episode:
        """The next `count` episodes of a stream, with a leading axis; raises UserError if that cannot be."""
        found = [fitting_episode(self.maml, item) for item in itertools.islice(stream, count)]
        if len(found) < count:
            raise UserError(
                f"the episodes end: found {len(found)} more, needed {count}. Give a list, which is gone "
                f"through again and again in training, or ask for fewer iterations or tasks."
            )
        shapes = {tuple(field.shape for field in episode) for episode in found}
        if len(shapes) > 1:
            raise UserError(
                f"found episodes of different shapes, {' and '.join(map(str, sorted(shapes)[:2]))}, needed "
                f"the same in all. Cut or repeat examples."
            )
        return Episode(*map(np.stack, zip(*found, strict=True)))


class _Once:
    """Any episodes as a data source of evaluation, which asks for them in order."""

    def __init__(self, learner: Learner, episodes: Iterable[Sequence]):
        self._learner, self._stream = learner, iter(episodes)

    def check(self, spec: EpisodeSpec | None, split: str) -> None:
        """Nothing can be known before they are drawn."""

    def sample(self, spec: EpisodeSpec | None, split: str, indices: tf.Tensor) -> Episode:
        """The next episodes, as many as there are indices."""
        return tf.nest.map_structure(tf.constant, self._learner.stacked(self._stream, len(indices)))


def _again_and_again(episodes: Iterable[Sequence]) -> Iterator[Sequence]:
    """A collection without end; an iterator to its end."""
    while True:
        count = 0
        for count, episode in enumerate(episodes, 1):  # noqa: B007
            yield episode
        if not count or iter(episodes) is episodes:
            return


def _is_source(episodes: Episodes) -> bool:
    return hasattr(episodes, "sample") and hasattr(episodes, "check")


def _need_spec(episodes: EpisodeSource, spec: EpisodeSpec | None) -> None:
    if spec is None and not isinstance(episodes, _Once):
        raise UserError(
            f"{type(episodes).__name__} draws episodes of any size, found no spec. "
            f"Give spec=EpisodeSpec(way, shot, query, seed)."
        )


def _all_batched(model: keras.Model) -> bool:
    layers = model._flatten_layers()
    return all(isinstance(layer, keras.Model) or type(layer).__name__ in BATCHED for layer in layers)

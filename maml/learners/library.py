"""MAML of a Keras model of one's own, by the inner and outer loop of the program."""

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from maml.episodes import Episode, EpisodeSpec
from maml.errors import Failure, UserError
from maml.learners.base import Algorithm
from maml.learners.losses import LossFunction, is_custom, scalar_loss, takes_labels
from maml.learners.options import (
    algorithm_class,
    check_above_zero,
    check_options,
    check_whole,
    chosen_optimizer,
)
from maml.networks.checks import copy_of, is_batched, refuse_unfit, with_exact_norms
from maml.networks.stateless import Weights
from maml.training import given
from maml.training.evaluate import TestResult, measure_tasks
from maml.training.given import Episodes, Needs
from maml.training.loop import METATRAIN, Phase, updates
from maml.training.outer_loop import OuterLoop
from maml.training.progress import COMPILING, Smoothed
from maml.training.task_map import TaskMap

Loss = str | keras.losses.Loss | LossFunction


class Learner:
    """Learns initial weights for a Keras model from which a few gradient steps solve a new task.

        model = keras.Sequential([keras.Input((1,)), Dense(40, "relu"), Dense(1)])
        learner = Learner(model, "mse", inner_lr=0.01, inner_steps=5)
        learner.fit(episodes, iterations=10_000)
        adapted = learner.adapt(support_x, support_y)
        adapted.predict(query_x)

    An episode is (support_x, support_y, query_x, query_y): what a task is adapted to, and what it is then
    judged by.

    Attributes:
        model: its weights are the meta-learned initialisation θ.
        algorithm: the `maml.learners.base.Algorithm` that computes.
        outer: the `OuterLoop` that updates it.
        iteration: updates made.
    """

    def __init__(
        self,
        model: keras.Model,
        loss: Loss,
        *,
        algorithm: str | type[Algorithm] = "maml",
        inner_lr: float | None = None,
        inner_steps: int = 1,
        first_order: bool | None = None,
        classification: bool | None = None,
        meta_lr: float | None = None,
        meta_optimizer: keras.optimizers.Optimizer | None = None,
        clip: float | None = None,
        swap_norms: bool = False,
        vectorize: bool | None = None,
        jit_compile: bool | None = None,
        tasks_per_chunk: int | None = None,
        **options,
    ):
        """Wraps a built model: Sequential, functional, or of a class with `get_config`.

        Training changes the weights of the model itself or, with `swap_norms`, of `learner.model`. All
        trainable weights are meta-learned, and all adapted, but those of layers with an attribute
        `adapted = False`: maml's BatchNorm and LayerNorm, and any you set it on. Dropout and other noise
        is on in `fit`, with other noise for every iteration, inner step and query set, the same for the
        tasks of an iteration; it is off in `adapt` and `evaluate`, which are deterministic.

        Args:
            model: of one input and one output. It is given pixels as they are: for those of 0…255 it begins
                with `keras.layers.Rescaling(1 / 255)`. Integer inputs (for Embedding) are never cast.
            loss: a Keras loss or its name, or a function of (targets, outputs); a mean is taken of what
                it returns. Keras' are means over the examples, the paper's code's is
                `maml.cross_entropy(K)`, whose gradients are N times as long.
            algorithm: a name of `maml.tables.LEARNERS`, "module:Class", or a subclass of
                `maml.learners.base.Algorithm`.
            inner_lr: α, the step size of the inner loop; needed by algorithms that have one.
            inner_steps: inner gradient steps in training.
            first_order: leave out second derivatives, where the algorithm has that choice.
            classification: targets are integer labels, and accuracy is measured too. None: if the loss is
                a sparse categorical cross entropy.
            meta_lr: β, the step size of the outer loop's Adam; by default 0.001.
            meta_optimizer: any Keras optimizer for the outer loop, its schedule included, instead of Adam.
            clip: clip every entry of the meta-gradient to ±clip.
            swap_norms: work on a copy in which Keras' LayerNormalization is `maml.LayerNormalization`,
                which computes the same, and BatchNormalization is `maml.BatchNorm`, which does not: no
                scale, and always the statistics of the batch at hand.
            vectorize, jit_compile, tasks_per_chunk: see `TaskMap`; None chooses what is safe.
            options: of the algorithm, keyword arguments of its class.

        Raises:
            UserError: for a layer that would be silently wrong, a model that is not built, or a loss that
                does not go with it; says what to use instead.
        """
        if keras.backend.backend() != "tensorflow":
            raise UserError(
                f"Keras computes with {keras.backend.backend()}, needed tensorflow. Set the environment "
                f"variable KERAS_BACKEND=tensorflow before the first import of Keras."
            )
        check_whole(1, inner_steps=inner_steps)
        if tasks_per_chunk is not None:
            check_whole(1, tasks_per_chunk=tasks_per_chunk)
        check_above_zero(inner_lr=inner_lr, meta_lr=meta_lr, clip=clip)
        kind = algorithm_class(algorithm)
        given_options = {"inner_lr": inner_lr, "first_order": first_order}
        options |= {name: value for name, value in given_options.items() if value is not None}
        check_options(kind, options)
        self.model = with_exact_norms(model) if swap_norms else model
        refuse_unfit(self.model, bool(first_order))
        if vectorize is None and not is_batched(self.model):
            vectorize = False
        self.algorithm = kind(
            self.model,
            scalar_loss(loss, self.model),
            inner_steps=inner_steps,
            classification=takes_labels(loss) if classification is None else classification,
            clip=clip,
            tasks_at_once=tasks_per_chunk or 10,
            **options,
        )
        tasks = TaskMap.choose(self.model, vectorize, jit_compile, tasks_per_chunk=tasks_per_chunk)
        self.outer = OuterLoop(self.algorithm, chosen_optimizer(meta_optimizer, meta_lr), tasks)
        self.iteration = 0
        self._needs = Needs.of(self.model, labels=self.algorithm.classification, alike=not is_custom(loss))
        self._adapt = tf.function(self._adapted, reduce_retracing=True, autograph=False)

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
                with `check` and `sample` such as those of `maml.datasets.image_classes`, which needs a spec.
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
        check_whole(1, iterations=iterations, meta_batch=meta_batch)
        phase = Phase(METATRAIN, self.outer, self.iteration + iterations)
        blocks = given.training_blocks(
            episodes,
            self._needs,
            spec,
            split,
            meta_batch=meta_batch,
            begin=self.iteration,
            iterations=iterations,
            length=phase.block_length,
        )
        parts: list[dict[str, np.ndarray]] = []
        hidden = None if progress is None else not progress
        shown = Smoothed()
        with tqdm(total=iterations, desc="meta-training", unit="it", leave=False, disable=hidden) as bar:
            if not self.outer.block.experimental_get_tracing_count():
                bar.set_postfix_str(COMPILING)
            for update in updates([phase], blocks, begin=self.iteration):
                done, self.iteration = update.iteration - self.iteration, update.iteration
                if update.failed is not None:
                    raise Failure(
                        f"iteration {self.iteration}: a loss or the meta-gradient is not finite, so that the "
                        f"update was not made. If there is no NaN in the episode, a smaller inner_lr or "
                        f"meta_lr, or clip=10, may help."
                    )
                shown.add(update.measures)
                bar.set_postfix_str(shown.text(), refresh=False)
                bar.update(done)
                parts.append({name: rows for name, rows in update.measures.items() if name != "skipped"})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def evaluate(
        self,
        episodes: Episodes,
        *,
        tasks: int,
        steps: int | None = None,
        spec: EpisodeSpec | None = None,
        split: str = "test",
        transductive: bool = True,
    ) -> TestResult:
        """Adapts to the first `tasks` episodes, and measures after 0…`steps` inner steps.

        Args:
            episodes, spec, split: as in `fit`; a list is gone through once.
            tasks: episodes.
            steps: inner steps; None: as many as in training.
            transductive: `maml.BatchNorm` of the query set by its own statistics; False: by the support
                set's, as an adapted model has it.

        Returns:
            `.query` and `.support`: {"loss" | "accuracy": [tasks, steps + 1]}.

        Raises:
            UserError: if the episodes do not fit the model, or are fewer.
        """
        steps = self.algorithm.inner_steps if steps is None else steps
        check_whole(1, tasks=tasks)
        check_whole(0, steps=steps)
        source = given.as_source(episodes, self._needs, spec, split)
        return measure_tasks(
            self.algorithm, source, spec, split, tasks=tasks, steps=steps, transductive=transductive
        )

    def adapt(
        self, support_x: np.ndarray | tf.Tensor, support_y: np.ndarray | tf.Tensor, steps: int | None = None
    ) -> keras.Model:
        """A copy of the model, adapted to a support set; deterministic.

        The copy is a Keras model of its own: it predicts, and can be saved as `.keras`, which Keras loads
        once something has been imported from maml, so that it knows maml's layers. Its `maml.BatchNorm`
        layers normalise by the statistics of the support set under the adapted weights, so that a
        prediction does not depend on the other inputs: what `evaluate(transductive=False)` measures.

        Args:
            support_x: inputs [n, …].
            support_y: targets [n, …] or integer labels [n].
            steps: inner steps; None: as many as in training; 0 takes the statistics only.

        Raises:
            UserError: if they do not fit the model.
            Failure: if the adapted weights are not finite.
        """
        steps = self.algorithm.inner_steps if steps is None else steps
        check_whole(0, steps=steps)
        x, y, *_ = self._needs.fitting((support_x, support_y, support_x, support_y))
        weights, state = self._adapt(tf.convert_to_tensor(x), tf.convert_to_tensor(y), tf.constant(steps))
        if not all(np.isfinite(values).all() for values in weights):
            raise Failure(
                f"the weights are not finite after {steps} steps of α = {self.algorithm.inner_lr:g}. "
                f"Take fewer steps or a smaller inner_lr."
            )
        values = {id(v): value for v, value in zip(self.model.trainable_variables, weights, strict=True)}
        others = self.model.non_trainable_variables
        values |= {id(v): value for v, value in zip(others, state, strict=True)}
        adapted = copy_of(self.model)
        if len(adapted.variables) < len(self.model.variables):  # a class of one's own, not built yet
            adapted(x[:1])
        for variable, own in zip(adapted.variables, self.model.variables, strict=True):
            variable.assign(values[id(own)])
        return adapted

    def _adapted(self, x: tf.Tensor, y: tf.Tensor, steps: tf.Tensor) -> tuple[Weights, Weights]:
        """The weights after some inner steps on a support set, and the non-trainable values with them."""
        x, y, *_ = self.algorithm.to_floating(Episode(x, y, x, y))
        _, weights = tf.while_loop(
            lambda step, _: step < steps,
            lambda step, weights: (step + 1, self.algorithm.step(weights, x, y)[0]),
            (0, self.algorithm.weights()),
        )
        return weights, self.algorithm.stateless.state_after(weights, x)

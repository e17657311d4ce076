"""The library: few-shot learning of any Keras model, by the inner and outer loop of the program."""

import os
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from maml.episodes import EpisodeSpec
from maml.errors import Failure, UserError
from maml.learners import saving
from maml.learners.adapted import model_of
from maml.learners.base import Algorithm
from maml.learners.gradient_check import GradientCheck
from maml.learners.losses import Loss, ScalarLoss, is_custom, takes_labels
from maml.learners.options import (
    Assembly,
    algorithm_class,
    check_above_zero,
    check_options,
    check_several,
    check_whole,
    chosen_optimizer,
)
from maml.learners.proof import Proof, check_surroundings
from maml.learners.watching import Watch
from maml.learners.workings import Workings
from maml.networks import copies, operations
from maml.networks.checks import check_built
from maml.networks.stateless import tensors_of
from maml.training import given
from maml.training.evaluate import TestResult, joined, measure_tasks
from maml.training.given import Episodes
from maml.training.needs import Arrays, Needs, check_finite


class Learner(Workings):
    """Learns initial weights for a Keras model from which a few gradient steps solve a new task.

        model = keras.Sequential([keras.Input((1,)), Dense(40, "relu"), Dense(1)])
        learner = Learner(model, "mse", inner_lr=0.01, inner_steps=5)
        learner.fit(episodes, iterations=10_000)
        adapted = learner.adapt(support_x, support_y)
        adapted.predict(query_x)

    An episode is (support_x, support_y, query_x, query_y): what a task is adapted to, and what it is then
    judged by.

    Attributes:
        model: its weights are the meta-learned initialization θ.
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
        metrics: Sequence = (),
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
        `adapted = False`: maml's BatchNorm and LayerNorm, and any you set it on. Both that and `trainable`
        may change between calls. The loss is what Keras would minimize: regularizers and `add_loss` are part
        of it in the inner and the outer loop, masks count, and constraints hold after every step of either.
        Dropout and other noise is on in `fit`, with other noise for every iteration, inner step and query
        set, the same for the tasks of an iteration; it is off in `adapt` and `evaluate`, which are
        deterministic.

        Args:
            model: given pixels as they are: for those of 0…255 it begins with
                `keras.layers.Rescaling(1 / 255)`. Integer inputs (for Embedding) are never cast.
            loss: a Keras loss or its name, or a function of (targets, outputs); a mean is taken of what
                it returns. Keras' are means over the examples, the paper's code's is
                `maml.cross_entropy(K)`, whose gradients are N times as long. For several outputs a dict,
                tuple or list of these, as the model has them; the sum is minimized.
            algorithm: a name of `maml.tables.LEARNERS`, "module:Class", or a subclass of
                `maml.learners.base.Algorithm`.
            inner_lr: α, the step size of the inner loop; needed by algorithms that have one.
            inner_steps: inner gradient steps in training.
            first_order: leave out second derivatives, where the algorithm has that choice.
            classification: targets are integer labels, and accuracy is measured too. None: if the loss is
                a sparse categorical cross entropy.
            metrics: Keras metrics, their names, or functions of (targets, outputs), measured beside the loss.
            meta_lr: β, the step size of the outer loop's Adam; by default 0.001.
            meta_optimizer: any Keras optimizer for the outer loop, its schedule included, instead of Adam.
            clip: clip every entry of the meta-gradient to ±clip.
            swap_norms: work on a copy in which Keras' LayerNormalization is `maml.LayerNormalization`,
                which computes the same, and BatchNormalization that trains is `maml.MovingBatchNorm`, which
                computes what it does in training: by the statistics of the batch at hand. Its γ and β are
                kept, and not adapted.
            vectorize, jit_compile, tasks_per_chunk: see `TaskMap`; None chooses what is safe.
            options: of the algorithm, keyword arguments of its class.

        Raises:
            UserError: for a layer that would be silently wrong, a model that is not built, or a loss or
                option that does not go with it; says what to use instead.
        """
        check_surroundings()
        check_whole(1, inner_steps=inner_steps)
        if tasks_per_chunk is not None:
            check_whole(1, tasks_per_chunk=tasks_per_chunk)
        check_above_zero(inner_lr=inner_lr, meta_lr=meta_lr, clip=clip)
        kind = algorithm_class(algorithm)
        own = {"inner_lr": inner_lr, "first_order": first_order}
        options |= {name: value for name, value in own.items() if value is not None}
        check_options(kind, options)
        labels = takes_labels(loss) if classification is None else classification
        common = dict(classification=labels, inner_steps=inner_steps, clip=clip)
        mapping = dict(vectorize=vectorize, jit_compile=jit_compile, tasks_per_chunk=tasks_per_chunk)
        self._assembly = Assembly(kind, options, common, loss, metrics, mapping)
        check_built(model)
        check_several(model, loss, metrics, labels)
        self.model = copies.with_exact_norms(model) if swap_norms else model
        self.iteration = 0
        self._position = given.Position()
        ignored = ScalarLoss(loss).ignored
        self._proof = Proof(self._assembly, self.model)
        if swap_norms and not copies.holds_swapped(model):
            self._proof.original = model
        self._build(chosen_optimizer(meta_optimizer, meta_lr))
        self._needs = Needs.of(
            self.model,
            labels=labels,
            alike=not is_custom(loss),
            ignored=ignored,
            described=self.algorithm.described,
            unlabeled=kind.unlabeled,
        )
        if kind.backbone:  # whose outputs are features: N is the episode's
            self._needs = self._needs._replace(outputs=(None, None))
        inputs = tensors_of(self.model, "input")
        if inputs is not None:
            self._proof.head(inputs)

    # --- Training -----------------------------------------------------------------------------------

    def fit(
        self,
        episodes: Episodes,
        *,
        iterations: int,
        meta_batch: int = 4,
        spec: EpisodeSpec | None = None,
        split: str = "train",
        progress: bool | None = None,
        check: bool = True,
        validation: Episodes | None = None,
        validation_tasks: int = 100,
        validation_spec: EpisodeSpec | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        epoch: int = 100,
    ) -> dict[str, np.ndarray]:
        """Meta-trains; a second call resumes from the first, optimizer and position included.

        Ten calls of one iteration do what one call of ten does, to the bit.

        Args:
            episodes: what to learn from: anything that gives (support_x, support_y, query_x, query_y),
                each [n, …]. A list or a `tf.data.Dataset` is begun again where it ends; a generator is
                trained on to its end. Or a data source with `check` and `sample` such as those of
                `maml.datasets.image_classes`, which needs a spec. Where shapes differ from episode to
                episode, tasks are computed one by one.
            iterations: updates of the weights.
            meta_batch: episodes per update.
            spec: ways, shots, queries and seed, for a data source.
            split: of a data source.
            progress: show a bar; None: on a terminal.
            check: before the first training of a model with anything in it that is not proven, compare its
                meta-gradient with a finite difference; see `check_gradient`.
            validation: episodes to evaluate after every epoch: a list, or a data source, of which split
                "val" is taken.
            validation_tasks: of these episodes; of a list no more than it holds.
            validation_spec: for a data source; None: `spec`.
            callbacks: Keras' EarlyStopping, ModelCheckpoint, TensorBoard, ReduceLROnPlateau and the like.
                They see `learner.model` with the outer loop's optimizer, and the logs "loss" and "accuracy"
                of the query sets, "support_loss", "gradient_norm", "val_loss", "val_accuracy".
            epoch: iterations of an epoch; epochs end at its multiples.

        Returns:
            "query_loss" after adaptation [iterations], "support_loss" [iterations, inner_steps] before
            each inner step, "query_accuracy" and "support_accuracy" likewise, "gradient_norm";
            "val_loss" and the like [epochs].

        Raises:
            UserError: if the episodes do not fit the model, or its meta-gradient would be wrong.
            Failure: if a loss or the meta-gradient is not finite; that update was not made.
        """
        check_whole(1, iterations=iterations, meta_batch=meta_batch, epoch=epoch)
        self._refresh()
        watch = None
        if validation is not None or callbacks:
            test = self._validation(validation, validation_tasks, validation_spec or spec)
            watch = Watch(self, callbacks, None if validation is None else test, epoch, iterations)
        sizes = dict(meta_batch=meta_batch, iterations=iterations)
        blocks = self._blocks(episodes, spec, split, sizes, check, epoch if watch else None)
        hidden = None if progress is None else not progress
        with operations.missing_named(self.model.name):
            parts = self._trained(blocks, iterations, watch, epoch, hidden)
        if not all(np.isfinite(variable.numpy()).all() for variable in self.algorithm.variables):
            raise Failure(
                f"iteration {self.iteration}: the weights are not finite any more. Begin anew with a smaller "
                f"meta_lr."
            )
        history = {
            name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "skipped"
        }
        return history | {name: np.array(rows) for name, rows in (watch.history if watch else {}).items()}

    def check_gradient(self, episode: Sequence) -> GradientCheck:
        """Compares the meta-gradient of one task with a finite difference along one direction, in float64.

        `fit` does it by itself before the first training of a model that holds anything not proven.

        Args:
            episode: (support_x, support_y, query_x, query_y).

        Raises:
            UserError: if they deviate, or an operation has no second derivative; names it and the remedy.
        """
        episode = self._needs.fitting(episode)
        check_finite(episode)
        self._prove(episode)
        return self._proof.compared(episode)

    # --- Testing and adapting -------------------------------------------------------------------------

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
        self._refresh()
        options = dict(steps=steps, transductive=transductive)
        if given.is_source(episodes):
            source = given.as_source(episodes, self._needs, spec, split)
            return measure_tasks(self.algorithm, source, spec, split, tasks=tasks, **options)
        chunks = given.chunks(episodes, self._looked, self._needs, tasks)
        return joined(
            [
                measure_tasks(self.algorithm, given.InOrder(chunk), spec, split, tasks=len(chunk), **options)
                for chunk in chunks
            ]
        )

    def adapt(self, support_x: Arrays, support_y: Arrays, steps: int | None = None) -> keras.Model:
        """The model, adapted to a support set; deterministic, a copy.

        The copy is a Keras model of its own: it predicts, and can be saved as `.keras`, which Keras loads
        once something has been imported from maml, so that it knows maml's layers. Its `maml.BatchNorm`
        layers normalize by the statistics of the support set under the adapted weights, so that a
        prediction does not depend on the other inputs: what `evaluate(transductive=False)` measures.
        Of "prototypical" it is the embedding with a linear layer for the classes there are, whose outputs are
        those of `predict` but for ‖f‖², which softmax does not see.

        Args:
            support_x: inputs [n, …].
            support_y: targets [n, …] or integer labels [n].
            steps: inner steps; None: as many as in training; 0 takes the statistics only.

        Raises:
            UserError: if they do not fit the model, or the algorithm adapts no weights.
            Failure: if the adapted weights are not finite.
        """
        x, y, steps = self._support(support_x, support_y, steps)
        found = self._adapt(x, y, steps)
        if not all(np.isfinite(values).all() for values in found.head):
            raise Failure("the prototypes are not finite. Scale the inputs down.")
        if not all(np.isfinite(values).all() for values in found.weights):
            rate = self._assembly.options.get("inner_lr", float("nan"))
            raise Failure(
                f"the weights are not finite after {int(steps)} steps of α = {rate:g}. Take fewer steps or a "
                f"smaller inner_lr."
            )
        return model_of(self.model, found, x)

    def predict(
        self,
        support_x: Arrays,
        support_y: Arrays,
        query_x: Arrays,
        steps: int | None = None,
        *,
        unlabeled_x: Arrays | None = None,
    ) -> np.ndarray:
        """Outputs for query_x [n, …] after adaptation to a support set, of any algorithm.

        For algorithms that adapt weights: what `adapt(support_x, support_y, steps)` predicts.

        Args:
            support_x, support_y, steps: see `adapt`.
            query_x: inputs [n, …].
            unlabeled_x: inputs [m, …] without labels, for algorithms that learn from them.

        Raises:
            UserError: if they do not fit the model, or the algorithm takes no unlabeled inputs.
        """
        if unlabeled_x is not None and not self.algorithm.unlabeled:
            raise UserError(
                f"unlabeled_x: {self._assembly.kind.__name__} learns nothing from it. Leave it out."
            )
        x, y, steps = self._support(support_x, support_y, steps)
        more = [] if unlabeled_x is None else [self._needs.input_of("unlabeled", unlabeled_x)]
        parts = tf.nest.map_structure(tf.convert_to_tensor, [self._needs.input_of("query", query_x), *more])
        predict = self._predict_with_unlabeled if more else self._predict
        outputs = predict(x, y, steps, *parts)
        return tf.nest.map_structure(lambda rows: rows.numpy(), outputs)

    # --- Keeping ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Writes model, outer optimizer, options and iteration into the folder `path`.

        A learner that is loaded from it goes on as this one would, to the bit.

        Raises:
            UserError: if the algorithm has an option that JSON cannot hold.
        """
        saving.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        loss: Loss | None = None,
        metrics: Sequence | None = None,
        custom_objects: dict | None = None,
        safe_mode: bool = True,
    ) -> "Learner":
        """The learner that `save` wrote.

        Args:
            path: the folder.
            loss, metrics: needed where they are functions of the user's own, which are not saved.
            custom_objects, safe_mode: see `keras.saving.load_model`.

        Raises:
            UserError: if there is no such learner, or a function is missing.
        """
        return saving.loaded(
            cls, path, loss=loss, metrics=metrics, custom_objects=custom_objects, safe_mode=safe_mode
        )

"""The workings of a `Learner`: what is made of its model, what it trains on, what it adapts."""

import warnings
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from maml.episodes import Episode, EpisodeSpec, SemiSupervisedEpisode
from maml.errors import Failure, UserError, reason_of
from maml.learners.adapted import Parts, parts
from maml.learners.base import Algorithm
from maml.learners.options import (
    Assembly,
    check_whole,
    grown,
)
from maml.learners.proof import Proof, check_surroundings
from maml.learners.unequal import UnequalTasks
from maml.learners.watching import Watch, put_averages
from maml.networks.checks import check_model
from maml.training import given
from maml.training.evaluate import TestResult
from maml.training.given import Episodes
from maml.training.loop import METATRAIN, Block, Phase, Update, updates
from maml.training.needs import Arrays, Needs, check_finite
from maml.training.outer_loop import OuterLoop
from maml.training.progress import COMPILING, Smoothed
from maml.training.task_map import program_of


class Workings:
    """The inner parts of a `Learner`, whose `__init__` sets the attributes.

    Attributes:
        model, iteration: see `Learner`.
        algorithm, outer: made of the model as it is, anew when its layers freeze.
        _classes: N of all tasks trained on, for learners that can use it; 0: they differ; None: none yet.
    """

    model: keras.Model
    iteration: int
    algorithm: Algorithm
    outer: OuterLoop
    _assembly: Assembly
    _needs: Needs
    _position: given.Position
    _proof: Proof
    _classes: int | None = None

    def _build(self, optimizer: keras.optimizers.Optimizer) -> None:
        """Algorithm and outer loop of the model as it is, its frozen layers considered."""
        constrains = self._assembly.kind.constrains or not self._assembly.steps
        check_model(self.model, self._assembly.second_order, constrains)
        self.algorithm = self._assembly.algorithm(self.model)
        if self._classes:
            self.algorithm.train_num_classes = self._classes
        optimizer = grown(optimizer, self.algorithm.variables)
        tasks = self._assembly.tasks(self.model, alike=self._classes != 0, batchable=self.algorithm.batchable)
        self.outer = OuterLoop(self.algorithm, optimizer, tasks)
        self._adapt = program_of(self._adapted, reduce_retracing=True)
        self._predict, self._predict_with_unlabeled = (
            program_of(self._predicted, reduce_retracing=True) for _ in range(2)
        )
        self._one_task = UnequalTasks(self.outer)
        self._compiled = False
        self._built_of = self._layers()

    def _layers(self) -> list[tuple]:
        """The parts that an algorithm fixes of the model when it is made."""
        return [
            (id(layer), layer.trainable, getattr(layer, "adapted", True))
            for layer in self.model._flatten_layers()
        ]

    def _refresh(self) -> None:
        """Takes notice of layers that were frozen, unfrozen or kept from adaptation since the last call."""
        check_surroundings()
        if self._layers() != self._built_of:
            self._rebuild()

    def _rebuild(self) -> None:
        """`_build` with the optimizer and the learned values beside the model as they are."""
        before = {v.path: v for v in self.algorithm.outside_variables}
        self._build(self.outer.optimizer)
        for variable in self.algorithm.outside_variables:
            if variable.path in before and before[variable.path].shape == variable.shape:
                variable.assign(before[variable.path])

    def _count_classes(self, block: Block | list[Episode]) -> None:
        """Tells a metric learner N, without which its tasks are not computed at once.

        Raises:
            UserError: for tasks of other than `train_num_classes` classes, where that was given.
        """
        if not hasattr(self.algorithm, "train_num_classes"):
            return
        if isinstance(block, Block):
            labels = [block.episodes.support_y[block.first : block.last]]
        else:
            labels = [episode.support_y for episode in block]
        counts = {int(n) + 1 for y in labels for n in np.max(y, -1).flat}
        asked = self._assembly.options.get("train_num_classes")
        if asked and counts != {asked}:
            raise UserError(
                f"train_num_classes={asked}: expected episodes of {asked} classes, got some of "
                f"{', '.join(map(str, sorted(counts - {asked})))}. Leave it out: the labels tell."
            )
        if not asked and self._classes != 0 and counts != {self._classes}:
            self._classes = counts.pop() if self._classes is None and len(counts) == 1 else 0
            self._rebuild()

    def _trained(
        self,
        blocks: Iterator[Block | list[Episode]],
        iterations: int,
        watch: Watch | None,
        epoch: int,
        hidden: bool | None,
    ) -> list[dict[str, np.ndarray]]:
        """The measures of all iterations, call by call."""
        parts: list[dict[str, np.ndarray]] = []
        shown = Smoothed()
        with tqdm(total=iterations, desc="meta-training", unit="it", leave=False, disable=hidden) as bar:
            if not self._compiled:
                bar.set_postfix_str(COMPILING)
            if watch:
                watch.begin()
            for update in self._updates(blocks, self.iteration + iterations, (epoch,) if watch else ()):
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
                parts.append(update.measures)
                if watch:
                    watch.after(update)
                    if watch.stopped:
                        break
            if watch:
                watch.end()
            else:
                put_averages(self.outer.optimizer)
        return parts

    def _validation(
        self, episodes: Episodes | None, tasks: int, spec: EpisodeSpec | None
    ) -> Callable[[], TestResult]:
        if isinstance(episodes, Sequence):
            tasks = min(tasks, len(episodes))
        split = "val" if given.is_source(episodes) else "test"
        return lambda: self.evaluate(episodes, tasks=tasks, spec=spec, split=split)

    def _blocks(
        self,
        episodes: Episodes,
        spec: EpisodeSpec | None,
        split: str,
        sizes: dict[str, int],
        check: bool,
        epoch: int | None,
    ) -> Iterator[Block | list[Episode]]:
        """The blocks to train on; the first of it has proved the model."""
        length = Phase(METATRAIN, self.outer, 0).block_length
        sizes = sizes | dict(length=min(length, epoch or length))

        def look(episode: Episode) -> Needs:
            self._prove(episode)
            if check:
                self._proof.gradient(self._needs.fitting(episode))
            return self._needs

        if given.is_source(episodes):
            blocks = given.source_blocks(
                episodes, look, self._needs, spec, split, begin=self.iteration, **sizes
            )
        else:
            stream = self._position.stream(episodes, self.iteration * sizes["meta_batch"])
            blocks = given.given_blocks(stream, look, self._needs, **sizes)
        for block in blocks:
            self._count_classes(block)
            if isinstance(block, Block) and not self._compiled:
                self._compile(block)
            yield block

    def _compile(self, block: Block) -> None:
        """Makes the block's program, without an update; task by task where a batched one cannot be made."""
        self._compiled = True
        if not self.outer.tasks.vectorize:
            return
        nothing = (block.episodes, tf.constant(0), tf.constant(0))
        try:
            self.outer.block(*nothing)
        except UserError:
            raise
        except Exception as error:  # TensorFlow and XLA raise what they like
            asked = self._assembly.mapping["vectorize"]
            self._mapped(False)
            self.outer.block(*nothing)  # raises what is not about batching
            if asked:
                self._mapped(True)
                raise UserError(
                    f"vectorize=True: expected a network that TensorFlow can compute for all tasks at once, "
                    f"got {self.model.name!r} ({reason_of(error)}). Leave out vectorize."
                ) from error
            warnings.warn(
                f"{self.model.name}: computes task by task, which is slower, since TensorFlow cannot "
                f"batch it ({reason_of(error)}). Use vectorize=False to leave out the attempt.",
                stacklevel=2,
            )

    def _mapped(self, vectorize: bool) -> None:
        self._assembly.mapping["vectorize"] = vectorize
        self._rebuild()
        self._compiled = not vectorize

    def _updates(
        self, blocks: Iterator[Block | list[Episode]], end: int, pauses: Sequence[int]
    ) -> Iterator[Update]:
        for block in blocks:
            if isinstance(block, Block):
                phase = Phase(METATRAIN, self.outer, end)
                yield from updates([phase], [block], begin=self.iteration, pauses=pauses)
            else:
                yield self._one_task.update(block, Phase(METATRAIN, self.outer, end), self.iteration)

    def _prove(self, episode: Episode) -> None:
        """Proves what can be known of the model with an episode at hand, once."""
        x = tf.nest.map_structure(tf.convert_to_tensor, self.algorithm.to_floating(episode).query_x)
        self._proof.model_itself(x)
        if self._needs.outputs is None:
            self._needs = self._needs._replace(outputs=self._proof.output_shape(x))

    def _looked(self, episode: Episode) -> Needs:
        self._prove(episode)
        return self._needs

    def _support(
        self, support_x: Arrays, support_y: Arrays, steps: int | None
    ) -> tuple[Arrays, Arrays, tf.Tensor]:
        steps = self.algorithm.inner_steps if steps is None else steps
        check_whole(0, steps=steps)
        self._refresh()
        x, y = self._needs.support(support_x, support_y)
        check_finite((x, y))
        if self._needs.described is None:
            self._prove(Episode(x, y, x, y))
        x, y = tf.nest.map_structure(tf.convert_to_tensor, self._needs.support(x, y))
        return x, y, tf.constant(steps)

    def _adapted(self, x: tf.Tensor, y: tf.Tensor, steps: tf.Tensor) -> Parts:
        """The model after some inner steps on a support set."""
        x, y, *_ = self.algorithm.to_floating(Episode(x, y, x, y))
        return parts(self.algorithm, x, y, steps)

    def _predicted(
        self, x: tf.Tensor, y: tf.Tensor, steps: tf.Tensor, query_x: tf.Tensor, *unlabeled_x: tf.Tensor
    ) -> tf.Tensor:
        """Outputs of the query set, by the support set's statistics."""
        kind = SemiSupervisedEpisode if unlabeled_x else Episode
        episode = self.algorithm.to_floating(kind(x, y, query_x, y, *unlabeled_x))
        state = self.algorithm.adapted(episode.support_x, episode.support_y, steps, *episode[4:])
        return self.algorithm.outputs(state, episode.query_x, episode.support_x)

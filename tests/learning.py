"""MAML of one network with its outer loop and joint training, as one object for tests to question."""

import keras
import tensorflow as tf

from maml.episodes import Episode
from maml.learners.joint import Joint
from maml.learners.maml import Maml
from maml.runs.build import build_training
from maml.training.adam import Adam
from maml.training.outer_loop import OuterLoop
from maml.training.task_map import TaskMap


class Meta:
    """An outer loop and what it updates; other attributes are the algorithm's."""

    def __init__(self, network: keras.Model, loss, *, meta_lr=1e-3, skip_not_finite=False, **options):
        mapping = {name: options.pop(name, None) for name in ("tasks_per_chunk", "strategy")}
        shape = [options.pop(name, None) for name in ("vectorize", "jit_compile")]
        tasks = TaskMap.choose(network, *shape, **mapping)
        outer = OuterLoop(
            Maml(network, loss, **options), Adam(meta_lr), tasks, skip_not_finite=skip_not_finite
        )
        common = {name: options[name] for name in ("classification", "scale") if name in options}
        self._take(outer, OuterLoop(Joint(network, loss, **common), Adam(meta_lr), tasks))

    @classmethod
    def of(cls, outer: OuterLoop, joint: OuterLoop | None = None) -> "Meta":
        self = cls.__new__(cls)
        self._take(outer, joint)
        return self

    @classmethod
    def built(cls, settings, network, strategy=None) -> "Meta":
        """As the command line makes it; with a joint phase only where the settings have one."""
        phases = build_training(settings, network, strategy)
        self = cls.of(phases[-1].outer, phases[0].outer)
        self.phases = phases
        return self

    def _take(self, outer: OuterLoop, joint: OuterLoop | None) -> None:
        self.outer, self.joint, self.algorithm = outer, joint, outer.algorithm
        self.meta_step, self.metatrain_block = outer.meta_step, outer.block
        self.meta_optimizer = outer.optimizer
        if joint is not None:
            self.pretrain_step, self.pretrain_block = joint.meta_step, joint.block
            self.pretrain_optimizer = joint.optimizer

    @property
    def tasks(self) -> TaskMap:
        return self.outer.tasks

    def meta_gradient(self, episodes: Episode) -> tuple[list[tf.Tensor], dict[str, tf.Tensor]]:
        return self.outer.gradient(episodes)[:2]

    def joint_gradient(self, episodes: Episode) -> tuple[list[tf.Tensor], dict[str, tf.Tensor]]:
        return self.joint.gradient(episodes)[:2]

    def predict(self, weights, x, support_x=None, noise=None) -> tf.Tensor:
        return self.algorithm.outputs(weights, x, support_x, noise)

    def __getattr__(self, name: str):
        return getattr(self.algorithm, name)

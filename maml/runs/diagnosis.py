"""The diagnosis of a meta-batch whose loss or meta-gradient is not finite."""

import functools

import numpy as np
import tensorflow as tf

from maml.episodes import Episode
from maml.runs.folder import Run
from maml.training.loop import PRETRAIN, Phase


def not_finite(phase: Phase, episodes: Episode, run: Run) -> str:
    """Says which episodes of the present meta-batch are to blame, and what the gradient is like per weight.

    Args:
        phase: with the weights from before the update.
        episodes: the meta-batch, [tasks, …].
        run: at the iteration that failed, which is saved.
    """
    learner = phase.outer.algorithm

    @functools.partial(tf.function, autograph=False)
    def each() -> tuple[tf.Tensor, tf.Tensor]:
        def one_task(episode: Episode) -> tuple[tf.Tensor, tf.Tensor]:
            gradient, measures, _ = learner.task_gradient(learner.weights(), learner.to_floating(episode))
            losses = [tf.reshape(value, (-1,)) for name, value in measures.items() if name.endswith("loss")]
            return tf.stack([tf.norm(weight) for weight in gradient]), tf.concat(losses, axis=0)

        return tf.map_fn(one_task, episodes, fn_output_signature=(learner.dtype, learner.dtype))

    norms, losses = (part.numpy() for part in each())
    iteration, tasks = int(run.iteration), len(losses)
    bad = [task for task in range(tasks) if not np.isfinite([*norms[task], *losses[task]]).all()]
    blamed = "; ".join(
        f"episode {iteration * tasks + task}: losses {', '.join(f'{loss:.3g}' for loss in losses[task])}"
        for task in bad[:3]
    )
    by_weight = ", ".join(
        f"{name} {norm:.3g}" for name, norm in zip(learner.weight_names(), norms.mean(axis=0), strict=True)
    )
    kind = "gradient" if phase.name == PRETRAIN else "meta-gradient"
    return (
        f"iteration {iteration}: a loss or the {kind} is not finite in {len(bad)} of {tasks} tasks "
        f"({blamed or 'each by itself is'}). Norms of the gradient, means over the tasks: {by_weight}. "
        f"The weights from before it are saved as checkpoint {iteration} in {run.dir}. "
        f"Lower --update_lr or --meta_lr in a new run, or continue with --on_nan=skip."
    )

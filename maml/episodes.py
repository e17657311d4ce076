"""Episodes, and the deterministic stream of them.

Episode i of (seed, split) is a pure function of those three. All randomness comes from a counter
hash of integers, so it is the same on every machine and library version, and any episode can be
drawn without drawing those before it: resuming a run needs one integer, the iteration.
"""

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # the ground, on which what has to be at hand at once stands too
    import tensorflow as tf


class Episode(NamedTuple):
    """One task: a support set to adapt on and a query set to be judged on.

    Batched over tasks, every field gets leading axes (meta-batch; block of meta-batches).

    Fields:
        support_x, query_x: inputs, [n, …]; images in uint8.
        support_y, query_y: int32 labels [n] in 0…N−1, or float32 targets [n, outputs].
    """

    support_x: "tf.Tensor"
    support_y: "tf.Tensor"
    query_x: "tf.Tensor"
    query_y: "tf.Tensor"


class SemiSupervisedEpisode(NamedTuple):
    """An `Episode` with inputs whose labels nobody tells.

    Fields:
        support_x, support_y, query_x, query_y: see `Episode`.
        unlabeled_x: [m, …], of the episode's classes and maybe of others, the distractors.
    """

    support_x: "tf.Tensor"
    support_y: "tf.Tensor"
    query_x: "tf.Tensor"
    query_y: "tf.Tensor"
    unlabeled_x: "tf.Tensor"


class EpisodeSpec(NamedTuple):
    """The episodes asked of a data set: N ways, K support and Q query examples per class, and the seed."""

    way: int
    shot: int
    query: int
    seed: int


class EpisodeSource(Protocol):
    """A data set that episodes can be drawn from."""

    def check(self, spec: EpisodeSpec, split: str) -> None:
        """Raises UserError if the split has too few classes or examples for the spec."""
        ...

    def sample(self, spec: EpisodeSpec, split: str, indices: "tf.Tensor") -> Episode:
        """The episodes with the given int64 indices [t]; the fields' leading axis is t."""
        ...


SPLITS = ("train", "val", "test")  # of the classes, where they are split already

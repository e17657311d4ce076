"""Episodes with unlabeled examples and distractor classes (Ren et al. 2018), of any data set of classes."""

import tensorflow as tf

from maml.episodes import EpisodeSource, EpisodeSpec, SemiSupervisedEpisode


class WithUnlabeled:
    """Draws from each of N classes M unlabeled examples more, and M from each of D classes beside them.

    Episode i is part of episode i of the source with N + D ways and Q + M queries, so all draws are distinct.
    Unlike in the paper, which tells 10 or 40 percent of a training class' images alone the label, the
    unlabeled ones of one episode may have a label in another.
    """

    def __init__(
        self, source: EpisodeSource, num_unlabeled: int, test_num_unlabeled: int = 0, num_distractors: int = 0
    ):
        """Wraps a source of N-way episodes.

        Args:
            source: where labels count classes from 0 in random order.
            num_unlabeled: M, of each class.
            test_num_unlabeled: M for other splits than "train"; 0: the same.
            num_distractors: D.
        """
        self.source = source
        self.num_unlabeled = num_unlabeled
        self.test_num_unlabeled = test_num_unlabeled or num_unlabeled
        self.num_distractors = num_distractors

    def check(self, spec: EpisodeSpec, split: str) -> None:
        """Raises UserError if the split has too few classes or examples."""
        self.source.check(self._wider(spec, split), split)

    def class_names(self, spec: EpisodeSpec, split: str, indices: tf.Tensor) -> list[list[str]]:
        """The names of the N classes of each episode, in the order of their labels."""
        names = self.source.class_names(self._wider(spec, split), split, indices)
        return [episode[: spec.way] for episode in names]

    def sample(self, spec: EpisodeSpec, split: str, indices: tf.Tensor) -> SemiSupervisedEpisode:
        """Episodes with the given indices [t]; unlabeled_x is [t, (N + D)·M, …], in random order."""
        wider = self._wider(spec, split)
        drawn = self.source.sample(wider, split, indices)
        support = _in_order(drawn.support_y < spec.way, spec.way * spec.shot)
        # Of every class the first M of its queries, as they are shuffled, are the unlabeled ones.
        by_class = tf.argsort(drawn.query_y, axis=1, stable=True)
        by_class = tf.reshape(by_class, (-1, wider.way, wider.query))
        unlabeled = wider.query - spec.query
        first = tf.reshape(by_class[:, :, :unlabeled], (-1, wider.way * unlabeled))
        query = tf.reshape(by_class[:, : spec.way, unlabeled:], (-1, spec.way * spec.query))

        def rows(field: tf.Tensor, which: tf.Tensor) -> tf.Tensor:
            return tf.gather(field, tf.sort(which, axis=1), batch_dims=1)

        return SemiSupervisedEpisode(
            rows(drawn.support_x, support),
            rows(drawn.support_y, support),
            rows(drawn.query_x, query),
            rows(drawn.query_y, query),
            rows(drawn.query_x, first),
        )

    def _wider(self, spec: EpisodeSpec, split: str) -> EpisodeSpec:
        more = self.num_unlabeled if split == "train" else self.test_num_unlabeled
        return spec._replace(way=spec.way + self.num_distractors, query=spec.query + more)


def _in_order(chosen: tf.Tensor, count: int) -> tf.Tensor:
    """The columns [t, count] that are chosen in each row of [t, n]."""
    return tf.argsort(tf.cast(chosen, tf.int32), axis=1, direction="DESCENDING", stable=True)[:, :count]

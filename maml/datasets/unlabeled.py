"""Episodes with unlabeled examples and distractor classes (Ren et al. 2018), of any data set of classes."""

import tensorflow as tf

from maml.datasets.image_classes import ImageClasses
from maml.episodes import EpisodeSpec, SemiSupervisedEpisode
from maml.errors import UserError


class WithUnlabeled:
    """Draws from each of N classes M unlabeled examples more, and M from each of D classes beside them.

    Support and query set are those of episode i of the source, so that learners with and without unlabeled
    examples are compared on the same. The unlabeled ones are the next draws of the same shuffles of classes
    and examples: all are distinct.
    Unlike in the paper, which tells 10 or 40 percent of a training class' images alone the label, the
    unlabeled ones of one episode may have a label in another.
    """

    def __init__(
        self, source: ImageClasses, num_unlabeled: int, test_num_unlabeled: int = 0, num_distractors: int = 0
    ):
        """Wraps a source of N-way episodes.

        Args:
            source: of N-way episodes.
            num_unlabeled: M, of each class.
            test_num_unlabeled: M for other splits than "train"; 0: the same.
            num_distractors: D.

        Raises:
            UserError: if the source is of another kind, whose draws may not be distinct.
        """
        if not isinstance(source, ImageClasses):
            raise UserError(
                f"unlabeled examples: expected a data set of classes, an ImageClasses as maml.from_arrays "
                f"makes, got {type(source).__name__}."
            )
        self.source = source
        self.num_unlabeled = num_unlabeled
        self.test_num_unlabeled = test_num_unlabeled or num_unlabeled
        self.num_distractors = num_distractors

    def check(self, spec: EpisodeSpec, split: str) -> None:
        """Raises UserError if the split has too few classes or examples."""
        self.source.check(self._wider(spec, split), split)

    def class_names(self, spec: EpisodeSpec, split: str, indices: tf.Tensor) -> list[list[str]]:
        """The names of the N classes of each episode, in the order of their labels."""
        return self.source.class_names(spec, split, indices)

    def sample(self, spec: EpisodeSpec, split: str, indices: tf.Tensor) -> SemiSupervisedEpisode:
        """Episodes with the given indices [t]; unlabeled_x is [t, (N + D)·M, …], in random order."""
        behind = self._wider(spec, split)
        behind = behind._replace(shot=spec.shot + spec.query, query=behind.query - spec.query)
        unlabeled = self.source.sample(behind, split, indices).query_x
        return SemiSupervisedEpisode(*self.source.sample(spec, split, indices), unlabeled)

    def _wider(self, spec: EpisodeSpec, split: str) -> EpisodeSpec:
        more = self.num_unlabeled if split == "train" else self.test_num_unlabeled
        return spec._replace(way=spec.way + self.num_distractors, query=spec.query + more)

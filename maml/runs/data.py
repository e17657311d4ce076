"""From settings to the data set, and to the shape of its inputs."""

import tensorflow as tf

from maml.datasets.unlabeled import WithUnlabeled
from maml.episodes import Episode, EpisodeSource, EpisodeSpec
from maml.errors import UserError
from maml.settings.settings import Settings
from maml.tables import accepted, load


def load_data(settings: Settings) -> EpisodeSource:
    """The data set of the settings.

    The function that its row names is given those of the request's values that it declares.

    Raises:
        UserError: if the data set is not there or not complete, or does not take a flag that was given.
    """
    function = load(settings.dataset.home)
    request = accepted(
        f"--datasource={settings.datasource}",
        function,
        {},
        dict(
            name=settings.datasource.removeprefix("tfds:"),
            data_dir=settings.data_dir,
            seed=settings.seed,
            side=settings.img_size,
            skip_bad_images=settings.skip_bad_images,
            oracle=settings.baseline == "oracle",
            class_split=settings.class_split,
        ),
    )
    if settings.class_split and "class_split" not in request:
        raise UserError(
            f"expected a data set whose classes can be split by lists, got --datasource="
            f"{settings.datasource}, which has splits of its own. Leave out --class_split."
        )
    data = function(**request)
    if not all(hasattr(data, verb) for verb in ("check", "sample")):
        raise UserError(
            f"--datasource={settings.datasource}: expected an EpisodeSource, with check and sample, got "
            f"{type(data).__name__}. See docs/extending.md."
        )
    if "num_unlabeled" in settings.own:  # of a semi-supervised learner
        names = ("num_unlabeled", "test_num_unlabeled", "num_distractors")
        data = WithUnlabeled(data, *(settings.own[name] for name in names))
    return data


def first_episode(data: EpisodeSource, spec: EpisodeSpec, split: str) -> Episode:
    """Episode 0 of a split, [1, …]; raises UserError if the data set cannot make such episodes."""
    data.check(spec, split)
    return data.sample(spec, split, tf.zeros(1, tf.int64))


def input_shape(settings: Settings) -> tuple[int, ...]:
    """Shape of one input: as the settings say or, of a custom data set that does not, as its episodes are.

    Raises:
        UserError: as `load_data` and `first_episode`.
    """
    if settings.input_shape is not None:
        return settings.input_shape
    # One example of each class is enough to look at.
    spec = EpisodeSpec(settings.num_classes, 1, 1, settings.seed)
    return tuple(first_episode(load_data(settings), spec, settings.split).support_x.shape[2:])

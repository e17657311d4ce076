"""From settings to network and learner."""

import keras
import tensorflow as tf

from maml.episodes import EpisodeSpec
from maml.errors import UserError
from maml.learners.base import Algorithm
from maml.learners.joint import Joint
from maml.runs.optimizers import meta_optimizer
from maml.settings.own import trained_on
from maml.settings.settings import Settings
from maml.tables import accepted, learner, load, network
from maml.training.loop import METATRAIN, PRETRAIN, Phase
from maml.training.outer_loop import OuterLoop
from maml.training.task_map import TaskMap


def build_network(settings: Settings, input_shape: tuple[int, ...], dtype: str = "float32") -> keras.Model:
    """The network of the settings, with fresh weights of the given type.

    Args:
        settings: of the run; with `mixed_precision` float32 becomes "mixed_bfloat16".
        input_shape: of one example: (1,) or (3,) for the sinusoid, (H, W, C) for images.
        dtype: "float32", or "float64" to compare with exact results.

    Raises:
        UserError: if the network takes other inputs, or `--network=module:function` names nothing that gives
            a Keras model.
    """
    kind = learner_class(settings)
    backbone = kind.backbone
    # A metric learner's network is tested by moving statistics, which the paper's batch norm does not have.
    norm = "moving_batch_norm" if backbone and settings.norm == "batch_norm" else settings.norm
    if settings.mixed_precision and dtype == "float32":
        dtype = "mixed_bfloat16"
    source, row = settings.dataset, network(settings.network)
    if row.axes and len(input_shape) != len(row.axes):
        raise UserError(
            f"--network={settings.network}: expected inputs [{', '.join(row.axes)}], got "
            f"{list(input_shape)} of --datasource={settings.datasource}."
        )
    build = load(row.home)
    offered = dict(
        filters=settings.num_filters,
        norm=norm,
        max_pool=settings.max_pool,
        flatten=source.flatten,
        hidden=source.hidden,
        dtype=dtype,
    )
    offered |= kind.network_options(settings)
    outputs = settings.num_classes if settings.classification else source.outputs
    outputs = None if backbone else outputs
    offered |= row.options
    places = dict(input_shape=input_shape, outputs=outputs)
    built = build(*places.values(), **accepted(f"--network={settings.network}", build, places, offered))
    if not isinstance(built, keras.Model):
        raise UserError(
            f"--network={settings.network}: expected a Keras model, got {type(built).__name__}. See "
            f"docs/extending.md."
        )
    return built


def learner_class(settings: Settings) -> type[Algorithm]:
    """The class of the learner that the settings name."""
    return load(learner(settings.learner).home)


def build_training(
    settings: Settings, network: keras.Model, strategy: tf.distribute.Strategy | None = None
) -> list[Phase]:
    """The phases of a run, with the losses, steps and clipping of the settings; the last meta-trains.

    With a strategy, this and `build_network` are called in its scope.
    """
    source = settings.dataset
    common = dict(
        classification=settings.classification,
        scale=source.scale,
        tasks_at_once=settings.tasks_per_chunk or 10,
    )
    kind = learner_class(settings)
    options = dict(inner_steps=settings.num_updates, clip=source.clip) | kind.arguments(settings)
    algorithm = kind(network, kind.loss_function(settings), **common, **options)
    tasks = TaskMap.choose(
        network,
        settings.vectorize,
        settings.jit_compile,
        batchable=algorithm.batchable,
        tasks_per_chunk=settings.tasks_per_chunk,
        strategy=strategy,
    )

    def phase(name: str, algorithm: Algorithm, end: int) -> Phase:
        skip = settings.on_nan == "skip"
        iterations = settings.pretrain_iterations if name == PRETRAIN else settings.metatrain_iterations
        optimizer = meta_optimizer(algorithm, settings, iterations)
        outer = OuterLoop(algorithm, optimizer, tasks, skip_not_finite=skip)
        return Phase(name, outer, end)

    phases = [phase(METATRAIN, algorithm, settings.iterations)]
    if settings.pretrain_iterations:
        joint = Joint(network, Joint.loss_function(settings), **common)
        phases.insert(0, phase(PRETRAIN, joint, settings.pretrain_iterations))
    return phases


def train_spec(settings: Settings) -> EpisodeSpec:
    """The episodes of meta-training."""
    return EpisodeSpec(*trained_on(settings), settings.num_query, settings.seed)


def test_spec(settings: Settings) -> EpisodeSpec:
    """The episodes of meta-validation and meta-test."""
    return EpisodeSpec(
        settings.num_classes, settings.update_batch_size, settings.test_num_query, settings.seed
    )

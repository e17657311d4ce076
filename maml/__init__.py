"""MAML (Finn, Abbeel & Levine, ICML 2017) in TensorFlow 2 and Keras 3.

from maml import Learner

learner = Learner(model, "mse", inner_lr=0.01, inner_steps=5)  # any built Keras model
learner.fit(episodes, iterations=10_000)
adapted = learner.adapt(support_x, support_y)  # a Keras model again
"""

import importlib
import os
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# TensorFlow's C++ start-up messages (no GPU, oneDNN, …) are read from these variables at import.
# Set TF_CPP_MIN_LOG_LEVEL=0 to see them again, for instance when a GPU is not found.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Keras' too; a backend that was asked for otherwise is rejected by `maml.process.silent_start`.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

# Where the library's names live. They are imported when they are first used, because TensorFlow takes
# seconds to start.
_HOMES = {
    "BatchNorm": "networks.layers",
    "Episode": "episodes",
    "EpisodeSource": "episodes",
    "EpisodeSpec": "episodes",
    "Failure": "errors",
    "LayerNorm": "networks.layers",
    "LayerNormalization": "networks.layers",
    "Learner": "learners.library",
    "MovingBatchNorm": "networks.layers",
    "UserError": "errors",
    "conv4": "networks.conv4",
    "cross_entropy": "learners.losses",
    "difference": "learners.comparison",
    "evaluate": "learners.comparison",
    "load_pretrained": "runs.load",
    "load_run": "runs.load",
    "mean_squared_error": "learners.losses",
    "mlp": "networks.mlp",
    "resnet12": "networks.resnet12",
    "plain": "networks.export",
    "series": "training.evaluate",
}
__all__ = [*_HOMES]

if TYPE_CHECKING:
    from maml.episodes import Episode as Episode
    from maml.episodes import EpisodeSource as EpisodeSource
    from maml.episodes import EpisodeSpec as EpisodeSpec
    from maml.errors import Failure as Failure
    from maml.errors import UserError as UserError
    from maml.learners.comparison import difference as difference
    from maml.learners.comparison import evaluate as evaluate
    from maml.learners.library import Learner as Learner
    from maml.learners.losses import cross_entropy as cross_entropy
    from maml.learners.losses import mean_squared_error as mean_squared_error
    from maml.networks.conv4 import conv4 as conv4
    from maml.networks.export import plain as plain
    from maml.networks.layers import BatchNorm as BatchNorm
    from maml.networks.layers import LayerNorm as LayerNorm
    from maml.networks.layers import LayerNormalization as LayerNormalization
    from maml.networks.layers import MovingBatchNorm as MovingBatchNorm
    from maml.networks.mlp import mlp as mlp
    from maml.networks.resnet12 import resnet12 as resnet12
    from maml.runs.load import load_pretrained as load_pretrained
    from maml.runs.load import load_run as load_run
    from maml.training.evaluate import series as series


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from maml.process import silent_start

    with silent_start():
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

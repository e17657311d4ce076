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

# Where the library's names live. They are imported when they are first used, because TensorFlow takes
# seconds to start.
_HOMES = {
    "BatchNorm": "networks",
    "Episode": "episodes",
    "EpisodeSource": "episodes",
    "EpisodeSpec": "episodes",
    "Failure": "errors",
    "LayerNorm": "networks",
    "LayerNormalization": "networks",
    "Learner": "library",
    "Maml": "learner",
    "UserError": "errors",
    "conv4": "networks",
    "cross_entropy": "learner",
    "load_run": "trained",
    "mean_squared_error": "learner",
    "mlp": "networks",
}
__all__ = [*_HOMES]

if TYPE_CHECKING:
    from maml.episodes import Episode as Episode
    from maml.episodes import EpisodeSource as EpisodeSource
    from maml.episodes import EpisodeSpec as EpisodeSpec
    from maml.errors import Failure as Failure
    from maml.errors import UserError as UserError
    from maml.learner import Maml as Maml
    from maml.learner import cross_entropy as cross_entropy
    from maml.learner import mean_squared_error as mean_squared_error
    from maml.library import Learner as Learner
    from maml.networks import BatchNorm as BatchNorm
    from maml.networks import LayerNorm as LayerNorm
    from maml.networks import LayerNormalization as LayerNormalization
    from maml.networks import conv4 as conv4
    from maml.networks import mlp as mlp
    from maml.trained import load_run as load_run


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from maml.output import silent_start

    with silent_start():
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

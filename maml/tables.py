"""Learners, networks and data sets by name. Nothing heavy is imported: `maml --help` reads these tables.

Adding one is one file and one row here, or no row: `module:attribute` in the place of a name takes it from
anywhere on the Python path.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from maml.errors import UserError


class Learner(NamedTuple):
    """A row of `LEARNERS`: where the `Algorithm` is, and what it is in a line."""

    home: str
    about: str


class Network(NamedTuple):
    """A row of `NETWORKS`: the function of (input_shape, outputs, …) that builds it, and a line on it.

    With `outputs=None` it builds the backbone alone, from inputs to an embedding [n, features].
    """

    home: str
    about: str


class Dataset(NamedTuple):
    """A row of `DATASETS`: all that the rest of the program knows of a data set.

    Fields:
        home: the function that loads it.
        about: a line on it.
        needs: where it is looked for.
        side, channels: of its images; None where there are none.
        scale: inputs are divided by this.
        flatten: the head of a convolutional network sees the flattened map, not its spatial mean.
        clip: bound on every entry of the meta-gradient.
        paper: the paper's values of flags, of (way, shot).
    """

    home: str
    about: str
    needs: str = ""
    side: int | None = None
    channels: int | None = None
    scale: float = 1.0
    flatten: bool = False
    clip: float | None = None
    paper: Callable[[int, int], dict[str, object]] = lambda way, shot: {}


LEARNERS: Mapping[str, Learner] = {
    "maml": Learner("maml.learners.maml:Maml", "second-order MAML (Finn et al. 2017)"),
    "fomaml": Learner("maml.learners.fomaml:Fomaml", "first-order MAML (Finn et al. 2017)"),
    "anil": Learner("maml.learners.anil:Anil", "MAML of the head alone (Raghu et al. 2020)"),
    "boil": Learner("maml.learners.anil:Boil", "MAML of all but the head (Oh et al. 2021)"),
    "meta_sgd": Learner("maml.learners.meta_sgd:MetaSgd", "MAML with learned step sizes (Li et al. 2017)"),
    "maml_plus_plus": Learner("maml.learners.maml_plus_plus:MamlPlusPlus", "MAML++ (Antoniou et al. 2019)"),
    "reptile": Learner("maml.learners.reptile:Reptile", "Reptile and FOML (Nichol et al. 2018)"),
    "leo": Learner("maml.learners.leo:Leo", "latent embedding optimization (Rusu et al. 2019)"),
    "prototypical": Learner("maml.learners.prototypical:Prototypical", "prototypes (Snell et al. 2017)"),
}

NETWORKS: Mapping[str, Network] = {
    "conv4": Network("maml.networks.conv4:conv4", "four convolutions (Vinyals et al. 2016)"),
    "mlp": Network("maml.networks.mlp:mlp", "fully connected"),
    "leo": Network("maml.networks.leo:leo", "encoder, relation network and decoder of the learner leo"),
}


def load(home: str) -> object:
    """What `module:attribute` names.

    Raises:
        UserError: if there is no such module or attribute.
    """
    module, _, attribute = home.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"expected module:attribute on the Python path, got {home} ({error}). Check the name, or set "
            f"PYTHONPATH."
        ) from error

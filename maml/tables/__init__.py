"""Learners, networks and data sets by name. Nothing heavy is imported: `maml --help` reads these tables.

Adding one is one file and one row, or no row: `module:attribute` in the place of a name takes it from
anywhere on the Python path.
"""

from maml.tables.datasets import DATASETS as DATASETS
from maml.tables.datasets import Dataset as Dataset
from maml.tables.learners import LEARNERS as LEARNERS
from maml.tables.learners import Learner as Learner
from maml.tables.lookup import OPTIMIZERS as OPTIMIZERS
from maml.tables.lookup import accepted as accepted
from maml.tables.lookup import dataset as dataset
from maml.tables.lookup import declared as declared
from maml.tables.lookup import is_name as is_name
from maml.tables.lookup import learner as learner
from maml.tables.lookup import load as load
from maml.tables.lookup import network as network
from maml.tables.networks import NETWORKS as NETWORKS
from maml.tables.networks import Network as Network
from maml.tables.pretrained import shipped as shipped
from maml.tables.pretrained import weights as weights

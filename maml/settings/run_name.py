"""Names of run folders: the original's, extended where its omissions would make runs collide."""

import hashlib
import pathlib
import re
from typing import TYPE_CHECKING

from maml import tables
from maml.settings.own import DEFAULT_LEARNER, changed
from maml.settings.parsing import LONGEST_PART

if TYPE_CHECKING:
    from maml.settings.settings import Settings

NORMS = {"batch_norm": "batchnorm", "layer_norm": "layernorm", "None": "nonorm"}
OF_TEST = ("test_", "eval_")  # beginnings of the names of a learner's flags that training does not read
RANDOM = "random"  # in the place of weights to begin with


def made_name(settings: "Settings") -> str:
    """The name of the folder of a run whose flags name none."""
    name = (
        f"cls_{settings.num_classes}.mbs_{settings.meta_batch_size}.ubs_{settings.train_update_batch_size}"
        f".numstep{settings.num_updates}.updatelr{settings.train_update_lr}"
    )
    name += f"hidden{settings.num_filters}" if settings.num_filters != 64 else ""
    name += "maxpool" if settings.max_pool else ""
    name += "stopgrad" if settings.stop_grad else ""
    name += (settings.baseline or "") + NORMS[settings.norm]
    name += "".join(f".{part}" for part in _parts(settings) if part)
    own = "".join(f".{part}" for part in _own_parts(settings))
    if len(name) + len(own) > LONGEST_PART:  # of many flags of the learner's own
        own = f".own-{hashlib.sha256(own.encode()).hexdigest()[:8]}"
    return name + own


def _parts(settings: "Settings") -> list[str | None]:
    """Parts that the original's name leaves out; None where it is as there."""
    data, start = settings.dataset, None
    if settings.init_from == RANDOM:
        start = "from-random"
    elif settings.init_from in tables.shipped():
        start = f"from-{settings.init_from}"
    elif settings.init_from:
        where = str(pathlib.Path(settings.init_from).resolve())
        start = f"from-{hashlib.sha256(where.encode()).hexdigest()[:8]}"
    if data.is_data_dir:  # it is its own name
        source = f"{settings.datasource}-{pathlib.Path(settings.data_dir).resolve().stem}"
    else:
        source = settings.datasource if data.in_run_name else None
    network = "noconv" if settings.network == "mlp" else settings.network
    of_adam = settings.meta_optimizer in (None, "adam" if settings.learner == DEFAULT_LEARNER else None)
    joint = settings.pretrain_iterations and not settings.baseline
    return [
        None if settings.learner == DEFAULT_LEARNER else _part(settings.learner),
        None if settings.network == data.network else _part(network),
        None if of_adam else _part(settings.meta_optimizer),
        None if settings.meta_schedule == "constant" else settings.meta_schedule,
        f"metalr{settings.meta_lr}" if settings.meta_lr != 0.001 else None,
        f"query{settings.num_query}" if settings.num_query != settings.train_update_batch_size else None,
        f"pretrain{settings.pretrain_iterations}" if joint else None,
        source and _part(source),
        f"split-{_part(pathlib.Path(settings.class_split).resolve().stem)}" if settings.class_split else None,
        "bfloat16" if settings.mixed_precision else None,
        f"img{settings.img_size}" if settings.img_size != data.side else None,
        start,
        f"seed{settings.seed}" if settings.seed else None,
    ]


def _own_parts(settings: "Settings") -> list[str]:
    """The learner's own flags that are not the paper's, but for those of testing alone."""
    return [
        f"{name}{_part(str(value))}"
        for name, value in changed(settings).items()
        if not name.startswith(OF_TEST)
    ]


def _part(text: str) -> str:
    """A text as a part of a file name; the names of classes and paths have other characters."""
    return re.sub(r"[^a-zA-Z0-9_-]+", "-", text)

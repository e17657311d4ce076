"""The flags of `main.py`, topic by topic, as `--helpshort` shows them.

Names, types and defaults are those of the original `cbfinn/maml` where it has the flag. The first paragraph
of a help text, its defaults in brackets, is what is shown there; all of it is in `--helpfull`.
"""

import functools
import os
from collections.abc import Callable, Mapping

from absl import flags

from maml import tables
from maml.settings import parsing

NORMS = ("batch_norm", "layer_norm", "None")
CHECKPOINTS = ("newest", "best")
ON_NAN = ("stop", "skip")
HOME = "maml.settings"  # the module whose flags they are


class _Define:
    """absl's definitions, into one set of flags."""

    def __init__(self, values: flags.FlagValues):
        self.string, self.integer, self.number, self.boolean, self.enum = (
            functools.partial(define, flag_values=values, module_name=HOME)
            for define in (
                flags.DEFINE_string,
                flags.DEFINE_integer,
                flags.DEFINE_float,
                flags.DEFINE_bool,
                flags.DEFINE_enum,
            )
        )
        self.name = functools.partial(_define_name, values)


def _define_name(
    values: flags.FlagValues, name: str, default: str | None, table: Mapping[str, object], text: str
) -> None:
    """A flag of a name in one of `maml.tables`, or of module:attribute."""
    shown = f"<NAME|module:function>: {text}: {', '.join(table)}"
    flags.DEFINE(parsing.NameParser(table), name, default, shown, values, module_name=HOME)


def _task_and_data(define: _Define) -> None:
    define.name("datasource", "sinusoid", tables.DATASETS, "data set the tasks T_i ~ p(T) are drawn from")
    define.integer("num_classes", 5, "N, the ways of a classification task", 2)
    define.integer("update_batch_size", 5, "K, support examples per class (inner loop)", 1)
    define.integer("num_query", None, "Q, query examples per class in training [K]", 1)
    define.enum("baseline", None, ["oracle"], "oracle: the network is told the task (sinusoid only)")
    define.string(
        "data_dir",
        os.environ.get("MAML_DATA_DIR") or "data",
        "folder of the data sets, or of your own images (also .tar, .zip)\n\n"
        "It holds omniglot/, say (environment: MAML_DATA_DIR). For --datasource=folder it is the folder, "
        ".tar or .zip of {train,val,test}/<class>/* or <class>/* itself, where <class> may be several "
        "folders deep.",
    )
    define.integer("img_size", None, "side of the images, pixels [Omniglot 28, photographs 84]", 16, 4096)
    define.boolean("skip_bad_images", False, "leave out images that cannot be read instead of stopping")
    define.string(
        "class_split",
        None,
        "lists of the classes of each split [by --seed]\n\n"
        'For tfds:NAME and folder: a JSON file of {"train": [class, …], "val": …, "test": …}, or a folder '
        "of train.txt, val.txt and test.txt with a class on every line. Classes in none are left out.",
    )
    define.integer("seed", 0, "of the weights, the class split and the episodes", 0, 2**31)


def _network(define: _Define) -> None:
    define.name("network", None, tables.NETWORKS, "architecture [of the data set's paper]")
    define.boolean("conv", True, "convolutional; --noconv: fully connected (images only)")
    define.integer("num_filters", 64, "filters per convolution [paper's]", 1)
    define.boolean("max_pool", False, "2×2 max-pooling instead of stride 2 [paper's]")
    define.enum("norm", "batch_norm", NORMS, "normalisation [paper's]", case_sensitive=False)
    define.string(
        "init_from",
        None,
        "weights to begin with, of a run or a checkpoint; or 'random'\n\n"
        "The newest checkpoint of a run folder, or one by its name, the original's too; 'random' for fresh "
        "ones, to test them with --metatrain_iterations=0.",
    )


def _inner_loop(define: _Define) -> None:
    define.number(
        "update_lr",
        1e-3,
        "α, the inner step size [paper's, sinusoid 0.001]\n\n"
        "It acts on the cross entropy summed over examples and divided by K (N times the mean), or on the "
        "mean squared error.",
        0.0,
    )
    define.integer("num_updates", 1, "inner gradient steps in training [paper's]", 1)
    define.boolean("stop_grad", False, "first-order MAML: no second derivatives (section 5.2)")


def _outer_loop(define: _Define) -> None:
    define.integer(
        "metatrain_iterations", 15000, "meta-training iterations (paper: 60000, sinusoid 70000)", 0
    )
    define.integer("pretrain_iterations", 0, "iterations of joint training without adaptation before", 0)
    define.integer("meta_batch_size", 25, "tasks per meta-update [paper's]", 1)
    define.number("meta_lr", 0.001, "β, the meta step size (Adam)", 0.0)
    define.enum(
        "on_nan",
        "stop",
        ON_NAN,
        "if a loss or the meta-gradient is not finite: stop and say where, or skip the update",
    )


def _test_protocol(define: _Define) -> None:
    define.boolean("train", True, "train, then test; --notrain: only test")
    define.boolean("test_set", False, "test on the meta-test classes instead of the meta-validation classes")
    define.integer("num_test_tasks", 600, "tasks the test averages over", 2)
    define.integer("test_num_updates", 10, "inner gradient steps at validation and test", 1)
    define.integer("test_num_query", None, "Q at validation and test [K]", 1)
    define.boolean(
        "transductive",
        True,
        "batch norm of the query set by its own statistics, not the support set's\n\n"
        "At validation and test. By its own, as in the original; --notransductive: by the support set's.",
    )
    define.enum(
        "checkpoint",
        "newest",
        CHECKPOINTS,
        "which checkpoint to test; best: at meta-validation\n\n"
        "That is after --num_updates steps, as the paper's author chose.",
    )
    define.integer("test_iter", -1, "iteration of the checkpoint to test, -1 for the newest", -1)
    define.integer("train_update_batch_size", -1, "K the tested run was trained with, if it differs", -1)
    define.number("train_update_lr", -1.0, "α the tested run was trained with, if it differs")


def _run_folder(define: _Define) -> None:
    define.string("logdir", "/tmp/data", "folder that holds the run folders")
    define.boolean("resume", True, "go on from the newest checkpoint of this run, if there is one")
    define.integer("save_interval", 1000, "iterations between checkpoints (and validations)", 1)
    define.integer("keep", None, "newest checkpoints to keep, beside the best [all]", 2)
    define.boolean("log", True, "write TensorBoard event files")


def _speed_and_devices(define: _Define) -> None:
    define.integer(
        "tasks_per_chunk",
        None,
        "tasks held in memory at once; fewer save memory [chosen]\n\n"
        "The meta-gradient is summed over parts of so many tasks, the same to rounding; for a meta-batch "
        "that does not fit. Each may take longer. Chosen: one per core with convolutions, else the "
        "meta-batch.",
        1,
    )
    define.boolean(
        "jit_compile",
        None,
        "compile the training with XLA: faster, slow to start [chosen]\n\n"
        "Chosen: only for networks without convolutions.",
    )
    define.boolean(
        "mixed_precision",
        False,
        "hidden layers compute in bfloat16, where hardware is fast in it\n\n"
        "Weights, gradients, norms, the head and the losses stay float32; the run gets a folder of its own.",
    )
    define.boolean(
        "deterministic",
        False,
        "the same result bit for bit on a GPU too, at some cost in speed\n\nOn a CPU it is so anyway.",
    )


TOPICS: dict[str, Callable[[_Define], None]] = {
    "Task and data": _task_and_data,
    "Network": _network,
    "Inner loop (Algorithm 1, lines 5 and 6)": _inner_loop,
    "Outer loop (lines 3 and 8)": _outer_loop,
    "Test protocol": _test_protocol,
    "Run folder": _run_folder,
    "Speed and devices": _speed_and_devices,
}


def define(values: flags.FlagValues) -> None:
    """Defines all flags of `main.py`, with refusals that say what is needed and what to do."""
    for group in TOPICS.values():
        group(_Define(values))
    parsing.explain(values.flags_by_module_dict()[HOME])


def names(topic: str) -> list[str]:
    """The flags under a heading, in order."""
    alone = flags.FlagValues()
    TOPICS[topic](_Define(alone))
    return [flag.name for flag in alone.flags_by_module_dict()[HOME]]

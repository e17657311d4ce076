"""The commands of `maml`: what each is for, its own flags, and where it is. Nothing heavy is imported."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from maml.settings.own import Flag
from maml.tables import DATASETS

PREPARABLE = tuple(name for name, row in DATASETS.items() if row.channels)


class Command(NamedTuple):
    """A row of `COMMANDS`.

    Fields:
        about: a line on it, for the list of commands.
        usage: the first paragraphs of its help; indented lines stay as they are.
        work: what does it, or "module:function" to import after the flags are parsed. It is given the
            operands or, where there is a `check`, what that returns.
        check: "module:function" of the operands, which raises UserError for mistakes and imports nothing
            that takes seconds.
        flags: of its own.
        shows: names of those flags of a run that matter to it; None: all do.
        defaults: {flag of a run: the value that this command takes where it is not given}.
        otherwise: where the values of the other flags come from that are not given.
        operands: what the arguments that are no flags are; "": there are none.
        any_number: of operands, from none; else just one.
        interrupted: printed after Ctrl-C or SIGTERM, unless the exception says more.
    """

    about: str
    usage: str
    work: str | Callable
    check: str = ""
    flags: tuple[Flag, ...] = ()
    shows: tuple[str, ...] | None = None
    defaults: Mapping[str, object] = {}
    otherwise: str = ""
    operands: str = ""
    any_number: bool = False
    interrupted: str = "interrupted"


RESUMABLE = "stopped; the same command resumes from the last checkpoint"
REPEATABLE = "interrupted; the same command resumes where it stopped"

TRAIN = "train"
COMMANDS: Mapping[str, Command] = {
    TRAIN: Command(
        about="trains and tests; so does maml without a command",
        usage="""usage: maml [COMMAND] [--flag=value …]

    maml
        trains on sinusoids, and tests
    maml --datasource=omniglot --num_classes=5 --update_batch_size=1
        the same for 5-way 1-shot Omniglot

In brackets: the default; "paper's" is the paper's value for the data set, as far as it gives one.
""",
        check="maml.commands.arguments:train",
        work="maml.commands.train:train",
        interrupted=RESUMABLE,
    ),
    "adapt": Command(
        about="adapts a trained network to your own images, and classifies others",
        usage="""Classifies your own images: `maml adapt --support=DIR --query=DIR --weights=NAME`.

`--support` holds a few images of each class, in a folder of the class's name; `--query` those to be
classified. A trained network is adapted to the first and predicts the second: one that comes along
(`--weights`, see `maml list weights`), a run folder of yours (`--run`), or a checkpoint, such as the one the
paper's authors published (`--init_from`).
""",
        check="maml.commands.photographs:read",
        work="maml.commands.adapt:classify",
        flags=(
            Flag("support", None, "folder (.tar, .zip) of a folder of a few photographs for each class"),
            Flag(
                "query",
                None,
                "photograph to be classified, or a folder (.tar, .zip) of them, or of a folder for each of "
                "the classes, if these are known: then the accuracy is shown",
            ),
            Flag("weights", "", "trained weights that come along, by name"),
            Flag("run", None, "run folder of the trained network"),
            Flag(
                "prototypes",
                False,
                "classify by the nearest class mean of the network's features, without steps: any number of "
                "classes [a metric learner's run does so anyway]",
            ),
            Flag("out", None, "folder for predictions.csv, predictions.png and steps.png [adapted-QUERY]"),
            Flag("save", None, "the adapted classifier as a Keras model, FILE.keras"),
            Flag("export", None, "the adapted classifier as a TensorFlow SavedModel, a new folder"),
        ),
        shows=(
            "skip_bad_images",
            "init_from",
            "update_lr",
            "test_num_updates",
            "transductive",
            "checkpoint",
            "test_iter",
        ),
        # Nobody knows what there is in a query set. With the published weights, 5-way 5-shot, 100 tasks: over
        # the query set 60.9 % where it has all classes in equal parts, 27.1 % where it has one, 22.0 % for a
        # single photograph; by the support set's statistics 60.2 %, 61.8 %, 60.0 %
        # (`python -m benchmarks.query_sets 5`).
        defaults={
            "transductive": False,
            "skip_bad_images": False,
            "init_from": None,
            "checkpoint": "newest",
            "test_iter": -1,
        },
        otherwise="the run's, or the paper's",
    ),
    "prepare": Command(
        about="reads and decodes a data set ahead of training",
        usage="""Prepares a data set ahead of training: `maml prepare miniimagenet --data_dir=DIR`.

Reads, checks and decodes its images once, into the cache that every later run opens in a moment.
Training does the same where it is needed; this does it without a network, on any machine.
""",
        check="maml.commands.arguments:prepare",
        work="maml.commands.prepare:prepare",
        shows=("data_dir", "img_size", "skip_bad_images", "seed"),
        operands=f"data set ({', '.join(PREPARABLE)})",
    ),
    "protocol": Command(
        about="tests one run under every protocol",
        usage="""Tests one trained model under every protocol: `maml protocol RUN --test_set`.

The spread between published re-runs of MAML is protocol. This measures one run under all of them side by
side: the newest and the best validated checkpoint, 1, 5, 15 and the run's own query examples per class, batch
norm over the query set (transductive) and by the support set's statistics, few steps and many. The settings
are those of the run folder, then those of the command line; every figure is the one that
`maml --train=False` gives with the same switches.
""",
        check="maml.commands.arguments:protocol",
        work="maml.commands.protocol:measure",
        shows=("test_set", "num_test_tasks", "test_num_updates", "test_num_query"),
        otherwise="the run's",
        operands="run folder",
    ),
    "reproduce": Command(
        about="runs the papers' experiments; a page of results",
        usage="""Runs the papers' experiments: `maml reproduce [CELL|LEARNER …]`, MAML's or those named.

A cell is a flagfile in `flags/`; a learner's name stands for all of its. Each is trained if it is missing,
resumed if it is unfinished, and tested; a page, a table and figures are written to `results/` after each.
Flags of a run given here hold for every cell (`--num_test_tasks=6000`, `--logdir=…`).
""",
        work="maml.commands.reproduce:reproduce_asked",
        flags=(
            Flag(
                "list",
                False,
                "list the cells: data, the papers' figures, hours on two cores, what is done; run nothing",
            ),
            Flag("scale", 1.0, "runs every cell for this part of its iterations"),
            Flag("seeds", 1, "runs of each cell, with seeds 0, 1, …", lower=1),
            Flag("results_dir", None, "folder for RESULTS.md, results.csv and the figures [results]"),
        ),
        otherwise="the cell's",
        operands="cells or learners",
        any_number=True,
        interrupted=REPEATABLE,
    ),
    "show_episodes": Command(
        about="draws episodes as the network is given them",
        usage="""Draws episodes: `maml show_episodes --datasource=omniglot --out=episodes.png`.

Every flag of training counts: the picture shows what a run with the same flags is given.
""",
        check="maml.commands.arguments:show_episodes",
        work="maml.commands.show_episodes:show",
        flags=(
            Flag("out", None, "the PNG file to write [episodes.png]"),
            Flag("episodes", 3, "episodes to draw of each split", lower=1),
        ),
        shows=(
            "datasource",
            "num_classes",
            "update_batch_size",
            "num_query",
            "baseline",
            "data_dir",
            "img_size",
            "skip_bad_images",
            "seed",
        ),
    ),
    "sweep": Command(
        about="a run for every value of a grid of flags",
        usage="""Makes one table and one figure from many runs: `maml sweep --grid="num_classes=2,3,5" …`.

Takes the flags of a run, and a grid: flags with several values each. Every combination is trained and tested
like any other run, in its own run folder, unless that is done already. The sweeps in `flags/sweeps/` are
flagfiles that hold the grid too.
""",
        check="maml.commands.arguments:sweep",
        work="maml.commands.sweep:run_grid",
        flags=(
            Flag(
                "grid",
                "",
                'flags of a run with their values, the first the x axis: --grid="num_classes=2,3 seed=0,1"',
            ),
            Flag("name", "", "of the sweep [the grid's flags]"),
            Flag("out", None, "the files without their endings [results/sweeps/NAME]"),
        ),
        interrupted=REPEATABLE,
    ),
    "embed": Command(
        about="embeds the images of a run's data set, for learners on embeddings",
        usage="""Embeds images: `maml embed RUN --out=embeddings.npz`, or NAME of `maml list weights`.

Every image of the run's data set goes through its trained network without the head. The file holds the
embeddings,
their classes and splits, as `--datasource=embeddings --data_dir=FILE.npz` takes them for `--learner=leo`.
""",
        check="maml.commands.arguments:embed",
        work="maml.commands.embed:embed",
        flags=(Flag("out", None, "the .npz file to write [embeddings.npz]"),),
        shows=("data_dir", "checkpoint", "test_iter"),
        otherwise="the run's",
        operands="run folder, or name of `maml list weights`",
    ),
    "compare": Command(
        about="trains several learners and tests them on the same episodes; one table",
        usage="""Compares learners: `maml compare --learners=maml,fomaml,reptile --datasource=omniglot`.

Each is trained with the flags given and, for the others, its own paper's values, unless that is done already.
Then all are tested on the same episodes: those of the flags or else of the first learner's paper. The table
has the differences to the first, paired by task, with 95 % intervals; iterations, weights, time per
iteration, peak memory, and the papers' figures. On the sinusoid a figure shows all on the same tasks.
""",
        check="maml.commands.arguments:compare",
        work="maml.commands.compare:compare",
        flags=(
            Flag("learners", "maml,fomaml,anil,meta_sgd", "names from `maml list learners`, with commas"),
            Flag("name", "", "of the comparison [data set and task]"),
            Flag("out", None, "folder for NAME.md and NAME.csv [results/compare]"),
        ),
        interrupted=REPEATABLE,
    ),
    "list": Command(
        about="lists learners, networks, data sets, weights, cells and flagfiles, and what each needs",
        usage="""Lists what there is by name: `maml list`, or one table, as `maml list learners`.""",
        work="maml.commands.list:show",
        shows=(),
        operands="tables",
        any_number=True,
    ),
}

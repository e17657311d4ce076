"""The command line: `python main.py …` and, installed, `maml …`."""

import importlib
import shlex
import sys
from typing import TYPE_CHECKING

from maml.commands import runner
from maml.errors import UserError
from maml.settings.help import program
from maml.settings.settings import RANDOM, Settings, resolve

if TYPE_CHECKING:
    import keras

    from maml.episodes import EpisodeSource
    from maml.learners.base import Algorithm
    from maml.runs.folder import Run
    from maml.training.devices import Machine


USAGE = """usage: {program} [COMMAND] [--flag=value …]

    {program}
        trains on sinusoids, and tests
    {program} --datasource=omniglot --num_classes=5 --update_batch_size=1
        the same for 5-way 1-shot Omniglot

In brackets: the default; "paper's" is the paper's value for the data set, as far as it gives one.
"""
COMMANDS = {
    "adapt": "adapts a trained network to your own images, and names others",
    "prepare": "reads and decodes a data set ahead of training",
    "protocol": "tests one run under every protocol",
    "reproduce": "runs the paper's experiments; a page of results",
    "show_episodes": "draws episodes as the network is given them",
    "sweep": "a run for every value of a grid of flags",
}
RESUMABLE = "stopped; the same command goes on from the last checkpoint"


def run() -> None:
    """Entry point: trains and tests as the flags say, or hands over to the command named first, and exits."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        del sys.argv[1]
        importlib.import_module(f"maml.commands.{name}").run()
    else:
        usage = USAGE.format(program=program())
        runner.run(_work, interrupted=RESUMABLE, usage=usage, commands=COMMANDS)


def _work(_: list[str]) -> None:
    settings, from_paper = resolve()
    # TensorFlow takes seconds to import: only once the flags are known to be good.
    with runner.silent_start():
        from maml.training import devices

    machine = devices.use(settings)
    with machine.quiet_unless_chief():
        print(_header(settings, from_paper, machine.description), flush=True)
        _train_and_test(settings, machine)


def _train_and_test(settings: Settings, machine: "Machine") -> None:
    with runner.silent_start():
        import keras

    from maml.reports import tensorboard
    from maml.runs import build
    from maml.runs.data import first_episode, load_data
    from maml.runs.folder import Run
    from maml.runs.train import train

    keras.utils.set_random_seed(settings.seed)
    data = load_data(settings)
    try:
        tested = first_episode(data, build.test_spec(settings), settings.split)
    except UserError as error:
        other = "" if settings.test_set else " Or test on the meta-test classes: --test_set."
        raise UserError(f"{error}{other}") from error
    with machine.scope():
        network = build.build_network(settings, tested.support_x.shape[2:])
        phases = build.build_training(settings, network, machine.strategy)
    print(_line("network", _described(settings, network)), flush=True)
    folder = Run(settings, phases, chief=machine.chief)
    if settings.train:
        if settings.init_from and settings.init_from != RANDOM:
            folder.begin_from(network)
        folder.begin(first_episode(data, build.train_spec(settings), "train"))
        machine.check_together(folder.iteration)
        if int(folder.iteration):
            print(f"resumed from iteration {int(folder.iteration)} of {settings.iterations}", flush=True)
        if machine.chief:
            tensorboard.begin(folder, data, settings, machine.description)
        watcher = tensorboard.Watcher(folder, data, phases[-1].outer.algorithm)
        train(settings, phases, data, folder, watcher)
        folder.end()
    if machine.chief:
        if not settings.train or settings.checkpoint == "best":
            folder.restore()
        _test(settings, phases[-1].outer.algorithm, data, folder, machine.description)


def _test(
    settings: Settings, learner: "Algorithm", data: "EpisodeSource", folder: "Run", device: str
) -> None:
    from maml.reports import sinusoid_fits, tensorboard, test_table
    from maml.runs import build, results
    from maml.training import evaluate

    iteration, spec = int(folder.iteration), build.test_spec(settings)
    print(
        f"testing iteration {iteration} on {settings.num_test_tasks} tasks, "
        f"{settings.test_num_updates} steps each",
        flush=True,
    )
    result = evaluate.measure_tasks(
        learner,
        data,
        spec,
        settings.split,
        tasks=settings.num_test_tasks,
        steps=settings.test_num_updates,
        transductive=settings.transductive,
        progress=True,
    )
    print(f"\n{test_table.table(result, settings, iteration)}\n")
    with folder.writing("write the results"):
        written = [results.write(settings, result, iteration, device).name, "results.json"]
        if not settings.classification:
            picture = folder.dir / "fits.png"
            sinusoid_fits.sinusoid_fits(picture, learner, data, spec, steps=settings.test_num_updates)
            written.append(picture.name)
    tensorboard.show_tests(folder)
    print("\n".join([f"wrote {', '.join(written)} in {folder.dir}", *_next(settings)]))


def _header(settings: Settings, from_paper: dict[str, object], devices: str) -> str:
    """What runs on what, but for the network, which depends on the data."""
    way = settings.num_classes if settings.classification else 1
    support, query = way * settings.update_batch_size, way * settings.num_query
    steps = settings.num_updates if settings.train else settings.test_num_updates
    order = "first" if settings.stop_grad else "second"
    inner = (
        f"{steps} step{'s' * (steps > 1)} of α = {settings.update_lr:g} on N·K = {support} support examples"
    )
    lines = [
        f"maml: {settings.datasource} {settings.task} on {devices}",
        _line("inner loop", f"{inner}, {order} order" if settings.train else inner),
    ]
    if settings.train:
        joint = f"{settings.pretrain_iterations:,} of joint training, " * bool(settings.pretrain_iterations)
        lines.append(
            _line(
                "outer loop",
                f"{joint}{settings.metatrain_iterations:,} iterations of β = {settings.meta_lr:g} on "
                f"{settings.meta_batch_size} tasks with N·Q = {query} query examples each",
            )
        )
    if from_paper:
        shown = ", ".join(f"{name}={value}" for name, value in from_paper.items())
        lines.append(_line("the paper's", f"{shown}, since not given"))
    return "\n".join([*lines, _line("run folder", str(settings.run_dir))])


def _line(label: str, text: str) -> str:
    return f"{label:<11}  {text}"


def _described(settings: Settings, network: "keras.Model") -> str:
    """The network in words."""
    norm = {"batch_norm": "batch norm", "layer_norm": "layer norm", "None": "no norm"}[settings.norm]
    if settings.network == "conv4":
        smaller = "2×2 max-pooling" if settings.max_pool else "stride 2"
        layers = f"4 convolutions of {settings.num_filters} filters, {smaller}"
    elif settings.network == "mlp":
        layers = f"fully connected, {'-'.join(map(str, settings.dataset.hidden))}"
    else:
        layers = settings.network
    return f"{layers}, {norm}; {network.count_params():,} weights"


def _next(settings: Settings) -> list[str]:
    """What can be done with the run."""
    lines = []
    if settings.classification and not settings.test_set:
        again = shlex.join([f"--flagfile={settings.run_dir / 'flags'}", "--train=False", "--test_set"])
        lines.append(f"on the meta-test classes: {program()} {again}")
    if settings.train and settings.log:
        lines.append(f"curves and pictures: {shlex.join(['tensorboard', f'--logdir={settings.run_dir}'])}")
    return lines

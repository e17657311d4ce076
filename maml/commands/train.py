"""Trains and tests a run."""

import shlex
from collections.abc import Mapping

import keras

from maml import tables
from maml.episodes import EpisodeSource
from maml.errors import UserError
from maml.learners.base import Algorithm
from maml.reports import sinusoid_fits, tensorboard, test_table
from maml.runs import build, results
from maml.runs import train as training
from maml.runs.data import first_episode, load_data
from maml.runs.ensemble import Ensemble, restored
from maml.runs.folder import Run
from maml.runs.weights import begin_from
from maml.settings.own import DEFAULT_LEARNER, changed, trained_on
from maml.settings.settings import RANDOM, Settings
from maml.training import devices
from maml.training.progress import WINDOW


def train(asked: tuple[Settings, dict[str, object]]) -> None:
    """Trains and tests.

    Args:
        asked: the settings, and those of them that the paper gives.
    """
    settings, from_paper = asked
    machine = devices.use(settings)
    with machine.quiet_unless_chief():
        print(_header(settings, from_paper, machine.description), flush=True)
        _train_and_test(settings, machine)


def _train_and_test(settings: Settings, machine: devices.Machine) -> None:
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
            begin_from(network, settings.init_from)
        folder.begin(first_episode(data, build.train_spec(settings), "train"))
        machine.check_together(folder.iteration)
        if int(folder.iteration):
            print(f"resumed from iteration {int(folder.iteration)} of {settings.iterations}", flush=True)
        if machine.chief:
            tensorboard.begin(folder, data, settings, machine.description)
        if settings.iterations > int(folder.iteration):
            print(_line("progress", _legend(phases[-1].outer.algorithm)), flush=True)
        watcher = tensorboard.Watcher(folder, data, phases[-1].outer.algorithm)
        training.train(settings, phases, data, folder, watcher)
        folder.end()
    if machine.chief:
        learner = phases[-1].outer.algorithm
        if not settings.train or settings.checkpoint == "best" or settings.test_ensemble > 1:
            learner = restored(folder, learner, settings)
        _test(settings, learner, data, folder, machine.description)


def _test(
    settings: Settings, learner: Algorithm | Ensemble, data: EpisodeSource, folder: Run, device: str
) -> None:
    iteration = int(folder.iteration)
    steps = f", {settings.tested_steps} steps each" * bool(settings.tested_steps)
    others = f" and {settings.test_ensemble - 1} more" * (settings.test_ensemble > 1)
    print(f"testing iteration {iteration}{others} on {settings.num_test_tasks} tasks{steps}", flush=True)
    result = training.measured(learner, data, settings, progress=True)
    print(f"\n{test_table.table(result, settings, iteration)}\n")
    with folder.writing("write the results"):
        written = [results.write(settings, result, iteration, device).name, "results.json"]
        if not settings.classification:
            picture = folder.dir / "fits.png"
            fitted = sinusoid_fits.Trained(learner, data, settings.tested_steps)
            sinusoid_fits.sinusoid_fits(picture, {settings.learner: fitted}, build.test_spec(settings))
            written.append(picture.name)
    tensorboard.show_tests(folder)
    print("\n".join([f"wrote {', '.join(written)} in {folder.dir}", *_next(settings)]))


def _header(settings: Settings, from_paper: dict[str, object], devices: str) -> str:
    """The header of a run, but for the network, which depends on the data."""
    support = settings.update_batch_size * (settings.num_classes if settings.classification else 1)
    query = settings.num_query * (trained_on(settings)[0] if settings.classification else 1)
    tasks = "1 task" if settings.meta_batch_size == 1 else f"{settings.meta_batch_size} tasks"
    steps = settings.trained_steps if settings.train else settings.tested_steps
    lines = [f"{settings.learner}: {settings.datasource} {settings.task} on {devices}"]
    if steps:
        rate = "" if settings.inner_lr is None else f" of α = {settings.inner_lr:g}"
        inner = f"{steps} step{'s' * (steps > 1)}{rate} on N·K = {support} support examples"
        if settings.train and settings.learner == DEFAULT_LEARNER:
            inner += f", {settings.method}"
        lines.append(_line("inner loop", inner))
    if settings.own and (settings.learner != DEFAULT_LEARNER or changed(settings)):
        lines.append(_line("learner", _values(settings.own)))
    if settings.train:
        joint = f"{settings.pretrain_iterations:,} of joint training, " * bool(settings.pretrain_iterations)
        lines.append(
            _line(
                "outer loop",
                f"{joint}{settings.metatrain_iterations:,} iterations{_outer(settings)} on "
                f"{tasks} with N·Q = {query} query examples each",
            )
        )
    if from_paper:
        unread = tables.learner(settings.learner).instead
        shown = {name: value for name, value in from_paper.items() if name not in unread}
        lines.append(_line("defaults", f"{_values(shown)} (paper)"))
    return "\n".join([*lines, _line("run folder", str(settings.run_dir))])


def _legend(learner: Algorithm) -> str:
    """The losses of the progress line in words."""
    measured = learner.measure_specs()
    if "query_loss" not in measured:
        losses = "support set before the first inner step → before the last"
    elif "support_loss" in measured:
        losses = "support set before adaptation → query set after it"
    else:
        losses = "query set"
    return f"loss per example, {losses}; means over {WINDOW} iterations"


def _values(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _outer(settings: Settings) -> str:
    """β, and optimizer and schedule where they are not Adam and constant."""
    if settings.meta_optimizer is None and "meta_lr" in tables.learner(settings.learner).instead:
        return ""
    schedule = "" if settings.meta_schedule == "constant" else settings.meta_schedule
    named = " ".join(filter(None, [schedule, settings.meta_optimizer]))
    return f" of β = {settings.meta_lr:g}" + ("" if named in ("", "adam") else f" ({named})")


def _line(label: str, text: str) -> str:
    return f"{label:<11}  {text}"


def _described(settings: Settings, network: keras.Model) -> str:
    """The network in words."""
    norm = {"batch_norm": "batch norm", "layer_norm": "layer norm", "None": "no norm"}[settings.network_norm]
    if settings.network in ("conv4", "conv4_torch"):
        smaller = "2×2 max-pooling" if settings.max_pool else "stride 2"
        begin = ", PyTorch's initial values" if settings.network == "conv4_torch" else ""
        layers = f"4 convolutions of {settings.num_filters} filters, {smaller}{begin}"
    elif settings.network == "mlp":
        layers = f"fully connected, {'-'.join(map(str, settings.dataset.hidden))}"
    else:
        layers = settings.network
    return f"{layers}, {norm}; {network.count_params():,} weights"


def _next(settings: Settings) -> list[str]:
    """Commands to continue with."""
    lines = []
    if settings.classification and not settings.test_set:
        again = shlex.join([f"--flagfile={settings.run_dir / 'flags'}", "--train=False", "--test_set"])
        lines.append(f"on the meta-test classes: maml {again}")
    if settings.train and settings.log:
        lines.append(f"curves and pictures: {shlex.join(['tensorboard', f'--logdir={settings.run_dir}'])}")
    return lines

"""The command line: `python main.py …` and, installed, `maml …`."""

from typing import TYPE_CHECKING

from maml import command
from maml.settings import RANDOM, Settings, UserError, resolve

if TYPE_CHECKING:
    from maml.devices import Machine

RESUMABLE = "stopped; the same command goes on from the last checkpoint"


def run() -> None:
    """Entry point: trains and tests as the flags say, and exits."""
    command.run(_work, interrupted=RESUMABLE)


def _work(_: list[str]) -> None:
    settings, from_paper = resolve()
    # TensorFlow takes seconds to import: only once the flags are known to be good.
    with command.silent_start():
        from maml import devices

    machine = devices.use(settings)
    with machine.quiet_unless_chief():
        print(_header(settings, from_paper, machine.description), flush=True)
        _train_and_test(settings, machine)


def _train_and_test(settings: Settings, machine: "Machine") -> None:
    with command.silent_start():
        import keras
    import tensorflow as tf

    from maml import build, dashboard, evaluate, figures, results
    from maml.run import Run
    from maml.train import train

    keras.utils.set_random_seed(settings.seed)
    data = build.load_data(settings)
    spec = build.test_spec(settings)
    try:
        data.check(spec, settings.split)
    except UserError as error:
        other = "" if settings.test_set else " Or test on the meta-test classes: --test_set."
        raise UserError(f"{error}{other}") from error
    one = data.sample(spec, settings.split, tf.zeros(1, tf.int64))
    with machine.scope():
        network = build.build_network(settings, one.support_x.shape[2:])
        learner = build.build_learner(settings, network, machine.strategy)
    folder = Run(settings, learner, chief=machine.chief)
    if settings.train:
        if settings.init_from and settings.init_from != RANDOM:
            folder.begin_from(learner.network)
        data.check(build.train_spec(settings), "train")
        folder.begin(data.sample(build.train_spec(settings), "train", tf.zeros(1, tf.int64)))
        machine.check_together(folder.iteration)
        if int(folder.iteration):
            print(f"resumed from iteration {int(folder.iteration)} of {settings.iterations}", flush=True)
        if machine.chief:
            dashboard.begin(folder, data, settings, machine.description)
        train(settings, learner, data, folder)
        folder.end()
    if not machine.chief:
        return
    if not settings.train or settings.checkpoint == "best":
        folder.restore()

    iteration = int(folder.iteration)
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
    print(evaluate.table(result, settings, iteration))
    with folder.writing("write the results"):
        written = [results.write(settings, result, iteration, machine.description).name, "results.json"]
        if not settings.classification:
            picture = folder.dir / "fits.png"
            figures.sinusoid_fits(picture, learner, data, spec, steps=settings.test_num_updates)
            written.append(picture.name)
    dashboard.show_tests(folder)
    if settings.classification and not settings.test_set:
        print("these are the meta-validation classes; add --train=False --test_set for the meta-test classes")
    print(f"wrote {', '.join(written)} in {folder.dir}")


def _header(settings: Settings, from_paper: dict[str, object], devices: str) -> str:
    way = settings.num_classes if settings.classification else 1
    support, query = way * settings.update_batch_size, way * settings.num_query
    lines = [
        f"maml: {settings.datasource} on {devices}; run folder {settings.run_dir}",
        f"per task: N·K = {support} support and N·Q = {query} query examples; "
        f"{settings.meta_batch_size} tasks per iteration, {settings.iterations} iterations",
    ]
    if from_paper:
        shown = ", ".join(f"{name}={value}" for name, value in from_paper.items())
        lines.append(f"not given, so from the paper: {shown}")
    return "\n".join(lines)

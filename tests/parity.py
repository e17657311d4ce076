"""Parity with the original program: `python -m tests.parity DIR [--case NAME ...]`.

DIR holds `float32/` and `float64/` as written by the original (see DIR/README.md). Each case is
built from its flags and weights through the product's own code path, in float64 and in float32,
and compared in losses, accuracies, logits, raw meta-gradient, and the weights after one and after
three meta-steps. Exit code 1 if anything is out of tolerance, 2 if there is nothing to compare.

Tolerances. Float64: 1e-6, relative, per loss and per variable. Float32, against the float64 truth:
three times how far the original's own float32 was from it, or 1e-4 where the case does not say.
Many-step cases amplify rounding, so this is done without oneDNN, whose convolutions round more
(set TF_ENABLE_ONEDNN_OPTS=1 to see them). Logits and accuracies are recorded in float32 only.

`--vectorize` computes all tasks of a meta-batch at once, the original's cases compiled with XLA;
`--no-vectorize` one by one. A GPU computes without TF32 here, and no case is of mixed precision: both round
more than allowed.

DIR may hold `learners/` too, runs of other learners' programs: see `tests.parity_learners`.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from maml.commands import runner

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
with runner.silent_start():
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)  # a GPU's products of 10 bits
    tf.get_logger().setLevel("ERROR")  # every case is a network of its own, of which TensorFlow would warn

from maml.episodes import Episode
from maml.runs.build import build_network
from maml.runs.original import original_names
from maml.settings.flags import of_settings
from maml.settings.settings import FLAGS, Settings
from tests import parity_learners
from tests.learning import Meta

FLOAT64_TOLERANCE = 1e-6
FLOAT32_TOLERANCE = 1e-4
# Half a dozen roundings of float32: the original's own deviation is sometimes 0 or 1e-10 by luck.
FLOAT32_FLOOR = 1e-6
BATCHES = ("b0", "b1", "b2")


class Deviation(NamedTuple):
    """One quantity: how far it is from the reference, and how far it may be."""

    kind: str
    found: float
    allowed: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return bool(self.found <= self.allowed)


def settings_of(flag_values: dict) -> Settings:
    """The settings of a case: the flags it names, the original's defaults for the others."""
    values = {flag.name: flag.default for flag in of_settings(FLAGS)}
    convolutional = flag_values["datasource"] != "sinusoid" and flag_values.get("conv", True)
    values["network"] = "conv4" if convolutional else "mlp"
    values |= {name: value for name, value in flag_values.items() if name in values}
    values["norm"] = str(values["norm"])
    values["num_query"] = values["test_num_query"] = values["update_batch_size"]
    return Settings(**values)


def episodes_of(arrays: dict, batch: str, settings: Settings, dtype: str) -> Episode:
    """A meta-batch of the case as the learner takes it, [tasks, n, …]."""
    channels = {"omniglot": 1, "miniimagenet": 3}.get(settings.datasource)

    def inputs(part: str) -> np.ndarray:
        x = arrays[f"{batch}/input{part}"]
        if channels is None:
            return x.astype(dtype)
        side = round((x.shape[-1] / channels) ** 0.5)
        return x.reshape(*x.shape[:2], side, side, channels)

    def targets(part: str) -> np.ndarray:
        y = arrays[f"{batch}/label{part}"]
        return y.argmax(-1).astype(np.int32) if channels else y.astype(dtype)

    return Episode(inputs("a"), targets("a"), inputs("b"), targets("b"))


def compute(case: dict, arrays: dict, dtype: str, vectorize: bool | None = None) -> dict[str, np.ndarray]:
    """Everything the fixtures record of a case, computed by our code, under the fixtures' names."""
    settings = dataclasses.replace(settings_of(case["flags"]), vectorize=vectorize)
    batches = [episodes_of(arrays, batch, settings, dtype) for batch in BATCHES]
    network = build_network(settings, batches[0].support_x.shape[2:], dtype)
    names = original_names(network)
    for name, variable in zip(names, network.trainable_variables, strict=True):
        variable.assign(arrays[f"init/{name}"])
    learner = Meta.built(settings, network)
    joint = case["trained_on"].startswith("total_loss1")
    block_step = learner.pretrain_block if joint else learner.metatrain_block
    gradient_of = tf.function(
        learner.joint_gradient if joint else learner.meta_gradient,
        jit_compile=learner.tasks.vectorize,
        autograph=False,
    )
    first = tf.nest.map_structure(tf.constant, batches[0])
    found: dict[str, np.ndarray] = {}

    result = learner.evaluate(first, tf.constant(case["n_losses2"]))
    for measure in result.support:
        kind = {"loss": "total_loss", "accuracy": "total_accuracy"}[measure]
        plural = {"loss": "total_losses", "accuracy": "total_accuracies"}[measure]
        found[f"{kind}1"] = result.support[measure][:, 0].numpy().mean()
        found[f"{plural}2"] = result.query[measure][:, 1:].numpy().mean(0)
    found["outputbs"] = np.moveaxis(result.predictions[:, 1:].numpy(), 1, 0)
    weights = [tf.convert_to_tensor(variable) for variable in network.trainable_variables]
    support = learner.to_floating(first).support_x
    found["outputas"] = np.stack([learner.predict(weights, x).numpy() for x in support])

    gradient, _ = gradient_of(first)
    found |= {f"metagrad/{name}": g.numpy() for name, g in zip(names, gradient, strict=True)}
    block = Episode(*[tf.constant(np.stack(fields)) for fields in zip(*batches, strict=True)])
    for label, begin, end in (("step1", 0, 1), ("step3", 1, 3)):
        block_step(block, tf.constant(begin), tf.constant(end))
        for name, variable in zip(names, network.trainable_variables, strict=True):
            found[f"{label}/{name}"] = variable.numpy()
    return found


def relative(found: np.ndarray, reference: np.ndarray) -> float:
    """The relative L2 distance; absolute where the reference is zero."""
    distance = np.linalg.norm(np.ravel(np.asarray(found, np.float64) - reference))
    size = np.linalg.norm(np.ravel(np.asarray(reference, np.float64)))
    return float(distance / size if size > 0 else distance)


def compare(case: dict, arrays: dict, truth: dict, found: dict, dtype: str) -> Iterator[Deviation]:
    """Every deviation of `found` from the original's float32 (`arrays`) and float64 (`truth`)."""
    limits = Limits(case, arrays, truth, exact=dtype == "float64")
    yield from _losses(case, truth, found, limits)
    yield from _predictions(arrays, found, limits)
    yield from _weights(case, arrays, truth, found, limits)


class Limits:
    """How far a quantity of a case may be from the truth, in float64 (`exact`) or in float32."""

    def __init__(self, case: dict, arrays: dict, truth: dict, *, exact: bool):
        self.exact = exact
        self.own = case.get("f32_vs_f64") or {}
        # How far the original's own float32 had strayed by each step: it may come back by luck, so the
        # largest deviation on the way to a step is what is fair to ask of another float32 run there.
        pairs = zip(arrays["out/total_losses2"], truth["total_losses2"], strict=True)
        self.strayed = np.maximum.accumulate([relative(a, b) for a, b in pairs])

    def of(self, strayed: float | None = None) -> float:
        """The limit where the original's float32 strayed by so much."""
        if self.exact:
            return FLOAT64_TOLERANCE
        return FLOAT32_TOLERANCE if strayed is None else max(3 * strayed, FLOAT32_FLOOR)


def _losses(case: dict, truth: dict, found: dict, limits: Limits) -> Iterator[Deviation]:
    yield Deviation("loss", relative(found["total_loss1"], truth["total_loss1"]), limits.of())
    pairs = zip(found["total_losses2"], truth["total_losses2"], limits.strayed, strict=True)
    for a, b, strayed in pairs:
        limit = limits.of() if limits.exact else max(limits.of(), 3 * strayed)
        yield Deviation("loss", relative(a, b), limit)
    joint = case["trained_on"].startswith("total_loss1")
    trained = case["flags"]["num_updates"] - 1
    own = limits.own.get("total_loss")
    if own is not None and not limits.exact:
        a, b = (v["total_loss1"] if joint else v["total_losses2"][trained] for v in (found, truth))
        fair = own if joint else max(own, limits.strayed[trained])
        yield Deviation("trained loss", relative(a, b), limits.of(fair))


def _predictions(arrays: dict, found: dict, limits: Limits) -> Iterator[Deviation]:
    """Logits and accuracies, which are recorded in float32 alone."""
    logits = [(found["outputas"], arrays["out/outputas"], FLOAT32_TOLERANCE)]
    for a, b in zip(found["outputbs"], arrays["out/outputbs"], strict=True):
        logits.append((a, b, max(FLOAT32_TOLERANCE, 10 * limits.strayed[-1])))
    accuracies = []
    if "out/total_accuracy1" in arrays:
        accuracies = [
            (found["total_accuracy1"], arrays["out/total_accuracy1"]),
            *zip(found["total_accuracies2"], arrays["out/total_accuracies2"], strict=True),
        ]
    for i, (a, b, limit) in enumerate(logits):
        yield Deviation("logits", relative(a, b), limit)
        if accuracies:
            # An example may only fall to the other side where its margin is within the logits' deviation.
            best = np.sort(b, axis=-1)
            unsure = np.mean(best[..., -1] - best[..., -2] <= 2 * np.abs(a - b).max())
            yield Deviation("accuracy", abs(float(accuracies[i][0] - accuracies[i][1])), unsure + 1e-6)


def _weights(case: dict, arrays: dict, truth: dict, found: dict, limits: Limits) -> Iterator[Deviation]:
    """The meta-gradient, and the weights after one and after three meta-steps."""
    dead = set(case["dead_biases"])
    names = [key.removeprefix("metagrad/") for key in truth if key.startswith("metagrad/")]
    alive = [name for name in names if name not in dead]

    def flat(values: dict, prefix: str, minus: str = "") -> np.ndarray:
        parts = [
            values[f"{prefix}/{name}"] - (arrays[f"init/{name}"] if minus else np.float64(0))
            for name in alive
        ]
        return np.concatenate([np.ravel(part) for part in parts])

    for name in dead:
        scale = np.linalg.norm(flat(truth, "metagrad"))
        deviation = float(np.abs(found[f"metagrad/{name}"]).max() / scale)
        yield Deviation("metagrad", deviation, limits.of())
    for kind, given in (
        ("metagrad", limits.own.get("metagrad_rel_l2")),
        ("step1", limits.own.get("step1_update", {}).get("rel_l2")),
        ("step3", limits.own.get("step3_update", {}).get("rel_l2")),
    ):
        if limits.exact:
            for name in alive:
                key = f"{kind}/{name}"
                yield Deviation(kind, relative(found[key], truth[key]), FLOAT64_TOLERANCE)
        else:
            minus = "" if kind == "metagrad" else "init"
            distance = relative(flat(found, kind, minus), flat(truth, kind, minus))
            yield Deviation(kind, distance, limits.of(given))


def check_case(folder: pathlib.Path, name: str, vectorize: bool | None = None) -> tuple[bool, str]:
    """Runs one case; returns whether it passed, and its line of the report."""
    case = json.loads((folder / "float32" / f"{name}.json").read_text())
    arrays = dict(np.load(folder / "float32" / f"{name}.npz"))
    truth = dict(np.load(folder / "float64" / f"{name}.npz"))
    parts, passed = [], True
    for dtype in ("float64", "float32"):
        found = compute(case, arrays, dtype, *([] if vectorize is None else [vectorize]))
        worst: dict[str, Deviation] = {}
        for deviation in compare(case, arrays, truth, found, dtype):
            passed &= deviation.passed
            # The one nearest to its limit (NaN counts as beyond it) stands for its kind.
            other = worst.get(deviation.kind)
            if other is None or not deviation.found / deviation.allowed <= other.found / other.allowed:
                worst[deviation.kind] = deviation
        cells = (
            f"{d.kind} {d.found:.1e}{'' if d.passed else f' (> {d.allowed:.1e})'}" for d in worst.values()
        )
        parts.append(f"{dtype}: " + " ".join(cells))
    return passed, f"{'ok  ' if passed else 'FAIL'} {name} | " + " | ".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Checks the cases in a folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description="Compare with the original.")
    parser.add_argument(
        "folder", type=pathlib.Path, metavar="DIR", help="holds float32/ and float64/ or learners/"
    )
    parser.add_argument("--case", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument(
        "--vectorize", action=argparse.BooleanOptionalAction, help="all tasks at once (default: as trained)"
    )
    options = parser.parse_args(arguments)
    learners = options.folder / "learners"
    own = parity_learners.known(learners)
    there = sorted(path.stem for path in (options.folder / "float32").glob("*.json")) + own
    cases = options.case or there
    unknown = sorted(set(cases) - set(there))
    if unknown or not cases:
        wrong = f"no case {', '.join(unknown)}" if unknown else "no cases"
        print(f"{options.folder}/float32: {wrong}; found: {', '.join(there) or 'nothing'}", file=sys.stderr)
        return 2
    failed = 0
    for name in cases:
        known = name in own
        passed, line = (
            parity_learners.check_case(learners, name, options.vectorize)
            if known
            else check_case(options.folder, name, options.vectorize)
        )
        failed += not passed
        print(line, flush=True)
    print(f"{len(cases) - failed} of {len(cases)} cases agree with the original")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Accuracy by batch norm's statistics and the contents of the query set: `python -m benchmarks.query_sets 5`.

The published weights on 5-way tasks of a folder of photographs, adapted by 10 steps: accuracy and mean
confidence on query sets of all classes and of few, of many photographs and of one, normalized by their own
statistics (transductive) or by the support set's.
"""

import argparse
import os

import numpy as np

from maml.commands import runner

with runner.silent_start():
    import tensorflow as tf

    from maml.runs import build
    from maml.runs.data import load_data
    from maml.runs.load import trained_network
    from maml.settings.settings import parse

STEPS, PER_CLASS = 10, 15


def main() -> None:
    """Measures, and prints a row per kind of query set."""
    data = os.environ.get("MAML_DATA_DIR", "data")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shot", type=int, help="support photographs per class")
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--data", default=f"{data}/tiny_imagenet_fewshot.tar")
    parser.add_argument("--weights", default=f"{data}/original_checkpoint/model59000")
    options = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # of query sets of different sizes
    settings = parse(
        ["--datasource=folder", f"--data_dir={options.data}", f"--update_batch_size={options.shot}",
         f"--test_num_query={PER_CLASS}", f"--init_from={options.weights}", "--train=False"]
    )  # fmt: skip
    source, spec = load_data(settings), build.test_spec(settings)
    network, _ = trained_network(settings, from_run=False)
    learner = build.build_training(settings, network)[-1].outer.algorithm

    @tf.function
    def adapted(x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        weights = learner.weights()
        for _ in range(STEPS):
            weights, _ = learner.step(weights, x, y)
        return weights

    predict = tf.function(learner.outputs)
    found: dict[str, list[list[float]]] = {}
    random = np.random.default_rng(0)
    for i in range(options.tasks):
        episodes = source.sample(spec, "test", tf.constant([i], tf.int64))
        support_x, support_y, query_x, query_y = (field[0] for field in learner.to_floating(episodes))
        weights = adapted(support_x, support_y)
        for kind, rows in query_sets(query_y.numpy(), i % settings.num_classes, random).items():
            x, y = tf.gather(query_x, rows), tf.gather(query_y, rows).numpy()
            outputs = predict(weights, x), predict(weights, x, support_x)
            found.setdefault(kind, []).append([value for o in outputs for value in measures(o, y)])

    print(
        f"{settings.num_classes}-way {options.shot}-shot, {options.tasks} tasks, {STEPS} steps: accuracy, %"
    )
    print(f"{'query set':28}{'its own statistics':>24}{'the support set’s':>24}")
    for kind, rows in found.items():
        values = 100 * np.array(rows)
        mean, half = values.mean(axis=0), 1.96 * values.std(axis=0) / np.sqrt(len(values))
        cells = [f"{mean[j]:.1f} ± {half[j]:.1f} (conf. {mean[j + 1]:.0f})" for j in (0, 2)]
        print(f"{kind:28}{cells[0]:>24}{cells[1]:>24}")


def query_sets(labels: np.ndarray, one: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """The places of the photographs of every kind of query set, out of 15 per class with these labels."""
    of = [np.flatnonzero(labels == (one + c) % 5) for c in range(5)]
    return {
        "15 of each class": np.arange(len(labels)),
        "1 of each class": np.array([rows[0] for rows in of]),
        "5 of each of three classes": np.concatenate([rows[:5] for rows in of[:3]]),
        "15 of one and 4 of another": np.concatenate([of[0], of[1][:4]]),
        "15 of one class": of[0],
        "one photograph": random.choice(len(labels), 1),
    }


def measures(outputs: tf.Tensor, labels: np.ndarray) -> tuple[float, float]:
    """Accuracy and mean confidence."""
    odds = tf.nn.softmax(outputs).numpy()
    return float((odds.argmax(-1) == labels).mean()), float(odds.max(-1).mean())


if __name__ == "__main__":
    main()

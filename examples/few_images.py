"""A classifier of a few images, kept as a Keras file: `python -m examples.few_images DATA_DIR adapted.keras`.

Meta-trains on Omniglot (in DATA_DIR, see data/README.md), adapts to one drawing each of five characters never
seen before, has what comes of it tell fifteen more drawings of each apart, and saves it. Keras loads the file
again in a program that has `from maml import BatchNorm`, which makes that layer known to it. Photographs in
class folders are `load_photographs(photographs(DIR), seed=0, side=84)` of `maml.datasets.folder`; as their
pixels are 0…255, the model begins with `keras.layers.Rescaling(1 / 255)`.
"""

import sys

from maml import EpisodeSpec, Learner, conv4, cross_entropy
from maml.datasets.omniglot import load_omniglot

import keras  # isort: skip


def main(data_dir: str, path: str, iterations: int = 500) -> float:
    """Saves the classifier, and prints and returns its accuracy on the new drawings."""
    keras.utils.set_random_seed(0)
    images = load_omniglot(data_dir, seed=0)
    learner = Learner(conv4((28, 28, 1), 5, filters=32), cross_entropy(1), inner_lr=0.4)
    spec = EpisodeSpec(way=5, shot=1, query=1, seed=0)
    learner.fit(images, spec=spec, iterations=iterations, meta_batch=16)

    task = images.sample(spec._replace(query=15), "test", [0])
    classifier = learner.adapt(task.support_x[0], task.support_y[0], steps=3)
    classifier.save(path)
    found = classifier.predict(task.query_x[0], verbose=0).argmax(axis=-1)
    accuracy = float((found == task.query_y[0].numpy()).mean())
    print(f"{path}: {100 * accuracy:.0f} % of {len(found)} drawings right, from one of each character")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])

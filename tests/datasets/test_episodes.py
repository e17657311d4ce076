"""Episodes: exact counts, disjoint sets, determinism, uniformity; and real Omniglot where it is at hand."""

import numpy as np
import pytest

from maml.counting import mixed
from maml.datasets.image_classes import ClassImages, ImageClasses
from maml.datasets.omniglot import OMNIGLOT_SPLIT, load_omniglot
from maml.datasets.random_stream import Stream
from maml.datasets.sinusoid import Sinusoid
from maml.episodes import SPLITS, Episode, EpisodeSpec
from maml.errors import UserError
from maml.training.loop import stream_blocks

import tensorflow as tf  # isort: skip

CLASSES, PER_CLASS, SIDE = 30, 20, 3
PATTERN = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)  # no rotation looks like another


def coded_images(classes: int = CLASSES, per_class: int = PER_CLASS, rotations: bool = True) -> ImageClasses:
    """Images of which every pixel tells class and image, and channel 2 which way is up."""
    images = np.zeros((classes, per_class, SIDE, SIDE, 3), np.uint8)
    images[..., 0] = np.arange(classes)[:, None, None, None]
    images[..., 1] = np.arange(per_class)[:, None, None]
    images[..., 2] = PATTERN
    return ImageClasses("coded", dict.fromkeys(SPLITS, ClassImages.in_memory(images)), rotations=rotations)


def decode(x: tf.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class, image and quarter turns of coded images [..., H, W, C]."""
    x = x.numpy()
    assert (x[..., :2] == x[..., :1, :1, :2]).all()
    turned = np.stack([np.rot90(PATTERN, quarters) for quarters in range(4)])
    match = (x[..., None, :, :, 2] == turned).all((-2, -1))
    assert (match.sum(-1) == 1).all()
    return x[..., 0, 0, 0].astype(int), x[..., 0, 0, 1].astype(int), match.argmax(-1)


def draw(
    indices, way=5, shot=1, query=1, seed=0, split="train", source: ImageClasses | Sinusoid | None = None
) -> Episode:
    source = source or coded_images()
    return source.sample(EpisodeSpec(way, shot, query, seed), split, tf.constant(indices, tf.int64))


def same(a: Episode, b: Episode) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("way", "shot", "query"), [(5, 1, 1), (5, 5, 5), (20, 1, 3), (2, 3, 15), (5, 10, 10), (30, 1, 19)]
)
@pytest.mark.parametrize("rotations", [False, True])
def test_an_episode_has_exact_counts_and_no_image_twice(way, shot, query, rotations):
    episodes = draw(range(40), way, shot, query, source=coded_images(rotations=rotations))
    assert episodes.support_x.dtype == episodes.query_x.dtype == tf.uint8
    assert episodes.support_y.dtype == episodes.query_y.dtype == tf.int32
    assert episodes.support_x.shape == (40, way * shot, SIDE, SIDE, 3)
    assert episodes.query_x.shape == (40, way * query, SIDE, SIDE, 3)
    support, query_set = decode(episodes.support_x), decode(episodes.query_x)
    for i in range(40):
        labels = episodes.support_y[i].numpy(), episodes.query_y[i].numpy()
        assert np.array_equal(np.bincount(labels[0], minlength=way), [shot] * way)
        assert np.array_equal(np.bincount(labels[1], minlength=way), [query] * way)
        label = np.concatenate(labels)
        character, image, turn = (
            np.concatenate([a[i], b[i]]) for a, b in zip(support, query_set, strict=True)
        )
        # No image twice, so none both in support and query; one class, turned one way, per label.
        assert len(set(zip(character, image, strict=True))) == way * (shot + query)
        assert len(set(zip(label, character, turn, strict=True))) == way
        assert len(set(character)) == way
        if not rotations:
            assert not turn.any()


def test_support_and_query_are_each_in_their_own_order():
    episodes = draw(range(200), way=5, shot=2, query=2)
    support, query = episodes.support_y.numpy(), episodes.query_y.numpy()
    assert len({tuple(row) for row in support}) > 190
    assert np.mean((support == query).all(1)) < 0.05


# --- Determinism --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [coded_images(), Sinusoid()], ids=["images", "sinusoid"])
def test_an_episode_is_the_same_however_it_is_drawn(source):
    spec = EpisodeSpec(5, 2, 3, seed=7)
    together = draw(range(24), *spec[:3], seed=7, source=source)
    alone = [draw([i], *spec[:3], seed=7, source=source) for i in range(24)]
    assert same(together, Episode(*[np.concatenate(fields) for fields in zip(*alone, strict=True)]))
    graph = tf.function(lambda indices: source.sample(spec, "train", indices))
    assert same(graph(tf.range(24, dtype=tf.int64)), together)
    backwards = draw(range(23, -1, -1), *spec[:3], seed=7, source=source)
    assert same(Episode(*[field[::-1] for field in backwards]), together)
    for meta_batch, block, start in [(1, 1, 0), (4, 3, 0), (4, 3, 1), (2, 2, 3), (8, 1, 2)]:
        first = next(stream_blocks(source, spec, "train", meta_batch=meta_batch, block=block, start=start))
        assert first.support_x.shape[:2] == (block, meta_batch)
        begin = start * block * meta_batch
        flat = Episode(*[np.reshape(field, (block * meta_batch, *field.shape[2:])) for field in first])
        assert same(flat, Episode(*[field[begin : begin + block * meta_batch] for field in together]))


def test_the_stream_goes_on_where_a_later_start_begins():
    source, spec = coded_images(), EpisodeSpec(5, 1, 1, 0)
    stream = stream_blocks(source, spec, "val", meta_batch=2, block=2)
    passed = [next(stream) for _ in range(5)]
    later = stream_blocks(source, spec, "val", meta_batch=2, block=2, start=3)
    assert same(next(later), passed[3])
    assert same(next(later), passed[4])
    assert not same(passed[3], passed[4])


@pytest.mark.parametrize("source", [coded_images(), Sinusoid()], ids=["images", "sinusoid"])
def test_other_seeds_splits_and_indices_are_other_episodes(source):
    drawn = [
        draw([index], seed=seed, split=split, source=source).support_x.numpy().tobytes()
        for seed in (0, 1, 2**31)
        for split in SPLITS
        for index in (0, 1, 2**40)
    ]
    assert len(set(drawn)) == 27


def test_the_hash_is_splitmix64s():
    # The published generator's first outputs from state 1234567 are mix(1234567 + k·γ), k = 1, 2, …
    state, golden = 1234567, 0x9E3779B97F4A7C15
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    inputs = tf.constant([(state + k * golden) % 2**64 for k in range(3)], tf.uint64)
    assert mixed(inputs).numpy().tolist() == expected


# --- Uniformity ---------------------------------------------------------------------------------------


def assert_uniform(counts: np.ndarray):
    """Pearson's χ² is within five standard deviations of its mean (the draws are fixed: no flakes)."""
    expected = counts.sum() / counts.size
    assert expected > 20
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_classes_images_labels_and_rotations_are_uniform():
    episodes = draw(range(3000), way=5, shot=2, query=2)
    character, image, turn = (
        np.concatenate(parts, axis=1)
        for parts in zip(decode(episodes.support_x), decode(episodes.query_x), strict=True)
    )
    label = np.concatenate([episodes.support_y, episodes.query_y], axis=1)
    first = np.stack([(label == n).argmax(1) for n in range(5)], axis=1)  # one example of each class

    def of_class(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, first, axis=1)

    assert_uniform(np.bincount(of_class(character).ravel(), minlength=CLASSES))
    assert_uniform(np.bincount(of_class(turn).ravel(), minlength=4))
    assert_uniform(np.bincount(image.ravel(), minlength=PER_CLASS))
    for n in range(5):  # every class is as likely under every label, and turned every way
        assert_uniform(np.bincount(of_class(character)[:, n], minlength=CLASSES))
        assert_uniform(np.bincount(of_class(turn)[:, n], minlength=4))
    for place in (0, 1, 9, 10, 19):  # every label is as likely at every place of support and query
        assert_uniform(np.bincount(label[:, place], minlength=5))
    pairs = of_class(character)[:, 0] * CLASSES + of_class(character)[:, 1]
    counts = np.bincount(pairs, minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    assert not counts.diagonal().any()
    # The classes of one episode are turned independently of each other.
    assert_uniform(np.bincount(of_class(turn)[:, 0] * 4 + of_class(turn)[:, 1], minlength=16))


def test_the_numbers_of_a_stream_are_uniform():
    stream = Stream(3, "test", tf.range(4000, dtype=tf.int64))
    uniform = stream.uniform("u", 5).numpy()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert_uniform(np.histogram(uniform, 50, (0, 1))[0])
    assert_uniform(np.bincount(stream.integers("i", 7, 5).numpy().ravel(), minlength=7))
    for bit in range(64):
        ones = np.sum(stream.bits("b").numpy() >> np.uint64(bit) & np.uint64(1))
        assert_uniform(np.array([ones, 4000 - ones]))
    order = stream.permutation("p", 4).numpy()
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(4), (4000, 1)))
    assert_uniform(np.unique(order @ [64, 16, 4, 1], return_counts=True)[1])
    assert len(np.unique(order, axis=0)) == 24


# --- The sinusoid -------------------------------------------------------------------------------------


def test_the_sinusoid_is_what_the_oracle_is_told():
    told = draw(range(2000), shot=10, query=7, source=Sinusoid(oracle=True))
    plain = draw(range(2000), shot=10, query=7, source=Sinusoid())
    assert {field.dtype for field in told + plain} == {tf.float32}
    assert told.support_x.shape == (2000, 10, 3)
    assert told.query_x.shape == (2000, 7, 3)
    assert told.query_y.shape == (2000, 7, 1)
    assert same(plain, told._replace(support_x=told.support_x[..., :1], query_x=told.query_x[..., :1]))
    inputs = np.concatenate([told.support_x, told.query_x], axis=1).astype(float)
    targets = np.concatenate([told.support_y, told.query_y], axis=1)[..., 0]
    x, amplitude, phase = np.moveaxis(inputs, -1, 0)
    np.testing.assert_allclose(targets, amplitude * np.sin(x - phase), rtol=0, atol=5e-6)
    assert (amplitude == amplitude[:, :1]).all()
    assert (phase == phase[:, :1]).all()
    for values, low, high in ((x, -5, 5), (amplitude[:, 0], 0.1, 5), (phase[:, 0], 0, np.pi)):
        assert values.min() >= np.float32(low)
        assert values.max() <= np.float32(high)
        assert_uniform(np.histogram(values, 40, (low, np.float32(high)))[0])


# --- Too little data ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "found", "expected"),
    [
        (EpisodeSpec(5, 1, 1, 0), "got 4 train classes", "expected 5 classes"),
        (EpisodeSpec(4, 2, 5, 0), "got 6 of train class 0 (4 classes", "expected 7 images of every class"),
    ],
)
def test_too_few_classes_or_images_are_refused_with_both_numbers(spec, found, expected):
    source = coded_images(classes=4, per_class=6)
    with pytest.raises(UserError) as refusal:
        next(stream_blocks(source, spec, "train", meta_batch=2, block=1))
    assert found in str(refusal.value)
    assert expected in str(refusal.value)


def test_just_enough_classes_and_images_are_enough():
    source = coded_images(classes=4, per_class=6)
    episode = next(stream_blocks(source, EpisodeSpec(4, 2, 4, 0), "train", meta_batch=1, block=1))
    character, image, _ = decode(tf.concat([episode.support_x, episode.query_x], axis=2))
    assert set(zip(character.ravel(), image.ravel(), strict=True)) == set(np.ndindex(4, 6))


# --- Real Omniglot ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def omniglot(data_dir) -> dict[str, np.ndarray]:
    """The splits of seed 0."""
    return arrays(load_omniglot(data_dir, 0))


def arrays(source: ImageClasses) -> dict[str, np.ndarray]:
    """The images of each split, [classes, images per class, H, W, C]."""
    return {
        split: np.stack([images[start : start + count] for start, count in zip(starts, counts, strict=True)])
        for split, (images, _, starts, counts) in source.splits.items()
    }


def fingerprints(images: np.ndarray) -> list[bytes]:
    return [character.tobytes() for character in images]


def test_omniglot_has_its_characters_and_drawings(omniglot):
    shapes = {split: images.shape for split, images in omniglot.items()}
    assert shapes == {split: (n, 20, 28, 28, 1) for split, n in OMNIGLOT_SPLIT.items()}
    assert (shapes["train"][0], shapes["val"][0], shapes["test"][0]) == (1100, 100, 423)


def test_omniglot_is_ink_1_on_paper_0(omniglot):
    for images in omniglot.values():
        assert images.dtype == np.uint8
        assert np.array_equal(np.unique(images), [0, 1])
        ink = images.mean((2, 3, 4))
        assert ink.min() > 0  # no drawing is empty
        assert ink.max() < 0.5


def test_omniglots_split_is_disjoint_and_depends_on_the_seed_alone(omniglot, data_dir):
    parts = {split: fingerprints(images) for split, images in omniglot.items()}
    everything = [character for part in parts.values() for character in part]
    assert len(set(everything)) == 1623
    again, other = (
        {split: fingerprints(images) for split, images in arrays(load_omniglot(data_dir, seed)).items()}
        for seed in (0, 1)
    )
    assert again == parts
    assert {c for part in other.values() for c in part} == set(everything)
    common = len(set(other["test"]) & set(parts["test"]))
    assert abs(common - 423**2 / 1623) < 40  # as many as two independent draws share


def test_omniglot_episodes_turn_drawings_and_keep_their_class(omniglot, data_dir):
    source = load_omniglot(data_dir, 0)
    episodes = draw(range(20), way=5, shot=1, query=1, split="test", source=source)
    where = {
        np.rot90(drawing, turn).tobytes(): (character, turn)
        for character, drawings in enumerate(omniglot["test"])
        for drawing in drawings
        for turn in range(4)
    }
    turns = set()
    for task in range(20):
        seen: dict[int, set] = {}
        for part in ("support", "query"):
            x, y = getattr(episodes, f"{part}_x")[task].numpy(), getattr(episodes, f"{part}_y")[task].numpy()
            for image, label in zip(x, y, strict=True):
                seen.setdefault(int(label), set()).add(where[image.tobytes()])
        assert all(len(origins) == 1 for origins in seen.values())
        turns |= {turn for origins in seen.values() for _, turn in origins}
    assert turns == {0, 1, 2, 3}

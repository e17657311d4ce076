"""The line of a training: mean losses per example, smoothed, and what compiles."""

import io
import types

import numpy as np
import pytest

from maml import Learner, mean_squared_error
from maml.episodes import EpisodeSpec
from maml.learners.losses import cross_entropy, mean_cross_entropy, per_example, summed_cross_entropy
from maml.learners.reptile import Reptile
from maml.training.loop import Update
from maml.training.progress import COMPILING, WINDOW, PerExample, Progress, Smoothed

import keras  # isort: skip
import tensorflow as tf  # isort: skip

WAY, SHOT, QUERY = 5, 2, 3


def phase(name: str, end: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(name=name, end=end)


def rows(value: float, count: int = 1, steps: int = 1) -> dict[str, np.ndarray]:
    """Measures of `count` iterations, as MAML's."""
    return {
        "support_loss": np.full((count, steps), value + 1),
        "query_loss": np.full(count, value),
        "query_accuracy": np.full(count, 0.43),
        "gradient_norm": np.zeros(count),
    }


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# --- Losses per example -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [cross_entropy(SHOT), summed_cross_entropy, mean_cross_entropy])
@pytest.mark.parametrize("examples", [WAY * SHOT, WAY * QUERY])
def test_at_chance_every_cross_entropy_is_ln_5_per_example(loss, examples):
    labels, logits = tf.range(examples) % WAY, tf.zeros((examples, WAY))
    assert float(loss(labels, logits)) * per_example(loss, examples) == pytest.approx(np.log(WAY), rel=1e-6)


def test_a_squared_error_is_a_mean_already():
    assert per_example(mean_squared_error, 7) == 1


def test_reptile_counts_mini_batches():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(WAY)])
    spec = EpisodeSpec(WAY, 10, QUERY, 0)
    assert Reptile(model, summed_cross_entropy, inner_batch=8).examples(spec) == (8, 8)
    tail = Reptile(model, summed_cross_entropy, inner_batch=8, foml=True, foml_tail=2)
    assert tail.examples(spec) == (8, WAY * 2)


# --- The text -----------------------------------------------------------------------------------------


def test_the_losses_of_maml_are_named_before_and_after_adaptation():
    shown = Smoothed()
    shown.add(rows(6.9, steps=2), PerExample(before=0.2, after=0.2))
    assert shown.text() == "query loss 1.58 → 1.38, accuracy 43 %"


def test_what_there_is_no_loss_of_is_left_out():
    metric, joint, reptile = Smoothed(), Smoothed(), Smoothed()
    metric.add({"query_loss": np.array([1.2]), "query_accuracy": np.array([0.5])})
    assert metric.text() == "query loss 1.20, accuracy 50 %"
    joint.add({"support_loss": np.array([[2.5]])})
    assert joint.text() == "support loss 2.50"
    reptile.add({"support_loss": np.array([[16.1, 9, 8]]), "support_accuracy": np.array([[0.2, 0.5, 0.7]])},
                PerExample(0.1, 0.1))  # fmt: skip
    assert reptile.text() == "support loss 1.61 → 0.800, accuracy 70 %"


def test_the_losses_are_means_over_the_last_iterations():
    shown = Smoothed()
    shown.add(rows(100.0, 50))
    shown.add(rows(1.0, WINDOW // 2))
    shown.add(rows(2.0, WINDOW // 2))
    assert shown.text().startswith("query loss 2.50 → 1.50")
    shown.add({"support_loss": np.array([[4.0]])})  # another phase begins anew
    assert shown.text() == "support loss 4.00"


# --- Compiling ----------------------------------------------------------------------------------------


def test_a_log_says_that_the_first_call_of_every_phase_compiles(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    progress = Progress(0, 20)
    progress.advance(Update(phase("pretrain", 10), 10, rows(1.0, 10)))
    progress.advance(Update(phase("metatrain", 20), 20, rows(1.0, 10)))
    progress.close()
    assert capsys.readouterr().out.splitlines() == [COMPILING, "compiled in 0 s"] * 2
    Progress(20, 20).close()
    assert capsys.readouterr().out == ""


def test_a_bar_says_so_until_there_are_losses(monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    progress = Progress(0, 20, {"metatrain": PerExample(0.5, 0.5)})
    before = terminal.getvalue()
    progress.advance(Update(phase("metatrain", 20), 20, rows(2.0, 10)))
    progress.close()
    assert COMPILING in before and "query loss" not in before
    assert terminal.getvalue().rstrip().endswith("query loss 1.50 → 1.00, accuracy 43 %")


def test_the_bar_of_the_library_says_so_once(monkeypatch):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    learner = Learner(model, "mse", inner_lr=0.01, jit_compile=False)
    episode = tuple(np.ones((5, 1)) for _ in range(4))
    said = []
    for _ in range(2):
        monkeypatch.setattr("sys.stderr", terminal := Terminal())
        learner.fit([episode], iterations=100, progress=True)
        said.append(terminal.getvalue())
    assert [COMPILING in text for text in said] == [True, False]
    assert "query loss" in said[0]

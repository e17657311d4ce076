"""Fits of sinusoids before and after adaptation, as PNG."""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maml.datasets.sinusoid import Sinusoid
from maml.episodes import Episode, EpisodeSpec
from maml.learners.base import Algorithm
from maml.reports.episode_pictures import BLUE, RED, _as_png

GRID = 200  # points a curve is drawn through


class Trained(NamedTuple):
    """A trained learner, its data set (sinusoid, plain or oracle), and the inner steps of the last curve."""

    learner: Algorithm
    data: Sinusoid
    steps: int


def sinusoid_fits(
    path: pathlib.Path, learners: Mapping[str, Trained], spec: EpisodeSpec, *, tasks: int = 4
) -> None:
    """Draws fits before and after adaptation to the first test tasks (the paper's figure 2).

    Args:
        path: of the PNG file.
        learners: trained, by name; each has a row of panels, the tasks of all are the same.
        spec: K and the seed.
        tasks: panels of a row.
    """
    import matplotlib.pyplot as plt

    size = 3.4 * tasks, 0.4 + 2.6 * len(learners)
    figure, axes = plt.subplots(
        len(learners), tasks, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    numbers = {steps for _, _, steps in learners.values()}
    last = _after(*numbers) if len(numbers) == 1 else "after the last step"
    for row, (name, (learner, data, steps)) in zip(axes, learners.items(), strict=True):
        for axis, fit in zip(row, _fits(learner, data, spec, "test", steps, tasks), strict=True):
            _fit_panel(axis, fit, steps, last)
        row[0].set_ylabel("y" if len(learners) == 1 else f"{name}, {steps} step{'s' * (steps > 1)}\ny")
    for axis in axes[1:].flat:
        axis.set_title("")  # the column's sinusoid, said above
    for axis in axes[-1]:
        axis.set_xlabel("x")
    # Of the learner with the most curves: one with a single step has no other.
    most = axes[max(range(len(axes)), key=lambda row: len(axes[row, 0].lines)), 0]
    handles, labels = most.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


class _Fit(NamedTuple):
    """A sinusoid and its fits: x and truth [GRID], curves [steps + 1, GRID], support points [K]."""

    amplitude: float
    phase: float
    x: np.ndarray
    truth: np.ndarray
    curves: np.ndarray
    support_x: np.ndarray
    support_y: np.ndarray


def _fits(
    learner: Algorithm, data: Sinusoid, spec: EpisodeSpec, split: str, steps: int, tasks: int
) -> list[_Fit]:
    indices = tf.range(tasks, dtype=tf.int64)
    told = Sinusoid(oracle=True).sample(spec, split, indices).support_x
    amplitude, phase = told[:, :1, 1:2], told[:, :1, 2:3]
    x = tf.tile(tf.linspace(-5.0, 5.0, GRID)[tf.newaxis, :, tf.newaxis], (tasks, 1, 1))
    truth = amplitude * tf.sin(x - phase)
    inputs = tf.concat([x, amplitude + 0 * x, phase + 0 * x], axis=-1) if data.oracle else x
    support = data.sample(spec, split, indices)
    curves = learner.evaluate(
        Episode(support.support_x, support.support_y, inputs, truth), tf.constant(steps)
    ).predictions
    points = (x, truth, curves, support.support_x, support.support_y)
    arrays = zip(*(values.numpy()[..., 0] for values in points), strict=True)
    shapes = zip(amplitude.numpy().ravel(), phase.numpy().ravel(), strict=True)
    return [_Fit(*shape, *of_task) for shape, of_task in zip(shapes, arrays, strict=True)]


def _after(steps: int) -> str:
    return f"after {steps} step{'s' * (steps > 1)}"


def _fit_panel(axis: Axes, fit: _Fit, steps: int, last: str) -> None:
    axis.plot(fit.x, fit.truth, color=RED, linewidth=2, label="task")
    for step, style in {0: (0, (1, 1.5)), 1: "--", steps: "-"}.items():
        label = "before" if step == 0 else last if step == steps else _after(step)
        axis.plot(fit.x, fit.curves[step], linestyle=style, color=BLUE, label=label)
    axis.plot(fit.support_x, fit.support_y, "^", color="#8172b3", label="support")
    axis.set_title(f"A = {fit.amplitude:.2f}, φ = {fit.phase:.2f}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


# --- Small pictures for TensorBoard, drawn while training waits ----------------------------------------


def fits_so_far(learner: Algorithm, data: Sinusoid, spec: EpisodeSpec, steps: int) -> bytes:
    """A PNG of the fits to the first four validation tasks; their axes stay the same through a training."""
    figure = Figure(figsize=(5.2, 4.4))
    figure.subplots_adjust(0.07, 0.2, 0.99, 0.93, wspace=0.06, hspace=0.3)
    axes = figure.subplots(2, 2, subplot_kw={"xticks": (), "yticks": (), "ylim": (-5.5, 5.5)})
    for axis, fit in zip(axes.flat, _fits(learner, data, spec, "val", steps, axes.size), strict=True):
        _fit_panel(axis, fit, steps, _after(steps))
    axes[1, 0].set(xticks=(-5, 0, 5), yticks=(-5, 0, 5))  # every tick takes a millisecond
    figure.legend(*axis.get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False)
    return _as_png(figure)

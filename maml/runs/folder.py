"""A run is a folder: its flags, checkpoints, TensorBoard events, figures and results."""

import contextlib
import dataclasses
import hashlib
import math
import os
import shutil
import struct
from collections.abc import Iterator, Sequence

import filelock
import tensorflow as tf
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.image.metadata import create_summary_metadata
from tensorboard.plugins.scalar.summary_v2 import scalar_pb

from maml.episodes import Episode
from maml.errors import Failure, UserError
from maml.runs import events
from maml.runs.files import csv_text, saved_iterations, tag, validations, write_whole
from maml.runs.weights import restored
from maml.settings.run_name import OF_TEST
from maml.settings.settings import Settings, as_flagfile, parse, read_flagfile
from maml.training.loop import METATRAIN, PRETRAIN, Phase

# Flags that may differ between a run and its continuation: they change how long and how it is
# watched, not what is computed.
FREE_FLAGS = {
    "metatrain_iterations", "log", "logdir", "run_name", "resume", "train", "test_set", "test_num_query",
    "test_num_updates", "num_test_tasks", "test_ensemble", "transductive", "data_dir", "save_interval",
    "tasks_per_chunk", "vectorize", "jit_compile", "deterministic", "keep", "on_nan",
}  # fmt: skip
KEYS = {PRETRAIN: "pretrain_optimizer", METATRAIN: "meta_optimizer"}  # in checkpoints: never to change
PNG_SIZE_AT = 16  # where a PNG file has its width and height


class Run:
    """The folder of one run.

    Layout: `flags` (repeats the run with `--flagfile`), `data` (tells its episodes from others),
    `checkpoints/model-ITERATION.*`, `validation.csv`, `train/`, `validation/` and `tests/` (TensorBoard),
    `*.png`, `lock` (held by the process that trains); and what `maml.runs.results` writes.
    """

    def __init__(self, settings: Settings, phases: Sequence[Phase], *, chief: bool = True):
        """Opens nothing yet: see `begin` (training) and `restore` (testing).

        A process that is not the chief reads the folder as the chief does, and writes nothing in it.
        """
        self.settings = settings
        self.chief = chief
        self.dir = settings.run_dir
        self.iteration = tf.Variable(0, dtype=tf.int64, trainable=False)
        # Episodes are a function of (seed, iteration): these two are the whole random state.
        self._seed = tf.Variable(settings.seed, dtype=tf.int64, trainable=False)
        self._algorithm = algorithm = phases[-1].outer.algorithm
        own = algorithm.outside_variables
        self._checkpoint = tf.train.Checkpoint(
            network=algorithm.network,
            iteration=self.iteration,
            seed=self._seed,
            **{KEYS[phase.name]: phase.outer.optimizer for phase in phases},
            **({"learner": tf.train.Checkpoint(own=own)} if own else {}),
        )
        self._manager: tf.train.CheckpointManager | None = None
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        self._lock = filelock.FileLock(self.dir / "lock", timeout=0)  # a crash lets go of it too

    def begin(self, first_episode: Episode) -> None:
        """Makes the folder ready for training, restoring the newest checkpoint that is whole.

        A run that has gone further than the settings ask is taken back, in memory, to where they end.
        Until `end` no other process can begin in it.

        Args:
            first_episode: of training; a run goes on only with the data it was begun with.

        Raises:
            UserError: if the folder holds a run of other settings or data, or one not to be resumed, or if
                another process is training in it.
        """
        begun = self.dir.is_dir() and {path.name for path in self.dir.iterdir()} - {"lock"}
        if begun and not self.settings.resume:
            there = saved_iterations(self.dir)
            raise UserError(
                f"{self.dir} holds a run of {there[-1] if there else 0} iterations, which --resume=False "
                "would overwrite. Delete the folder, choose another --logdir or --seed, or remove "
                "--resume=False."
            )
        if self.chief:
            self._claim()
        try:
            there = saved_iterations(self.dir)
            if there:
                self._go_on(there)
            if self.chief:
                with self.writing("begin"):
                    self._begin_files(first_episode, there)
        except BaseException:
            self.end()
            raise

    def check(self) -> None:
        """Raises UserError if the folder holds a run that cannot be resumed with these settings."""
        if (there := saved_iterations(self.dir)) and self.settings.resume:
            self._check_resumable(there)

    def _check_resumable(self, there: list[int]) -> None:
        self._check_settings()
        asked = self.settings.iterations
        if there[-1] > asked and asked not in there:
            raise UserError(
                f"{self.dir} holds a run of {there[-1]} iterations, more than the {asked} asked for, and no "
                f"checkpoint of that one. Found {', '.join(map(str, there))}: ask for one of them, or for "
                f"more iterations."
            )

    def _go_on(self, there: list[int]) -> None:
        self._check_resumable(there)
        asked = self.settings.iterations
        self._restore_newest([iteration for iteration in there if iteration <= asked])

    def end(self) -> None:
        """Lets other processes train in the folder."""
        self._lock.release()

    def _claim(self) -> None:
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout as error:
            raise UserError(
                f"{self.dir}: another process is training in it. Wait for its end, stop it, or choose "
                f"another --logdir or --seed."
            ) from error
        except OSError as error:
            raise UserError(
                f"--logdir: cannot write to {self.dir} ({error.strerror}), expected a folder that can be "
                "written to. Use another."
            ) from error

    def _begin_files(self, first_episode: Episode, there: list[int]) -> None:
        digest = hashlib.sha256(b"".join(field.numpy().tobytes() for field in first_episode)).hexdigest()
        data = self.dir / "data"
        if there and data.is_file() and data.read_text(encoding="utf-8").strip() != digest:
            raise UserError(
                f"{self.dir} was trained on other data than --data_dir={self.settings.data_dir} now "
                "holds: its first episode differs. Use the run's data, or another --logdir."
            )
        write_whole(data, digest + "\n")
        iteration = int(self.iteration)
        if max(there, default=0) <= self.settings.iterations:
            here = dataclasses.replace(self.settings, logdir=os.path.abspath(self.settings.logdir))
            write_whole(self.dir / "flags", as_flagfile(here))  # good from any folder
            # What a killed process wrote after its last checkpoint comes again; before the first, all of it.
            last = iteration or -1
            validated = {0, *validations(self.dir)}
            events.keep(self.dir / "train", lambda step: step <= last)
            events.keep(self.dir / "validation", lambda step: step <= last and step in validated)
        for left in (self.dir / "checkpoints").glob("model-*_temp*"):
            shutil.rmtree(left, ignore_errors=True)

    def _restore_newest(self, there: list[int]) -> None:
        for iteration in reversed(there):
            try:
                self._restore(iteration)
                return
            except UserError as error:
                damaged = error
                print(f"warning: {error} Resuming from the one before.", flush=True)
        raise UserError(f"{self.dir}: none of its checkpoints can be read; the oldest: {damaged}")

    def best(self, count: int) -> list[int]:
        """The iterations of the `count` best validated checkpoints, the best first.

        Raises:
            UserError: if there are fewer.
        """
        there = [
            i for i in saved_iterations(self.dir) if not self.settings.train or i <= self.settings.iterations
        ]
        found = self._ranked(there)[:count]
        if len(found) < count:
            raise UserError(
                f"--test_ensemble={count}: expected as many validated checkpoints in {self.dir}, got "
                f"{len(found)}. Lower it, or train with a smaller --save_interval."
            )
        return found

    def restore(self, iteration: int | None = None) -> None:
        """Restores the checkpoint to be tested: `test_iter`, or the newest or the best.

        After training only those within its iterations count.

        Args:
            iteration: of the checkpoint to restore; None: as the settings choose.

        Raises:
            UserError: if there is none, or not the one asked for.
        """
        there = saved_iterations(self.dir)
        asked = self.settings.test_iter if iteration is None else iteration
        if not there:
            siblings = sorted(path.parent.name for path in self.dir.parent.glob("*/flags"))
            raise UserError(
                f"found no checkpoint in {self.dir}; runs under {self.dir.parent}: "
                f"{', '.join(siblings) or 'none'}. Train first, or give the flags the run was trained with "
                f"(--flagfile=RUN/flags)."
            )
        if asked != -1 and asked not in there:
            raise UserError(
                f"--test_iter={asked}: no such checkpoint in {self.dir}; found "
                f"{', '.join(map(str, there))}. Choose one of them."
            )
        self._check_settings()
        if self.settings.train:
            there = [iteration for iteration in there if iteration <= self.settings.iterations]
        if asked == -1:
            asked = self._best(there) if self.settings.checkpoint == "best" else there[-1]
        self._restore(asked)

    def save(self) -> None:
        """Writes a checkpoint of the present iteration.

        Raises:
            Failure: if that is not possible; the checkpoints before it are as they were.
        """
        if not self.chief:
            return
        iteration = int(self.iteration)
        if self._manager is None:
            self._manager = tf.train.CheckpointManager(
                self._checkpoint, str(self.dir / "checkpoints"), max_to_keep=None, checkpoint_name="model"
            )
        with self.writing(f"save iteration {iteration}"):
            self._manager.save(checkpoint_number=iteration)

    def prune(self) -> None:
        """Deletes the checkpoints beyond `--keep`, but not those best at validation that are tested."""
        if self.settings.keep is None or not self.chief:
            return
        there = saved_iterations(self.dir)
        kept = {*there[-self.settings.keep :], *self._ranked(there)[: self.settings.test_ensemble]}
        for iteration in sorted(set(there) - kept):
            # The index first: without it there is no checkpoint, whole or half.
            for path in sorted(self.dir.glob(f"checkpoints/model-{iteration}.*"), reverse=True):
                path.unlink()

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turns what goes wrong with the disk into a Failure that says what is left."""
        try:
            if what != "begin" and not (self.dir / "flags").is_file():
                raise FileNotFoundError(2, "the folder was moved or deleted while the run was going on")
            yield
        except (OSError, tf.errors.OpError) as error:
            there = saved_iterations(self.dir)
            last = f"The last good checkpoint is iteration {there[-1]}" if there else "There is no checkpoint"
            reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
            raise Failure(
                f"{self.dir}: cannot {what} ({reason}). {last}; once the folder can be written to, the same "
                f"command resumes from there."
            ) from error

    def record_validation(self, found: dict[str, float]) -> None:
        """Keeps what validation found at the present iteration in `validation.csv`.

        What TensorBoard shows of it is written before: on resuming, a validation without a row comes again.
        """
        rows = validations(self.dir) | {int(self.iteration): found}
        table = csv_text([{"iteration": iteration, **rows[iteration]} for iteration in sorted(rows)])
        with self.writing("write validation.csv"):
            write_whole(self.dir / "validation.csv", table)

    def write_scalars(self, writer: str, scalars: dict[str, float]) -> None:
        """Writes TensorBoard scalars at the present iteration to "train" or "validation"."""
        if not (self.settings.log and self.chief):
            return
        # All as one record: tf.summary.scalar takes seven times as long, and half as many bytes again.
        point = Summary(value=[scalar_pb(tag, value).value[0] for tag, value in scalars.items()])
        with self._events(writer):
            tf.summary.experimental.write_raw_pb(point.SerializeToString())

    def write_picture(self, writer: str, tag: str, png: bytes) -> None:
        """Shows a PNG file in TensorBoard, as it is."""
        if not (self.settings.log and self.chief):
            return
        size = [str(side).encode() for side in struct.unpack_from(">II", png, PNG_SIZE_AT)]
        with self._events(writer):
            # tf.summary.image would take the pixels, and make three times as many bytes of them.
            tf.summary.write(tag, tf.constant([*size, png]), metadata=create_summary_metadata(None, None))

    def write_text(self, writer: str, tag: str, markdown: str) -> None:
        """Shows a text in TensorBoard."""
        if not (self.settings.log and self.chief):
            return
        with self._events(writer):
            tf.summary.text(tag, markdown)

    def _best(self, among: list[int]) -> int:
        ranked = self._ranked(among)
        if not ranked:
            raise UserError(
                f"--checkpoint=best: {self.dir / 'validation.csv'} has no validation of its checkpoints "
                f"({self._judged_by()[0]}), expected one. Test the newest, or another with --test_iter."
            )
        return ranked[0]

    def _ranked(self, among: list[int]) -> list[int]:
        """Those that were validated, the best first; of equals, the latest."""
        column, sign = self._judged_by()
        rows = validations(self.dir)
        found = {i: rows[i][column] for i in among if math.isfinite(rows.get(i, {}).get(column, math.nan))}
        return sorted(found, key=lambda iteration: (sign * found[iteration], iteration), reverse=True)

    def _judged_by(self) -> tuple[str, int]:
        """The TensorBoard tag of validation after `num_updates` steps; 1 if more of it is better, else −1."""
        measure, sign = ("accuracy", 1) if self.settings.classification else ("loss", -1)
        steps = min(self.settings.trained_steps, self.settings.tested_steps)
        return tag(measure, "query", steps), sign

    def _restore(self, iteration: int) -> None:
        path = self.dir / "checkpoints" / f"model-{iteration}"
        restored(self._checkpoint, path, "Test another one with --test_iter")

    def _check_settings(self) -> None:
        """A run folder may only be resumed under the settings it was begun with."""
        try:
            # By way of the settings, so that a flag newer than the run has its default.
            before = read_flagfile(as_flagfile(parse([f"--flagfile={self.dir / 'flags'}", "--train=False"])))
        except UserError as error:
            raise UserError(
                f"{self.dir / 'flags'}: missing or damaged ({error}), expected to tell what the run is. "
                "Fix it, or choose another --logdir."
            ) from error
        now = read_flagfile(as_flagfile(self.settings))
        free = set(FREE_FLAGS) | {name for name in self.settings.own if name.startswith(OF_TEST)}
        if self.settings.baseline == "oracle":
            free.add("pretrain_iterations")  # its metatrain_iterations, see settings.resolve
        scheduled = self.settings.train and self._has_schedule()
        if scheduled:
            free -= {"metatrain_iterations", "pretrain_iterations"}
        if not self.settings.train:
            free |= {"update_batch_size", "update_lr", "pretrain_iterations"}
        differing = [
            f"--{name}: {before.get(name, 'unset')} there, {now.get(name, 'unset')} here"
            for name in sorted((before.keys() | now.keys()) - free)
            if before.get(name) != now.get(name)
        ]
        why = "its outer step size falls over all iterations; " * scheduled
        if differing:
            raise UserError(
                f"{self.dir} holds a run with other settings ({why}{'; '.join(differing)}). Use its settings "
                f"(--flagfile={self.dir / 'flags'}) or another --logdir."
            )

    def _has_schedule(self) -> bool:
        """Whether the outer step size of an iteration depends on how many there will be."""
        own = self.settings.meta_optimizer is None and self._algorithm.is_scheduled(self.settings)
        return own or self.settings.meta_schedule != "constant"

    @contextlib.contextmanager
    def _events(self, writer: str) -> Iterator[None]:
        """Summaries made in it go to that writer, at the present iteration, and to the disk."""
        with self.writing("write TensorBoard's events"):
            if writer not in self._writers:
                self._writers[writer] = tf.summary.create_file_writer(str(self.dir / writer))
            with self._writers[writer].as_default(step=int(self.iteration)):
                yield
            self._writers[writer].flush()

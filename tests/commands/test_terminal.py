"""What the program shows: help by topic, commands by name, and output whose reader may go.

Only the training that loses its reader starts TensorFlow.
"""

import collections
import dataclasses
import importlib
import re
import shutil
import subprocess
import sys

import pytest

from maml import tables
from maml.commands.table import COMMANDS
from maml.errors import UserError
from maml.reports.published import CELLS
from maml.runs.files import saved_iterations
from maml.settings import flags, help, jobs, parsing
from maml.settings.flags import of_settings
from maml.settings.own import DEFAULT_LEARNER, flags_of
from maml.settings.settings import FLAGS, Settings, parse
from tests import forked
from tests.command_line import ROOT, SINUSOID, python

FLAG = re.compile(r"^  --(?:\[no\])?(\w+)", re.MULTILINE)
OURS = {topic: FLAGS.flags_by_module_dict()[topic] for topic in flags.TOPICS}


def help_at(columns: int, monkeypatch, **more) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    return help.page("usage", OURS, **more)


# --- Help ---------------------------------------------------------------------------------------------


def test_every_flag_stands_under_exactly_one_heading(monkeypatch):
    under = collections.Counter(flag.name for topic in OURS.values() for flag in topic)
    names = {field.name for field in dataclasses.fields(Settings)} - {"own"}
    assert under == dict.fromkeys(names, 1) and {flag.name for flag in of_settings(FLAGS)} == names
    text = help_at(100, monkeypatch)
    assert collections.Counter(FLAG.findall(text)) == under
    headings = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert headings == ["usage", *flags.TOPICS, "More: --helpfull"]


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_the_help_fits_the_terminal(columns, monkeypatch):
    abouts = {name: row.about for name, row in COMMANDS.items()}
    assert max(map(len, help_at(columns, monkeypatch, commands=abouts).splitlines())) <= columns


def test_a_flag_takes_two_lines_at_most_and_says_its_type_and_default(monkeypatch):
    text = help_at(100, monkeypatch)
    assert max(map(len, (entry.splitlines() for entry in re.split(r"\n(?=  --|\n)", text)[1:]))) <= 3
    lines = [" ".join(entry.split()) for entry in re.split(r"\n(?=  --|\n)", text)]
    for line in (
        "--num_classes=INT N, the ways of a classification task [5]",
        "--update_lr=NUMBER α, the inner step size [paper's, sinusoid 0.001]",
        "--[no]stop_grad first-order MAML: no second derivatives (section 5.2) [false]",
        "--logdir=PATH folder that holds the run folders [runs]",
        "--checkpoint=newest|best which checkpoint to test; best: at meta-validation [newest]",
        "--num_query=INT Q, query examples per class in training [K]",
        "--network=NAME the network [sinusoid mlp, images conv4]",
        "--meta_optimizer=NAME optimizer of step size β [adam, or the learner's]",
    ):
        assert line in lines


def test_help_is_shown_at_once_and_is_no_failure():
    ways = [("--help",), ("--helpshort",), ("-h",), ("help",), ("train", "--help"), ("help", "train")]
    (text,) = {python("-m", "maml", *way).stdout for way in ways}
    assert text.startswith("usage: maml") and text == python("main.py", "--help").stdout
    assert all(re.search(rf"^  {name} +\w", text, re.MULTILINE) for name in COMMANDS)
    full = python("-m", "maml", "--helpfull").stdout
    assert "<class> may be several" in " ".join(full.split()) and "several folders" not in text


def test_the_help_costs_a_tenth_of_a_second_of_work_and_imports_nothing_heavy():
    """Processor time, the least of three: the machine may be busy, or slow at everything."""
    measured = "import resource, subprocess, sys; subprocess.run([sys.executable, *{}], stdout=-3); "
    measured += "print(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]))"
    bare, own = (
        min(float(python("-c", measured.format(arguments)).stdout) for _ in range(3))
        for arguments in (["-c", "pass"], ["-m", "maml", "--help"])
    )
    assert own < max(0.2, 12 * bare)
    look = "import sys, atexit; from maml.commands import runner; sys.argv[1:] = ['--help']; "
    look += "atexit.register(lambda: print({'tensorflow', 'numpy', 'PIL'} & {*sys.modules})); runner.main()"
    assert python("-c", look).stdout.endswith("\nset()\n")


def test_the_version_is_that_of_all_that_counts():
    found = python("-m", "maml", "--version").stdout
    assert re.fullmatch(r"maml \d+\.\d+\.\d+, tensorflow 2\.\d\S*, keras 3\.\S+, Python 3\.\S+\n", found)


# --- Commands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_imports_is_there(name):
    row = COMMANDS[name]
    for home in filter(None, (row.work, row.check)):
        module, _, function = home.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert set(row.shows or ()) | set(row.defaults) <= set(Settings.__dataclass_fields__)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_its_own_flags_and_its_own_defaults(name):
    text = forked.run("-m", "maml", name, "--help", COLUMNS="110").stdout
    row = COMMANDS[name]
    own = [flag.name for flag in row.flags]
    assert FLAG.findall(text)[: len(own)] == own
    of_a_run = [flag.name for flag in of_settings(FLAGS) if row.shows is None or flag.name in row.shows]
    of_maml = {flag.name for flag in flags_of(DEFAULT_LEARNER)}
    assert [flag for flag in FLAG.findall(text)[len(own) :] if flag not in of_maml] == of_a_run
    entries = {FLAG.match(entry)[1]: " ".join(entry.split()) for entry in re.split(r"\n(?=  --|\n)", text)
               if FLAG.match(entry)}  # fmt: skip
    for flag in of_a_run:
        if row.otherwise and flag not in row.defaults:
            assert entries[flag].endswith(f"[{row.otherwise}]")
    if name == "adapt":
        assert entries["transductive"].endswith("[false]")
    if name == "train":
        assert entries["transductive"].endswith("[true]")


def test_the_table_of_what_there_is_can_be_read():
    text = python("-m", "maml", "list", COLUMNS="100").stdout
    assert max(map(len, text.splitlines())) <= 100
    for name in (*tables.LEARNERS, *tables.NETWORKS, *tables.DATASETS, *CELLS, "flags/sweeps/shots.flags"):
        assert re.search(rf"^  {name}( +\w|$)", text, re.MULTILINE), name
    assert "--num_filters" in text and "second-order MAML" in text and "[omniglot]" in text
    one = python("-m", "maml", "list", "networks").stdout
    assert one.startswith("Networks: --network=NAME") and "Learners" not in one
    refused = python("-m", "maml", "list", "nets", expect=2)
    assert "expected tables (learners, " in refused.stderr and "got nets" in refused.stderr


def test_a_command_is_the_same_however_it_is_called():
    by_name = python("main.py", "reproduce", "--helpshort").stdout
    assert by_name == python("-m", "maml", "help", "reproduce").stdout
    assert by_name.startswith("Runs the papers' experiments: `maml reproduce [CELL|LEARNER …]`")
    assert FLAG.findall(by_name)[:5] == ["list", "scale", "seeds", "results_dir", "datasource"]
    refused = python("-m", "maml", "prepare", "sinusoid", expect=2)
    assert "expected one of omniglot, miniimagenet" in refused.stderr and "got sinusoid" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adpat", "--support=photos"), "expected flags .* or a command .* got adpat. Did you mean adapt?"),
        (("help", "adpat"), "Did you mean adapt?"),
        (("swep",), "Did you mean sweep?"),
        (("--seed=3", "sweep"), "expected the command first, got sweep behind flags"),
    ],
)
def test_a_mistyped_command_is_told_the_right_one(arguments, message):
    done = python("main.py", *arguments, expect=2)
    assert re.search(message, done.stderr) and len(done.stderr.splitlines()) == 1 and not done.stdout


# --- What is typed where ------------------------------------------------------------------------------


def test_flagfiles_that_come_along_can_be_named_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(["--flagfile=flags/sinusoid_20shot.flags"]).update_batch_size == 20
    with pytest.raises(UserError, match=r"flags/nothing\.flags: .*got no such file"):
        parse(["--flagfile=flags/nothing.flags"])
    (tmp_path / "flags").mkdir()
    (tmp_path / "flags" / "sinusoid_20shot.flags").write_text("--update_batch_size=3")
    assert parse(["--flagfile=flags/sinusoid_20shot.flags"]).update_batch_size == 3


def test_commands_that_are_shown_can_be_typed_anywhere(tmp_path, monkeypatch):
    job = jobs.job([f"--flagfile={parsing.flagfiles()}/sinusoid_5shot.flags", "--seed=1"])
    assert job.command == "maml --flagfile=flags/sinusoid_5shot.flags --seed=1"
    shutil.copytree(ROOT / "flags", tmp_path / "maml" / "flagfiles")  # as it is installed
    monkeypatch.setattr(parsing, "__file__", str(tmp_path / "maml" / "settings" / "parsing.py"))
    installed = jobs.job([f"--flagfile={tmp_path}/maml/flagfiles/sinusoid_5shot.flags", "--seed=1"])
    assert installed.command == "maml --flagfile=flags/sinusoid_5shot.flags --seed=1"


# --- Whose reader goes --------------------------------------------------------------------------------


def test_help_without_a_reader_ends_quietly():
    command = f"{sys.executable} main.py --helpshort | head -0; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_on_a_full_disk_says_so():
    command = f"{sys.executable} main.py --helpshort >/dev/full"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "error: cannot write the output (No space left on device).\n"


STOPPED = """
import signal, sys, time
from maml.commands import runner
from maml.commands.table import Command
from maml.process import put_off_interruption

def work(_):
    with put_off_interruption() as stop:
        if "--nolog" in sys.argv:
            signal.raise_signal(signal.SIGINT)
            time.sleep(1)
        while stop.signal is None:
            print("iteration", flush=True)
        print("still goes on", file=sys.stderr, flush=True)
        print("and is saved", flush=True)
    stop.answer("saved")

runner.run(Command("", "", work), sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("pipe", "said"), [("|", "nobody reads the output any more: saved\n"), ("2>&1 |", "")]
)
def test_work_without_a_reader_is_ended_in_order(pipe, said, tmp_path):
    (tmp_path / "work.py").write_text(STOPPED)
    command = f"PYTHONPATH={ROOT} {sys.executable} {tmp_path}/work.py {pipe} head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (141, "iteration\n")
    assert done.stderr == ("still goes on\n" + said if said else "")


def test_an_interruption_that_ends_the_reader_too_is_one_request(tmp_path):
    """As Ctrl-C is where the output goes through `tee`: it is not taken for a second one, to stop at once."""
    (tmp_path / "work.py").write_text(STOPPED)
    command = f"PYTHONPATH={ROOT} {sys.executable} {tmp_path}/work.py --nolog | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr.split("\n")[-4:] == ["still goes on", "", "saved", ""]


def test_a_training_without_a_reader_saves_and_ends(tmp_path):
    flags = ("--metatrain_iterations=1000000", "--save_interval=50", "--num_test_tasks=2")
    with subprocess.Popen(
        [sys.executable, "main.py", f"--logdir={tmp_path}", *flags], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        head = [process.stdout.readline() for _ in range(8)]
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(120) == 141, said
    assert head[0].startswith("maml: sinusoid 5-shot on ") and "1,761 weights" in head[5]
    last = saved_iterations(tmp_path / SINUSOID)[-1]
    assert f"stopped at iteration {last} of 1000000, which is saved" in said
    assert len(said.splitlines()) == 1

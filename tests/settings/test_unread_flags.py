"""Flags of a run that a learner does not read: an error, or read; never silently without effect."""

import pytest

from maml import tables
from maml.commands.train import _header
from maml.errors import UserError
from maml.settings.settings import as_flagfile, parse

SOURCES = {"leo": ["--datasource=embeddings", "--data_dir=x.npz"]}
VALUES = {"update_lr": "0.123", "num_updates": "7", "test_num_updates": "7", "meta_lr": "0.5"}


def of(learner: str, *flags: str):
    return parse([f"--learner={learner}", *SOURCES.get(learner, ["--datasource=omniglot"]), *flags])


@pytest.mark.parametrize("learner", tables.LEARNERS)
def test_a_flag_without_effect_is_refused_and_the_flagfile_of_a_run_is_not(learner, tmp_path):
    settings = of(learner)
    for flag, what in tables.LEARNERS[learner].instead.items():
        given = f"--{flag}={VALUES[flag]}" if flag in VALUES else f"--{flag}"
        with pytest.raises(UserError, match=f"--{flag}: expected a learner that reads it.*{what}"):
            of(learner, given)
        assert {name for name in what.split() if name.startswith("--")} <= {
            f"--{name}{end}" for name in settings.by_flag for end in ("", ",", ".")
        }
    (tmp_path / "flags").write_text(as_flagfile(settings))
    assert parse([f"--flagfile={tmp_path / 'flags'}"]) == settings
    header = _header(settings, {"update_lr": 0.4}, "here")
    assert ("α = " in header) == ("update_lr" not in tables.LEARNERS[learner].instead)
    assert "update_lr" not in header or "update_lr" not in tables.LEARNERS[learner].instead
    assert ("β = " in header) == (learner != "reptile")


def test_an_optimizer_that_is_named_reads_the_outer_step_size():
    settings = of("reptile", "--meta_optimizer=sgd", "--meta_lr=0.5")
    assert settings.meta_lr == 0.5 and "β = 0.5 (sgd)" in _header(settings, {}, "here")


def test_the_header_counts_the_queries_of_training():
    settings = of("prototypical", "--train_num_classes=60", "--num_query=5")
    assert "1 task with N·Q = 300 query examples" in _header(settings, {}, "here")


def test_inner_steps_are_those_of_the_learners_own_flags():
    assert of("reptile", "--inner_iters=9").trained_steps == 9
    settings = of("leo", "--inner_unroll_length=3", "--finetuning_unroll_length=1")
    assert (settings.trained_steps, settings.tested_steps) == (4, 4)
    assert of("leo", "--test_num_updates=2").tested_steps == 2
    assert settings.transductive and not settings.is_transductive  # its network has no batch norm


def test_maml_adapts_the_part_that_is_named():
    assert parse([]).own == {"adapt": "all"}
    assert parse([]).folder_name == parse(["--adapt=all"]).folder_name
    assert parse(["--adapt=head"]).folder_name.endswith(".adapthead")
    assert "adapt=head" in _header(parse(["--adapt=head"]), {}, "here")
    assert "adapt" not in _header(parse([]), {}, "here")


@pytest.mark.parametrize("learner", ["maml", "prototypical"])
@pytest.mark.parametrize("source", ["omniglot", "miniimagenet"])
def test_the_papers_values_are_of_conv4_whatever_it_begins_with(learner, source):
    one, other = (
        parse([f"--datasource={source}", f"--learner={learner}", f"--network={network}"])
        for network in ("conv4", "conv4_torch")
    )
    assert (one.num_filters, one.max_pool) == (other.num_filters, other.max_pool)
    assert other.folder_name.replace(".conv4_torch", "") == one.folder_name != other.folder_name
    assert parse([f"--datasource={source}", "--network=resnet12"]).num_filters == 64  # which it does not read

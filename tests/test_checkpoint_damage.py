"""Damaged checkpoints are refused, or told of where an older one does."""

import warnings

import pytest

import shardopt
from tests.checkpoint_kit import damage, job, three
from tests.resume_job import check_equal, contents


@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json", "COMMITTED"])
def test_damage_is_refused_and_the_checkpoint_before_is_used(tmp_path, name, how):
    kept = three(tmp_path)
    damage(tmp_path / "step_00000003" / name, how)
    model, opt = job()
    if (name, how) == ("COMMITTED", "gone"):
        told = f"step_00000003 in {tmp_path} has no COMMITTED.*: step 2 is loaded instead"
        with pytest.warns(UserWarning, match=told):
            assert shardopt.load_checkpoint(tmp_path, model, opt)["step"] == 2
    else:
        before = contents(model, opt)
        with pytest.raises(ValueError, match=f"step_00000003.*{name}"):
            shardopt.load_checkpoint(tmp_path, model, opt, step=3)
        with pytest.raises(ValueError, match=name):
            shardopt.load_checkpoint(tmp_path / "step_00000003", model, opt)
        check_equal(contents(model, opt), before)
        with pytest.warns(UserWarning, match=f"step_00000003.*{name}"):
            assert shardopt.load_checkpoint(tmp_path, model, opt)["step"] == 2
    check_equal(contents(model, opt), kept[2])


def test_a_lost_marker_is_told_where_nothing_else_is_left(tmp_path):
    """Kills: a run that begins anew without a word, a warning of what is older than what is loaded."""
    three(tmp_path)
    for step in (1, 2):
        damage(tmp_path / f"step_0000000{step}" / "COMMITTED", "gone")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert shardopt.load_checkpoint(tmp_path, *job())["step"] == 3
    damage(tmp_path / "step_00000003" / "COMMITTED", "gone")
    told = "step_00000001, step_00000002, step_00000003 in .* have no COMMITTED.*: there is no other to load"
    with pytest.warns(UserWarning, match=told):
        assert shardopt.load_checkpoint(tmp_path, *job()) is None


def test_without_checksums_sizes_are_still_verified(tmp_path):
    three(tmp_path)
    damage(tmp_path / "step_00000003" / "__0_0.distcp", "flipped")
    assert shardopt.load_checkpoint(tmp_path, *job(), verify=False)["step"] == 3
    damage(tmp_path / "step_00000003" / "__0_0.distcp", "truncated")
    with pytest.warns(UserWarning, match="bytes instead of"):
        assert shardopt.load_checkpoint(tmp_path, *job(), verify=False)["step"] == 2


def test_when_all_are_damaged_it_says_so(tmp_path):
    three(tmp_path, keep=2)
    for folder in tmp_path.iterdir():
        damage(folder / "__0_0.distcp", "flipped")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"every checkpoint .*/step_00000003.*/step_00000002"),
    ):
        shardopt.load_checkpoint(tmp_path, *job())

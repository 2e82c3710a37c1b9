"""A run's folder: one run of one configuration."""

import json

import pytest

from opsdc_jax.config import InputError, default_config
from opsdc_jax.files import write_json
from opsdc_jax.workdir import Workdir, beside_finished, is_finished, read_config


def opened(path, **changes):
    settings = default_config()
    settings.update_from_flattened_dict(changes)
    return Workdir(path, settings)


def test_opening_writes_nothing_and_creating_does(tmp_path):
    workdir = opened(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    workdir.create()
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["teacher"]["every"] == 50


def test_the_same_configuration_opens_again(tmp_path):
    opened(tmp_path / "run").create()
    opened(tmp_path / "run").create()


def test_another_configuration_is_refused_and_named(tmp_path):
    opened(tmp_path / "run").create()
    with pytest.raises(InputError, match=r"optim.lr: 1e-06 -> 0.5; seed: 0 -> 7"):
        opened(tmp_path / "run", **{"optim.lr": 0.5, "seed": 7})


def test_a_run_may_go_on_in_another_layout(tmp_path):
    opened(tmp_path / "run").create()
    opened(tmp_path / "run", **{"mesh.tensor": 4, "train.micro_batch_size": 1, "log.samples": 1})
    with pytest.raises(InputError, match=r"train.batch_size: 32 -> 16"):
        opened(tmp_path / "run", **{"train.batch_size": 16, "mesh.tensor": 4})


def test_micro_batches_are_part_of_a_run_whose_loss_depends_on_them(tmp_path):
    opened(tmp_path / "run", **{"loss.weights": "micro_batches"}).create()
    changes = {"loss.weights": "micro_batches", "train.micro_batch_size": 1}
    with pytest.raises(InputError, match=r"train.micro_batch_size: 4 -> 1"):
        opened(tmp_path / "run", **changes)


@pytest.mark.parametrize("content", ["{}", '{"model": {}}', '{"seed": 0, "model": "x"}'])
def test_what_is_no_configuration_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="is no run's configuration: it lacks"):
        read_config(tmp_path)


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        opened(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["checkpoints", "eval/tiny"])
def test_links_to_other_folders_are_refused(tmp_path, name):
    """What a run deletes lies in its own folder; the folder itself may be a link."""
    opened(tmp_path / "run").create()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    opened(tmp_path / "link")
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=rf"{name} is a link to another folder"):
        opened(tmp_path / "run")


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"'])
def test_a_damaged_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"cannot be read|does not hold a JSON object"):
        opened(tmp_path)


def test_an_unwritable_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        opened(tmp_path / "file" / "run").create()


def test_a_new_run_goes_beside_finished_ones(tmp_path):
    path = tmp_path / "tiny"
    finished = None
    for expected in ("tiny", "tiny-2", "tiny-3"):
        assert beside_finished(path) == (tmp_path / expected, finished)
        taken = opened(tmp_path / expected)
        taken.create()
        assert beside_finished(path) == (taken.path, finished), "an unfinished run is continued"
        write_json(taken.summary, {})
        assert is_finished(taken.path)
        finished = taken.path


def test_write_json_replaces_in_one_go(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

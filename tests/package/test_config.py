# SPDX-License-Identifier: Apache-2.0
import re
from types import SimpleNamespace

import pytest

from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.engine.checks import check_on_request


def parse(options):
    return SleepModeConfig.from_vllm_config(SimpleNamespace(additional_config=options))


def test_defaults():
    config = parse({})
    assert (config.keep_host_backup, config.chunk_mib, config.wake_timeout_s) == (True, 64, 0.0)


def test_values_are_taken():
    config = parse({"sleep_mode": {"chunk_mib": 2, "wake_timeout_s": 1.5}, "other": 1})
    assert (config.chunk_mib, config.wake_timeout_s) == (2, 1.5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"chunk_mb": 64}, "chunk_mb=64"),
        ({"chunk_mib": 3}, "chunk_mib=3.*multiple of 2"),
        ({"chunk_mib": 0}, "chunk_mib=0"),
        ({"chunk_mib": "64"}, "chunk_mib='64'"),
        ({"wake_timeout_s": -1}, "wake_timeout_s=-1"),
        ({"wake_timeout_s": float("inf")}, "wake_timeout_s=inf"),
        ({"keep_host_backup": "yes"}, "keep_host_backup='yes'"),
    ],
)
def test_bad_options_are_named_with_those_that_exist(options, named):
    with pytest.raises(ValueError, match=f"{named}.*The options are keep_host_backup, chunk_mib"):
        parse({"sleep_mode": options})


def test_options_that_exclude_each_other():
    with pytest.raises(ValueError, match="skip_unchanged needs the backup"):
        parse({"sleep_mode": {"skip_unchanged": True, "keep_host_backup": False}})


def test_a_backup_on_disk_needs_a_directory(tmp_path):
    config = parse({"sleep_mode": {"host_backup": "disk", "backup_dir": str(tmp_path)}})
    assert (config.host_backup, config.backup_dir) == ("disk", str(tmp_path))
    assert config.disk_blocks_mib == 256
    with pytest.raises(ValueError, match="host_backup='disk' needs backup_dir"):
        parse({"sleep_mode": {"host_backup": "disk"}})
    with pytest.raises(ValueError, match="disk_blocks_mib needs backup_dir"):
        parse({"sleep_mode": {"disk_blocks_mib": 32}})
    also = parse({"sleep_mode": {"backup_dir": str(tmp_path), "disk_blocks_mib": 32}})
    assert (also.place, config.place) == ("host", "disk")
    also.check_place("disk")
    with pytest.raises(ValueError, match="to='disk' needs the option backup_dir"):
        parse({}).check_place("disk")


def test_bad_values_for_a_disk_are_named(tmp_path):
    for option, reason in {
        "backup_dir": ("relative", "backup_dir='relative'.*an absolute path is needed"),
        "disk_blocks_mib": (40, "disk_blocks_mib=40.*multiple of 16"),
    }.items():
        options = {"host_backup": "disk", "backup_dir": str(tmp_path), option: reason[0]}
        with pytest.raises(ValueError, match=reason[1]):
            parse({"sleep_mode": options})


def test_a_directory_in_which_no_file_can_be_created_is_named(tmp_path):
    """A start asks; in /proc nobody can, not even root."""
    file = tmp_path / "file"
    file.write_text("")
    reasons = {
        str(tmp_path / "missing"): "No such file or directory",
        str(file): "Not a directory",
        "/proc": "",
    }
    for path, reason in reasons.items():
        config = parse({"sleep_mode": {"host_backup": "disk", "backup_dir": path}})
        with pytest.raises(ValueError, match=f"backup_dir='{re.escape(path)}': no.*{reason}"):
            config.check_backup_dir()
    parse({"sleep_mode": {"host_backup": "disk", "backup_dir": str(tmp_path)}}).check_backup_dir()
    assert list(tmp_path.iterdir()) == [file]


def test_the_section_must_be_a_mapping():
    with pytest.raises(ValueError, match="must be a mapping, not 64"):
        parse({"sleep_mode": 64})


def test_a_device_is_not_waited_for_longer_than_other_ranks_wait():
    named = "device_timeout_s=90 is more than rank_timeout_s=30"
    with pytest.raises(ValueError, match=named):
        parse({"sleep_mode": {"device_timeout_s": 90.0, "rank_timeout_s": 30.0}})
    options = [{}, {"rank_timeout_s": 30.0}, {"rank_timeout_s": 30.0, "device_timeout_s": 30.0}]
    configs = [parse({"sleep_mode": given}) for given in options]
    assert [config.device_timeout_s for config in configs] == [60.0, 15.0, 30.0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"idle_sleep_s": 0.01}, "idle_sleep_s=0.01"),
        ({"idle_sleep_s": float("inf")}, "idle_sleep_s=inf"),
        ({"idle_sleep_s": 9, "idle_level": 0}, "idle_level=0"),
        ({"idle_level": 2}, "idle_level needs idle_sleep_s"),
        ({"idle_sleep_s": 9, "idle_level": 2}, "after_level2='refuse' loads none at the wake"),
        (
            {"idle_sleep_s": 9, "idle_level": 2, "after_level2": "warn"},
            "set after_level2='reload', or idle_level=1",
        ),
        (
            {"wake_on_request": True, "while_asleep": "refuse"},
            "wake_on_request and while_asleep='refuse' exclude each other",
        ),
    ],
)
def test_sleeps_by_itself_that_could_not_be_served_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        parse({"sleep_mode": options})


def test_backups_that_move_by_themselves_need_a_place_to_move_to(tmp_path):
    directory = {"backup_dir": str(tmp_path)}
    assert parse({"sleep_mode": {**directory, "to_disk_after_s": 600.0}}).to_disk_after_s == 600
    with pytest.raises(ValueError, match="to_disk_after_s needs backup_dir"):
        parse({"sleep_mode": {"to_disk_after_s": 600.0}})
    with pytest.raises(ValueError, match="host_backup='disk' puts them at once"):
        parse({"sleep_mode": {**directory, "to_disk_after_s": 600.0, "host_backup": "disk"}})


@pytest.mark.parametrize(
    "options",
    [
        {"idle_sleep_s": 9.0},
        {"wake_on_request": True},
        {"to_disk_after_s": 9.0, "backup_dir": "/tmp"},
    ],
)
def test_engines_that_cannot_decide_alone_do_not_sleep_by_themselves(options):
    def engine(backend="mp", enabled=True, **options):
        return SimpleNamespace(
            additional_config={"sleep_mode": options},
            model_config=SimpleNamespace(enable_sleep_mode=enabled),
            parallel_config=SimpleNamespace(distributed_executor_backend=backend),
        )

    check_on_request(engine(**options))
    with pytest.raises(ValueError, match=r"external_launcher.*on every rank"):
        check_on_request(engine("external_launcher", **options))
    with pytest.raises(ValueError, match="sleep mode is not enabled"):
        check_on_request(engine(enabled=False, **options))
    check_on_request(engine("external_launcher", enabled=False))

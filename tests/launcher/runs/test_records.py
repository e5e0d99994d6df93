from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from launcher.runs.records import Records
from mokd.runs.run_directory import RunDirectory
from tests.disks import fill, small_file_system

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with few inodes and little room."""
    with small_file_system(tmp_path / "small", "size=64k,nr_inodes=16") as folder:
        yield folder


@pytest.mark.parametrize("what", ["inodes", "room"])
@pytest.mark.parametrize("left", [0, 1, 2])
def test_full_file_system_leaves_no_half_launch(small_disk: Path, what: str, left: int) -> None:
    run = RunDirectory(small_disk / "run")
    run.jobs.mkdir(parents=True, mode=0o700)
    records = Records(run)
    files = fill(small_disk, what, left)
    try:
        first, refusal = records.new_launch("slurm", {}, run.jobs).number, None
    except UserError as error:
        first, refusal = 0, str(error)
    assert refusal is None or ("cannot be recorded" in refusal and "\n" not in refusal)
    if left == 0:
        assert refusal
    assert not [path for path in run.jobs.rglob("*") if path.is_file() and not path.read_text()]
    for file in files:
        file.unlink()
    assert records.new_launch("slurm", {}, run.jobs).number == first + 1
    assert [launch.number for launch in records.launches()] == list(range(1, first + 2))


def test_an_empty_launch_file_is_passed_over(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (run.jobs / "launches").mkdir(parents=True)
    run.jobs.chmod(0o700)
    (run.jobs / "launches" / "0001.json").touch()
    assert Records(run).new_launch("slurm", {}, run.jobs).number == 2


def test_launches_and_attempts_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        launches = list(pool.map(lambda _: Records(run).new_launch("slurm", {}, run.jobs).number, range(24)))
        attempts = list(pool.map(lambda _: run.claim_attempt(), range(24)))
    assert sorted(launches) == sorted(attempts) == list(range(1, 25))
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]

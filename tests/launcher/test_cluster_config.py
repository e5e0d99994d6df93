from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from launcher.config import load_cluster, minutes


def test_time_limits() -> None:
    given = ["90", "1:30:00", "2-0", "1-02:30", "10:30", "0:00:01"]
    assert [minutes(limit) for limit in given] == [90, 90, 2880, 1590, 11, 1]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"node": 2}, "cluster.* node: unknown key; did you mean 'nodes'"),
        ({"nodes": 0}, "nodes"),
        ({"time": "tomorrow"}, "MM:SS"),
        ({"time": "1", "signal_lead_seconds": 90}, "not shorter than the time limit"),
        ({"sbatch": {"nodes": 3}}, "set by the launcher"),
        ({"sbatch": {"mem": "1\n#SBATCH --uid=0"}}, "one line"),
        ({"sbatch": {"mem=1 --wrap": "x"}}, "long name of an sbatch parameter"),
        ({"partition": "a\nrm -rf"}, "one line"),
        ({"environment": {"A;rm": "x"}}, "not the name of an environment variable"),
        ({"setup": ["a\nb"]}, "one line per entry"),
        ({"site": "../../etc"}, "name of a profile"),
        ({"site": "nowhere"}, "no profile"),
    ],
)
def test_mistakes_are_named(section: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        load_cluster(section, {}, "x.yaml")
    assert "\n" not in str(caught.value)


def test_flags_beat_the_file_beats_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "mokd" / "sites"
    folder.mkdir(parents=True)
    (folder / "here.yaml").write_text("partition: gpu\naccount: us\nnodes: 2\nsbatch: {mem: 0, comment: site}\n")
    section = {"site": "here", "nodes": 4, "sbatch": {"comment": "file"}}
    cluster = load_cluster(section, {"account": "me", "qos": None}, "x.yaml")
    assert (cluster.partition, cluster.nodes, cluster.account, cluster.qos) == ("gpu", 4, "me", None)
    assert cluster.sbatch == {"mem": 0, "comment": "file"}


def test_examples_of_sites_are_valid() -> None:
    from data_pipeline.core.schema import read_yaml

    examples = sorted((Path(__file__).resolve().parents[2] / "slurm" / "sites").glob("*.yaml"))
    assert examples
    for path in examples:
        load_cluster(read_yaml(path), {}, str(path))

"""A run that stops on a non-finite loss says all it knows, and may go on with other rates, openly."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from data_pipeline.beton.convert import convert
from data_pipeline.beton.synthetic import generate
from data_pipeline.core.errors import UserError
from launcher.slurm.status import read_status
from mokd.checkpointing import choose, state
from mokd.distributed.local_ranks import supervise, train_locally
from mokd.runs.exit_codes import EXIT_DONE
from mokd.runs.files import replace_json
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory
from mokd.training.feasibility import data_identity
from mokd.training.start import change, prepare
from tests.support import tiny_config

CHANGES = {"optim__max_steps": 6, "checkpoint__every_steps": 2, "checkpoint__keep_last": 10}


def test_a_poisoned_batch_ends_the_run_for_good_and_is_told_by_sample(beton: Path, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", tiny_config(beton, **CHANGES))
    assert supervise([sys.executable, "-m", "tests.programs.train_poisoned", str(run.path), "4"], 2) == 7
    records = [json.loads((run.failures / "step-4" / f"rank-{rank}.json").read_text()) for rank in range(2)]
    bad = records[1]
    assert (records[0]["views_finite"], bad["views_finite"]) == (True, False)
    assert set(records[0]["not_finite"]) < set(bad["not_finite"])  # some by the batch norm that ranks share
    assert "loss/vit/total" in bad["not_finite"]
    assert bad["loss_terms"]["loss/vit/total"] == "nan"
    assert len(bad["sample_ids"]) == 4
    assert not set(bad["sample_ids"]) & set(records[0]["sample_ids"])
    assert bad["norms"]["resnet"].keys() == records[0]["norms"]["resnet"].keys()
    assert all(norms["student"] > 0 or name.endswith("bias") for name, norms in records[0]["norms"]["vit"].items())
    monitors = json.loads((run.failures / "step-4" / "monitors.json").read_text())
    assert monitors["step"] == 3
    assert all(value is not None for value in monitors.values())
    reason = run.read_status()["reason"]
    assert reason.startswith("NonFiniteLossError: step 4: loss/")
    assert f"(rank 1, samples {', '.join(map(str, bad['sample_ids']))})" in reason


@pytest.fixture(scope="module")
def trained(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = RunDirectory.create(tmp_path_factory.mktemp("trained") / "run", tiny_config(beton, **CHANGES))
    assert train_locally(run.path, 1) == EXIT_DONE
    return run


@pytest.fixture
def run(trained: RunDirectory, tmp_path: Path) -> RunDirectory:
    return RunDirectory(Path(shutil.copytree(trained.path, tmp_path / "tiny")))


def test_rates_clipping_and_precision_change_openly_from_an_older_step(run: RunDirectory) -> None:
    before = run.metrics_file.read_bytes()
    overrides = ["branches.vit.optimizer.lr=0.001", "branches.vit.weight=0.3", "optim.clip_grad_norm=1.0"]
    change(run, [*overrides, "precision.tf32=false"], 2)
    assert run.read_status()["state"] == "stopped"
    assert train_locally(run.path, 1) == EXIT_DONE
    changes = {c["key"]: (c["step"], c["before"], c["after"]) for c in read_metrics(run.changes_file)}
    assert changes == {
        "branches.1.optimizer.lr": (2, 0.003, 0.001),
        "branches.1.weight": (2, 0.1, 0.3),
        "optim.clip_grad_norm": (2, 3.0, 1.0),
        "precision.tf32": (2, True, False),
    }
    assert read_status(run).changes == read_metrics(run.changes_file)
    kept = run.path / "before-rewind-1"
    assert (kept / "metrics.jsonl").read_bytes() == before
    assert sorted(path.name for path in kept.glob("step-*")) == ["step-4", "step-6"]
    assert [record["step"] for record in read_metrics(run.metrics_file)] == [1, 2, 3, 4, 5, 6]


def test_other_keys_may_not_change_and_a_refusal_changes_nothing(run: RunDirectory) -> None:
    for override in ("optim.epochs=9", "branches.vit.optimizer.kind=sgd", "objective.prototypes=41"):
        with pytest.raises(UserError, match="cannot resume"):
            change(run, [override], 2)
    with pytest.raises(UserError, match=r"--from-step 3: .* has checkpoints of steps 2, 4, 6"):
        change(run, [], 3)
    assert run.read_status()["state"] == "done"
    assert not list(run.path.glob("before-*"))


def test_other_images_of_the_same_number_are_refused(run: RunDirectory, beton: Path, tmp_path: Path) -> None:
    config = run.config()
    generate(tmp_path / "images", per_class_train=16, per_class_test=1, size_px=40)
    convert([tmp_path / "images" / "train"], tmp_path / "other.beton")
    for name in ("train.beton", "train.beton.manifest.jsonl"):
        shutil.copy2(beton.with_name(name), tmp_path / name)

    def resume(**data: object) -> None:
        changed = config.model_copy(update={"data": config.data.model_copy(update=data)})
        prepare(changed, run.path.parent, resume=True, world_size=1)

    resume(train=tmp_path / "train.beton")  # the same images elsewhere
    with pytest.raises(UserError, match=r"cannot resume, data.fingerprint is '\w+' now"):
        resume(train=tmp_path / "other.beton")
    with pytest.raises(UserError, match=r"cannot resume, data.order is 'blocks' now and was 'permutation'"):
        resume(order="blocks")
    with pytest.raises(UserError, match=r"cannot resume, data.limit is 48 now and was 40"):
        resume(limit=48)


def test_a_checkpoint_from_before_these_keys_still_resumes(run: RunDirectory) -> None:
    found = choose.newest(run)
    assert found is not None
    old = {k: v for k, v in found.state["identity"].items() if not k.startswith("data.")}
    replace_json(found.path / "state.json", {**found.state, "identity": old})
    now = state.identity(run.config(), data_identity(run.config()))
    assert {"data.fingerprint", "data.order", "data.limit"} <= now.keys()
    state.check_identity(type(found)(found.path, found.step, {**found.state, "identity": old}), now)

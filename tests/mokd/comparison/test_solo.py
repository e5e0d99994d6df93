"""The solo baseline: one branch of a pair by itself, everything else equal."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.core.errors import UserError
from data_pipeline.core.schema import dump_yaml
from mokd.checkpointing import state
from mokd.comparison.solo import load_run_config, solo
from mokd.config import RunConfig
from mokd.distributed.process_group import Ranks
from mokd.distributed.stopping import StopRequest
from mokd.runs.heartbeat import Heartbeat
from mokd.runs.run_directory import RunDirectory
from mokd.training.trainer import Trainer
from tests.support import CONTRASTIVE, RESNET, VIT, mokd, tiny_config

# stochastic depth in both, often enough to be seen: what one branch draws must not depend on the other
DEEP_RESNET, DEEP_VIT = {**RESNET, "drop_path": 0.4}, {**VIT, "drop_path": 0.4}


def trainer(config: RunConfig, folder: Path, stack: ExitStack) -> Trainer:
    run = RunDirectory.create(folder / config.name, config)
    attempt = run.claim_attempt()
    heartbeat = Heartbeat(run, attempt, 0)
    built = Trainer(run, config, Ranks(), torch.device("cpu"), StopRequest(), attempt, heartbeat)
    for part in (built.loader, built.report, built.checkpointer):
        stack.enter_context(closing(part))
    return built


def shared(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights but for those that serve the other branch's features."""
    return {k: v.clone() for k, v in network.state_dict().items() if not k.startswith("matching.")}


@pytest.mark.parametrize("name", ["resnet", "vit"])
@pytest.mark.parametrize(("changes", "own"), [({}, {"self_mlp", "self_thead"}), (CONTRASTIVE, {"self"})])
def test_the_first_step_alone_is_that_in_company_without_the_cross_terms(
    name: str, changes: dict[str, Any], own: set[str], beton: Path, tmp_path: Path
) -> None:
    pair = tiny_config(beton, branches=[DEEP_RESNET, DEEP_VIT], **changes)
    alone = solo(pair, name)
    assert [branch.name for branch in alone.branches] == [name]
    with ExitStack() as stack:
        together, single = trainer(pair, tmp_path, stack), trainer(alone, tmp_path, stack)
        place = [branch.name for branch in pair.branches].index(name)
        for network in ("student", "teacher"):
            expected = shared(getattr(together.branches[place], network))
            found = shared(getattr(single.branches[0], network))
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[key], found[key]) for key in expected)
        assert [key for key in single.branches[0].student.state_dict() if key.startswith("matching.")] == []
        batches = [next(iter(t.loader.epoch(0, 0))).views for t in (together, single)]
        assert len(batches[0]) == len(pair.views.groups)
        assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
        results = [t.training_step.run(0, batches[0], 0) for t in (together, single)]
        losses = [results[0].losses[place], results[1].losses[0]]
        assert set(losses[1].terms) == own
        assert set(losses[0].terms) > own
        for term in own:
            assert torch.equal(losses[0].terms[term], losses[1].terms[term]), term
        assert results[0].rates[place] == results[1].rates[0]
        # centres and banks are the branch's own
        memory = [t.objective.state_tensors() for t in (together, single)]
        assert all(torch.equal(memory[0][key], value) for key, value in memory[1].items())


CROSSLESS = {"objective__terms": {"cross_mlp": False, "cross_search": False}}


@pytest.mark.parametrize("changes", [CROSSLESS, {**CONTRASTIVE, "objective__cross_weight": 0.0}])
def test_a_pair_without_cross_terms_is_its_solo_baselines_to_the_bit(
    changes: dict[str, Any], beton: Path, tmp_path: Path
) -> None:
    pair = tiny_config(beton, branches=[DEEP_RESNET, DEEP_VIT], optim__freeze_last_layer_epochs=0, **changes)
    configs = [pair, solo(pair, "resnet"), solo(pair, "vit")]
    states: dict[str, list[dict[str, torch.Tensor]]] = {"resnet": [], "vit": []}
    with ExitStack() as stack:
        for config in configs:
            built = trainer(config, tmp_path, stack)
            for step, batch in enumerate(built.loader.epoch(0, 0)):
                built.training_step.run(step, batch.views, 0)
            assert step == 4
            for name, tensors in state.collect(built.branches, built.objective, main=True).items():
                if name != state.OBJECTIVE_FILE:
                    states[name.removeprefix("branch-")].append(tensors)
    for name, (together, single) in states.items():
        assert together.keys() == single.keys()
        different = [key for key in together if not torch.equal(together[key], single[key])]
        assert different == [], name
        assert any(key.startswith("optimizer.") for key in together)


def test_a_branch_draws_the_same_wherever_it_stands(beton: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        losses = {}
        for order, branches in {"a": [DEEP_RESNET, DEEP_VIT], "b": [DEEP_VIT, DEEP_RESNET]}.items():
            built = trainer(tiny_config(beton, name=order, branches=branches), tmp_path, stack)
            views = next(iter(built.loader.epoch(0, 0))).views
            result = built.training_step.run(0, views, 0)
            losses[order] = {b.name: loss.terms for b, loss in zip(built.branches, result.losses, strict=True)}
    for name, terms in losses["a"].items():
        assert all(torch.equal(value, losses["b"][name][term]) for term, value in terms.items()), name


def test_only_the_branches_and_the_name_change(tmp_path: Path) -> None:
    pair = tiny_config()
    alone = solo(pair, "vit")
    assert alone.name == "tiny-solo-vit"
    assert alone == pair.model_copy(update={"name": "tiny-solo-vit", "branches": pair.branches[1:]})
    assert solo(pair, "vit", name="other").name == "other"
    assert solo(alone, "vit", name=alone.name) == alone
    # what lies in the run directory is an ordinary configuration
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(alone))
    assert load_run_config(file, [], None) == alone


def test_a_name_that_is_given_is_the_pairs(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_yaml(tiny_config()))
    assert load_run_config(file, ["optim.epochs=2"], "vit").name == "tiny-solo-vit"
    assert load_run_config(file, ["name=mine", "optim.epochs=2"], "vit").name == "mine-solo-vit"
    # as a sweep names its runs
    assert load_run_config(file, ["name=mine-solo-vit-seed-2"], "vit").name == "mine-solo-vit-seed-2"
    assert len(load_run_config(file, [], None).branches) == 2


def test_what_cannot_be_trained_alone_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"--solo vitt: no such branch in tiny; there are: resnet, vit$"):
        solo(tiny_config(), "vitt")
    crossed = tiny_config(objective__terms={"self_mlp": False, "self_thead": False})
    with pytest.raises(UserError, match=r"tiny-solo-vit: .*a branch alone has the self terms only"):
        solo(crossed, "vit")


def test_on_the_command_line(beton: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_yaml(tiny_config(beton, optim__max_steps=1)))
    done = mokd("train", file, "--solo", "vit", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = RunDirectory.open(tmp_path / "runs" / "tiny-solo-vit")
    assert run.read_status()["state"] == "done"
    assert [branch.name for branch in run.config().branches] == ["vit"]
    assert not any("resnet" in line or "cross" in line for line in run.metrics_file.read_text().splitlines())

    wrong = mokd("train", file, "--solo", "cnn", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "there are: resnet, vit" in wrong.stderr
    planned = mokd("launch", file, "--solo", "resnet", "--local", "--dry-run", "--json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "tiny-solo-resnet" in planned.stdout

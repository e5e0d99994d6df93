from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_pipeline.core import schema
from data_pipeline.core.errors import UserError
from mokd.config import RunConfig, load_config
from tests.support import CONTRASTIVE, ROOT, tiny, tiny_config

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_and_survive_being_written_out(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert schema.validate(RunConfig, yaml.safe_load(schema.dump_yaml(config)), "written") == config
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("command" in line for line in header), "the header says how to run it"


def test_the_papers_recipe() -> None:
    config = load_config(ROOT / "configs" / "vit_s_resnet50.yaml")
    cnn, vit = config.branches
    assert (config.optim.epochs, config.optim.global_batch, config.optim.warmup_epochs) == (100, 256, 10)
    assert (config.optim.clip_grad_norm, config.optim.freeze_last_layer_epochs) == (3.0, 1)
    assert config.optim.teacher_momentum == (0.996, 1.0)
    assert (cnn.optimizer.lr, cnn.optimizer.min_lr, cnn.optimizer.decay_range) == (0.1, 0.0048, (1e-4, 1e-4))
    assert cnn.t_head_group is not None
    assert (cnn.t_head_group.lr, cnn.t_head_group.min_lr, cnn.t_head_group.decay_range) == (3e-4, 1e-5, (0.04, 0.4))
    assert (vit.optimizer.lr, vit.optimizer.min_lr, vit.optimizer.decay_range) == (3e-4, 1e-5, (0.04, 0.4))
    assert (cnn.weight, vit.weight, vit.drop_path) == (1.0, 0.1, 0.1)
    assert (cnn.mlp_head.train_gain, vit.mlp_head.train_gain) == (False, True)
    assert (cnn.teacher_temp_warmup_epochs, vit.teacher_temp_warmup_epochs) == (50, 30)
    objective = config.objective
    assert (objective.prototypes, objective.student_temp, objective.teacher_temp) == (65536, 0.1, (0.04, 0.07))
    assert (objective.cross_temp_warmup_epochs, objective.center_momentum) == (30, 0.9)
    assert (objective.t_head.width, objective.t_head.depth, objective.t_head.heads) == (384, 3, 6)
    views = config.views
    assert (views.global_crops.count, views.global_crops.size_px, views.global_crops.area_scale) == (
        2,
        224,
        (0.25, 1.0),
    )
    assert (views.local_crops.count, views.local_crops.size_px, views.local_crops.area_scale) == (8, 96, (0.05, 0.25))
    assert views.global_crops.blur_probability == (1.0, 0.1)
    assert views.global_crops.solarize_probability == (0.0, 0.2)
    jitter = views.jitter
    assert (jitter.probability, jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (
        0.8,
        0.4,
        0.4,
        0.2,
        0.1,
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.epoch=5", "optim.epoch: unknown key; did you mean 'epochs'?"),
        ("optim.epochs=five", 'optim.epochs: given "five", expected a valid integer'),
        ("optim.epochs=1.5", "optim.epochs: given 1.5, expected a valid integer"),
        ("branches.vit.optimizer.lrr=3", "branches.1.optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("branches.vit.optimizer.kind=lion", "expected 'sgd' or 'adamw'"),
        ("branches.9.weight=1", "there are 2: resnet, vit"),
        ("objective=diino", "objective.kind"),
        ("nme=x", "nme: unknown key; did you mean 'name'?"),
        ("name=a/b", 'name: given "a/b", letters, digits'),
        ("optim", "write it as key.path=value"),
        ("optim.epochs.x=1", "holds a single value"),
        ("objective.prototypes=1", "prototypes: at least 2"),
        ("objective.t_head.heads=7", "does not divide by heads 7"),
        ("views.local_crops.count=0", "needs views.local_crops.count > 0"),
        ("views.std=[0,1,1]", "every entry must be positive"),
        ("evaluation.every_epochs=1", "needs both evaluation.train and evaluation.test"),
        ("optim.teacher_momentum=[0.9,1.5]", "less than or equal to 1"),
        ("seed=.nan", "seed"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(override: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tiny()))
    with pytest.raises(UserError) as caught:
        load_config(file, ["data.workers=3", override])
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert "workers" not in message  # nor any other override that is right


def test_overrides_reach_into_lists_by_name_and_keep_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tiny()))
    overrides = [
        "branches.vit.weight=0.5",
        "branches.0.weight=2",
        "checkpoint.keep_last=4",
        "views.local_crops.count=5",
    ]
    config = load_config(file, [*overrides, "optim.warmup_epochs=1e-1"])
    assert [b.weight for b in config.branches] == [2, 0.5]
    assert config.checkpoint.keep_last == 4
    assert (config.views.local_crops.count, config.views.local_crops.size_px) == (5, 16)
    assert config.optim.warmup_epochs == 0.1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("name: a\nseed: 1\nname: b", "line 3: not valid YAML: 'name' stands twice"),
        ("name: a\noptim: {epochs: 1, epochs: 2}", "line 2: not valid YAML: 'epochs' stands twice"),
    ],
)
def test_files_that_are_no_configuration(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=says):
        load_config(file)
    with pytest.raises(UserError, match="no such configuration file"):
        load_config(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mlp_head", {"hidden": 64}),
        ("t_head_group", {"lr": 0.1}),
        ("teacher_temp_warmup_epochs", 3),
    ],
)
def test_contrastive_refuses_what_only_the_other_objective_reads(key: str, value: object) -> None:
    raw = tiny(**CONTRASTIVE)
    config = schema.validate(RunConfig, raw, "tiny")
    # a resolved configuration, with every default written out, is read again
    assert schema.validate(RunConfig, config.model_dump(mode="json"), "resolved") == config
    raw["branches"][0][key] = value
    with pytest.raises(UserError, match=rf"branches.resnet.{key}: objective contrastive has no such part"):
        schema.validate(RunConfig, raw, "tiny")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("execution.overlap_teachers", True),
        ("parallel.strategy", "fsdp"),
        ("precision.compute", "fp16"),
        ("optim.accumulate", 2),
    ],
)
def test_a_step_that_cannot_be_recorded_is_refused_where_cuda_graphs_are_asked_for(key: str, value: object) -> None:
    changes = {"execution__cuda_graphs": True, key.replace(".", "__"): value}
    with pytest.raises(UserError, match=rf"execution.cuda_graphs: a step with {key}.* cannot be recorded"):
        tiny_config(**changes)
    del changes["execution__cuda_graphs"]
    tiny_config(**changes)

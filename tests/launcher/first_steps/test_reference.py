"""The page of all keys is that of the schema, and every key says what it means."""

from launcher.cli.console import find_config
from launcher.first_steps.reference import PAGE, all_keys, page
from mokd.config import load_config
from tests.support import ROOT, mokd


def test_the_page_is_made_from_the_schema() -> None:
    made = "run `python -m launcher.first_steps.reference`"
    assert (ROOT / PAGE).read_text(encoding="utf-8") == page(), made


def test_every_key_says_what_it_means_and_is_real() -> None:
    found = list(all_keys())
    assert [key.name for key in found if not key.meaning] == []
    names = {key.name for key in found}
    config = load_config(find_config("demo.yaml"))

    def leaves(value: object, name: str) -> None:
        if isinstance(value, dict) and name not in ("cluster", "branches[N].backbone_options"):
            for key, part in value.items():
                leaves(part, f"{name}.{key}" if name else key)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for part in value:
                leaves(part, f"{name}[N]")
        elif name != "cluster" and value is not None:
            assert name in names

    leaves(config.model_dump(mode="json"), "")


def test_defaults_are_those_of_where_a_section_stands() -> None:
    defaults = {key.name: key.default for key in all_keys()}
    assert (defaults["views.global_crops.count"], defaults["views.local_crops.count"]) == ("2", "8")
    assert defaults["evaluation.semi.adamw.layer_decay"] == "0.75"
    assert defaults["branches[N].optimizer.lr"] == ""


def test_a_part_of_it_on_the_command_line() -> None:
    told = mokd("config", "--keys", "optim.warmup")
    assert told.stdout == "optim.warmup_epochs = 10.0   [number]\n    of the learning rate, linear\n"
    refused = mokd("config", "--keys", "optin")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --keys optin: no key begins so; sections: name, seed, objective, ")

"""`mokd site`: profiles of clusters."""

from __future__ import annotations

from typing import Annotated

import typer
import yaml

from data_pipeline.core.errors import UserError
from launcher.cli.console import AsJson, print_json
from launcher.config import DEFAULT_SITE, load_cluster, site_file, site_names

app = typer.Typer(help="Profiles of clusters in ~/.config/mokd/sites/.", no_args_is_help=True)


def register(parent: typer.Typer) -> None:
    """Adds the commands around site profiles."""
    app.command("init", epilog="Example: mokd site init --partition gpu")(init)
    app.command("list", epilog="Example: mokd site list")(list_)
    app.command("show", epilog="Example: mokd site show default")(show)
    parent.add_typer(app, name="site")


def init(
    name: Annotated[str, typer.Option(help="the profile's name; `default` is used where none is named")] = DEFAULT_SITE,
    partition: Annotated[str | None, typer.Option(help="default: the usual one, or one with GPUs")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a profile that exists")] = False,
) -> None:
    """Write a profile from what the cluster says of its nodes."""
    from launcher.preflight.resources import propose_site
    from mokd.runs.files import replace_text

    path = site_file(name)
    if path.exists() and not force:
        raise UserError(f"{path}: this profile exists already; replace it with --force")
    profile = propose_site(partition)
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = f"what SLURM says of partition {profile['partition']}"
    text = yaml.safe_dump(profile, sort_keys=False)
    replace_text(path, f"# Written by `mokd site init` from {asked}; see docs/slurm.md.\n{text}", durable=True)
    print(f"{path}\n{text}", end="")


def list_(as_json: AsJson = False) -> None:
    """The profiles there are."""
    if as_json:
        print_json({"sites": {name: str(site_file(name)) for name in site_names()}})
        return
    for name in site_names():
        print(f"{name}  {site_file(name)}")


def show(name: Annotated[str, typer.Argument(help="a profile")] = DEFAULT_SITE) -> None:
    """A profile as it stands in its file, once it is found valid."""
    load_cluster({}, {"site": name}, "mokd site show")
    print(site_file(name).read_text(encoding="utf-8"), end="")

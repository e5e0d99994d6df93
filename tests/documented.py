"""What `test_documented_commands.py` runs in place of the commands that README and docs have.

`RULES` has every command: `None` where it is run as it stands, in a folder that has the files it names (tiny ones,
under the same names), else what is run in its place, and why.
"""

from __future__ import annotations

from dataclasses import dataclass

PAGES = (
    *("README.md", "docs/index.md", "docs/quickstart.md", "docs/data.md", "docs/evaluation.md", "docs/analysis.md"),
    *("docs/export.md", "docs/report.md", "docs/results.md", "docs/slurm.md", "docs/weights.md", "docs/containers.md"),
    *("slurm/README.md", "CONTRIBUTING.md"),
)


@dataclass(frozen=True)
class Short:
    """What is run in a command's place, why, and the exit statuses that are right."""

    runs: tuple[str, ...]
    why: str
    statuses: tuple[int, ...] = (0,)


def short(why: str, *runs: str, statuses: tuple[int, ...] = (0,)) -> Short:
    return Short(runs, why, statuses)


def dry(command: str) -> Short:
    """A submission, as far as it goes without SLURM."""
    return short("SLURM: tests/slurm", f"{command} --dry-run --gpus-per-node 1 --cpus-per-task 4")


def make(command: str) -> Short:
    """The commands of a target; what they do has tests of its own, or is this test's own caller."""
    return short("installs, or takes minutes", command.replace("make", "make -n", 1))


RANKS = "one rank in place of several: tests/mokd/distributed and others have more"
SMALL = (
    "branches.resnet50.backbone=test_resnet branches.vit_s.backbone=test_vit branches.vit_s.drop_path=0 "
    "branches.vit_s.backbone_options={patch_size:8} views.global_crops.size_px=32 views.local_crops.size_px=16 "
    "optim.global_batch=8 optim.max_steps=2 evaluation.resize_px=36 evaluation.crop_px=32 "
    # in bf16 on CPUs the gradient of a convolution from 2x2 to 1x1 pixels has been seen to be NaN now and then
    "precision.compute=fp32"
)

RULES: dict[str, dict[str, Short | None]] = {
    "README.md": {
        "make demo": make("make demo"),
        "make test": make("make test"),
        "mokd init mine.yaml --data imagenet/train": None,
        "mokd convert imagenet/train data/imagenet/train.beton": None,
        "mokd convert imagenet/val data/imagenet/val.beton": None,
        "mokd train vit_s_resnet50.yaml --nproc 8": short(RANKS, "mokd train vit_s_resnet50.yaml"),
        "mokd eval runs/vit_s_resnet50 --task knn": None,
        "mokd train cifar10_cpu.yaml": None,
        "mokd train cifar10_cpu.yaml --solo resnet10": None,
        "mokd train cifar10_cpu.yaml --solo vit_tiny": None,
        "mokd eval $run --task knn": short(
            "the shell's loop",
            *(f"mokd eval runs/cifar10_cpu{solo} --task knn" for solo in ("", "-solo-resnet10", "-solo-vit_tiny")),
        ),
        "mokd compare runs/cifar10_cpu* --plot gain.png": None,
        "make launch CONFIG=vit_s_resnet50.yaml NODES=4": make("make launch CONFIG=vit_s_resnet50.yaml NODES=4"),
    },
    "docs/index.md": {"make demo": make("make demo"), "make test": make("make test")},
    "docs/quickstart.md": {
        "make demo": make("make demo"),
        "mokd demo --data ~/photos": short(
            "minutes: tests/launcher/first_steps", "mokd demo --data photos/train --data-only"
        ),
        "mokd convert photos/train data/photos/train.beton": None,
        "mokd convert photos/test data/photos/test.beton": None,
        "mokd init photos.yaml --data data/photos/train.beton --pair resnet50,vit_small": None,
        "mokd views photos.yaml": None,
        "mokd train photos.yaml --nproc 4": short(
            "tiny networks in place of large ones", f"mokd train photos.yaml {SMALL}"
        ),
        "mokd report photos": None,
        "mokd eval runs/photos --task linear": None,
        "mokd export runs/photos --branch resnet50 --format timm": None,
        "mokd doctor photos.yaml": short(
            "status 2: what this machine lacks", "mokd doctor photos.yaml", statuses=(0, 2)
        ),
        "mokd launch photos.yaml --nodes 4 --dry-run": dry("mokd launch photos.yaml --nodes 4 name=other"),
        "mokd launch photos.yaml --nodes 4 --check": dry("mokd launch photos.yaml --nodes 4"),
        "mokd launch photos.yaml --nodes 4": dry("mokd launch photos.yaml --nodes 4"),
        "mokd status photos": None,
        "mokd logs photos --follow": short("a run of the launcher: docs/slurm.md", "mokd logs --help"),
        "mokd convert imagenet/train data/imagenet/train.beton": None,
        "mokd convert imagenet/val data/imagenet/val.beton": None,
        "mokd verify data/imagenet/train.beton": None,
        "make launch CONFIG=vit_s_resnet50.yaml NODES=4": make("make launch CONFIG=vit_s_resnet50.yaml NODES=4"),
        "mokd launch vit_s_resnet50.yaml --solo $branch --nodes 4": dry(
            "mokd launch vit_s_resnet50.yaml --solo vit_s --nodes 4"
        ),
        "mokd eval runs/vit_s_resnet50 --task knn": None,
        "mokd eval runs/vit_s_resnet50 --task linear --nproc 8": short(
            RANKS, "mokd eval runs/vit_s_resnet50 --task linear"
        ),
    },
    "docs/data.md": {
        "mokd convert imagenet/train train.beton": None,
        "mokd convert imagenet/train train.beton --max-resolution 400": short(
            "the file is there already", "mokd convert imagenet/train train400.beton --max-resolution 40"
        ),
        "mokd convert a/ b/ both.beton --subset 0.01 --seed 3": short(
            "of so few images, a larger part", "mokd convert a/ b/ both.beton --subset 0.5 --seed 3"
        ),
        "mokd verify train.beton": None,
        "mokd convert shards/train-*.tar train.beton": short(
            "the file is there already", "mokd convert shards/train-*.tar shards.beton"
        ),
        "mokd convert cifar100/train-00000-of-00001.parquet train.beton --label-column fine_label": short(
            "the file is there already",
            "mokd convert cifar100/train-00000-of-00001.parquet cifar100.beton --label-column fine_label",
        ),
        "mokd convert train.csv train.beton": short("the file is there already", "mokd convert train.csv list.beton"),
        "mokd convert xray/ xray.beton --channels 1": None,
        "mokd convert sentinel/ sentinel.beton --channels 13": None,
        "mokd convert --statistics sentinel.beton": None,
        "mokd train CONFIG data.channels=13 'views.mean=[...]' 'views.std=[...]' views.jitter.saturation=0 "
        "views.jitter.hue=0 views.grey_probability=0": short(
            "the dots are for 13 numbers",
            f"mokd train bands.yaml data.channels=13 'views.mean={[0.5] * 13}' 'views.std={[0.2] * 13}' "
            "views.jitter.saturation=0 views.jitter.hue=0 views.grey_probability=0",
        ),
    },
    "docs/evaluation.md": {
        "mokd eval RUN --task knn": short("a name", "mokd eval runs/cifar10_cpu --task knn --again"),
        "mokd eval RUN --task linear --nproc 8": short(RANKS, "mokd eval runs/cifar10_cpu --task linear"),
        "mokd eval RUN --task semi --branch resnet50 --network student": short(
            "a name", "mokd eval runs/vit_s_resnet50 --task semi --branch resnet50 --network student"
        ),
        "mokd eval RUN --task transfer --train flowers/train.beton --test flowers/test.beton --name flowers": short(
            "a name",
            "mokd eval runs/cifar10_cpu --task transfer --train train.beton --test data/imagenet/val.beton "
            "--name flowers",
        ),
        "mokd eval RUN --task semi --network scratch": short(
            "a name", "mokd eval runs/cifar10_cpu --task semi --network scratch"
        ),
        "mokd eval resnet50.pth --backbone resnet50 --train train.beton --test val.beton": short(
            "a tiny network in a file",
            "mokd eval resnet.pth --backbone test_resnet --train train.beton --test data/imagenet/val.beton "
            "--set evaluation.resize_px=36 --set evaluation.crop_px=32",
        ),
    },
    "docs/analysis.md": {
        "mokd analyze runs/pair --solo runs/pair-solo-resnet50 --solo runs/pair-solo-vit_s": short(
            "other names, fewer images; all parts: tests/launcher/cli",
            "mokd analyze runs/cifar10_cpu --solo runs/cifar10_cpu-solo-resnet10 --solo runs/cifar10_cpu-solo-vit_tiny "
            "--what cka --what agreement --images 2 --samples 16",
        )
    },
    "docs/export.md": {
        "mokd export runs/demo --branch resnet --format timm": short(
            "another name", "mokd export runs/photos --branch resnet50 --format timm"
        )
    },
    "docs/report.md": {
        "mokd report runs/demo": short("another name", "mokd report photos"),
        "mokd report runs/pair runs/solo --out both.html": short(
            "other names", "mokd report runs/cifar10_cpu runs/cifar10_cpu-solo-vit_tiny --out both.html"
        ),
        "mokd views vit_s_resnet50.yaml --images 4 --out views.png views.local_crops.count=4": None,
    },
    "docs/results.md": {
        "mokd bench gain --config cifar10_cpu.yaml --seeds 0,1 --nproc 2 --json --record": short(
            "takes the runs that are there already; a record is for real figures",
            "mokd bench gain --config cifar10_cpu.yaml --seeds 3 --json --task knn",
        ),
        "mokd launch C.yaml --sweep seed=0,1,2": dry("mokd launch C.yaml --sweep seed=0,1,2"),
        "mokd launch C.yaml --solo resnet18 --sweep seed=0,1,2": dry(
            "mokd launch C.yaml --solo resnet18 --sweep seed=0,1,2"
        ),
        "mokd launch C.yaml --solo vit_tiny --sweep seed=0,1,2": dry(
            "mokd launch C.yaml --solo vit_tiny --sweep seed=0,1,2"
        ),
        "mokd eval runs/... --task knn": short("the dots are for names", "mokd eval runs/cifar10_cpu --task knn"),
        "mokd compare runs/C-* --task knn --plot gain.png --json": short(
            "other names", "mokd compare runs/cifar10_cpu* --task knn --plot gain.png --json"
        ),
        "mokd launch C.yaml --sweep objective.terms.cross_search=true,false --sweep seed=0,1": dry(
            "mokd launch C.yaml --sweep objective.terms.cross_search=true,false --sweep seed=0,1"
        ),
        "mokd launch C.yaml --sweep branches.resnet18.weight=0.1,0.3,1.0": dry(
            "mokd launch C.yaml --sweep branches.resnet18.weight=0.1,0.3,1.0"
        ),
        "mokd bench gain --config C.yaml --set objective.terms.cross_search=false --set name=C-no-search": short(
            "trains six times: tests/benchmarks", "mokd bench gain --help"
        ),
        "mokd compare runs/C runs/C-no-search runs/C-solo-resnet18 runs/C-solo-vit_tiny": short(
            "other names", "mokd compare runs/cifar10_cpu runs/cifar10_cpu-solo-resnet10 runs/cifar10_cpu-solo-vit_tiny"
        ),
    },
    "docs/slurm.md": {
        "mokd launch vit_s_resnet50.yaml --nodes 4": short(
            "the same job, here", "mokd launch vit_s_resnet50.yaml --local name=local"
        ),
        "mokd launch vit_s_resnet50.yaml --nodes 4 --check": dry("mokd launch vit_s_resnet50.yaml --nodes 4"),
        "mokd status": None,
        "mokd logs RUN --follow": short("a name", "mokd logs local --follow"),
        "mokd cancel RUN": short(
            "a run that is still at work",
            "mokd launch vit_s_resnet50.yaml --local name=long optim.epochs=100000 optim.max_steps=null",
            "mokd cancel long",
        ),
        "mokd resume RUN --nodes 2": dry("mokd resume long --nodes 2"),
    },
    "docs/weights.md": {
        "mokd train partner.yaml": None,
        "mokd train seed.yaml": None,
        "mokd train pair.yaml": None,
        "mokd train pair.yaml --solo vit_s": None,
        "mokd eval runs/$run --task knn": short(
            "the shell's loop",
            *(f"mokd eval runs/{run} --task knn" for run in ("pair", "seed", "partner", "pair-solo-vit_s")),
        ),
        "mokd compare runs/pair runs/seed runs/partner runs/pair-solo-vit_s": None,
    },
    "docs/containers.md": {
        "mokd launch CONFIG --nodes 4 cluster.container.image=/shared/mokd.sif --dry-run": dry(
            "mokd launch vit_s_resnet50.yaml --nodes 4 cluster.container.image=mokd.sif"
        ),
        "mokd launch CONFIG --nodes 4 cluster.container.image=/shared/mokd.sif --check": dry(
            "mokd launch vit_s_resnet50.yaml --nodes 4 cluster.container.image=mokd.sif"
        ),
    },
    "slurm/README.md": {
        "make slurm-up": make("make slurm-up"),
        "make launch CONFIG=demo.yaml NODES=4": make("make launch CONFIG=demo.yaml NODES=4"),
        "mokd status runs/demo": short("another name", "mokd status runs/cifar10_cpu"),
        "make slurm-down": make("make slurm-down"),
    },
    "CONTRIBUTING.md": {
        f"make {target}": make(f"make {target}") for target in ("setup", "test", "format", "faults", "slurm-up")
    },
}

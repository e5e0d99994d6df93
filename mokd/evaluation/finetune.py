"""Fine-tuning of a whole network on labels: semi-supervised learning and transfer."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from data_pipeline.loaders.batch import MultiCropLoader
from data_pipeline.sampling.order import Int64Array, class_subset
from mokd.config.evaluation import FinetuneConfig, RatesConfig
from mokd.distributed.process_group import all_reduce_sum
from mokd.evaluation.answers import Answer, Outcome
from mokd.evaluation.augmented import batch_of, labelled_loader
from mokd.evaluation.data import LabelledSet
from mokd.evaluation.features import eval_loader, gather_rows
from mokd.evaluation.kept_state import KeptState
from mokd.evaluation.linear import BASE_BATCH
from mokd.evaluation.subjects import Subject, digest
from mokd.evaluation.work import Work
from mokd.models.backbones import Backbone
from mokd.models.sync_batchnorm import synchronize_batchnorm
from mokd.optim.precision import autocast
from mokd.optim.schedules import warmup_cosine
from mokd.parallel.parallelize import average_gradients
from mokd.runs.progress import WorkProgress
from mokd.runs.seeds import derive_seed


class Classifier(nn.Module):
    """A backbone and a linear classifier on its pooled feature."""

    def __init__(self, backbone: Backbone, width: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, classes)
        # a network that knows nothing of the classes starts from equal chances, whatever its features
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, C]` of images `[B, channels, S, S]`."""
        return self.head(self.backbone(images).pooled)


def finetune_task(work: Work, section: FinetuneConfig, fractions: Sequence[float]) -> list[Outcome]:
    """Every network fine-tuned on every fraction of the labels; the largest fraction is the headline."""
    outcomes = []
    for subject in work.subjects:
        answers, states = [], []
        for fraction in fractions:
            ids = work.train.ids[class_subset(work.train.labels, fraction, work.config.seed)]
            tuning = FineTuning(subject, work, ids, section)
            classes = tuning.run().classify(work.test)
            answers.append(Answer(fraction, classes.numpy(), {"labels": len(ids), **tuning.facts}))
            states.append(tuning.state)
        outcomes.append(Outcome(answers, max(range(len(fractions)), key=lambda i: fractions[i]), states))
    return outcomes


class FineTuning:
    """One network's training on the samples `ids` of the training set; `run` continues where a former call ended."""

    def __init__(self, subject: Subject, work: Work, ids: Int64Array, section: FinetuneConfig) -> None:
        config, ranks, device, train = work.config, work.ranks, work.device, work.train
        self._config, self._section, self._ranks, self._device = config, section, ranks, device
        self._train, self._ids = train, ids
        self._precision = config.precision
        if config.precision.compute == "fp16":  # without a loss scale gradients would vanish
            self._precision = config.precision.model_copy(update={"compute": "fp32"})
        self._batch = batch_of(section.batch, len(ids), ranks)
        self._name = subject.name
        backbone = subject.build(section.drop_path, self._batch // ranks.world_size)
        width = _pooled_width(backbone, config.evaluation.crop_px)
        self._model = Classifier(backbone, width, len(train.classes))
        if ranks.world_size > 1:
            synchronize_batchnorm(self._model, device)
        self._model.to(device)
        kind = section.optimizer or ("adamw" if backbone.is_sequence else "sgd")
        rates = section.adamw if kind == "adamw" else section.sgd
        if subject.network == "scratch":
            rates = rates.model_copy(update={"lr": rates.head_lr, "layer_decay": 1.0})
        self.facts: dict[str, Any] = {"epochs": section.epochs, "optimizer": kind, "lr": rates.lr}
        self._optimizer = _optimizer(self._model, kind, rates, self._batch / BASE_BATCH)
        identity = digest(
            weights=subject.identity,
            data=[train.fingerprint, train.backend, ids.tolist()],
            section=section.model_dump(mode="json", exclude={"fractions"}),
            crops=[config.evaluation.crop_px, config.evaluation.area_scale, config.views.mean, config.views.std],
            arithmetic=[config.seed, self._precision.compute],
        )
        self.state = KeptState(work.directory / "state" / f"{identity}.safetensors", is_main=ranks.is_main)

    def run(self) -> FineTuning:
        """Trains to the end. UserError when the loss becomes infinite."""
        section = self._section
        done, tensors = self.state.load()
        if done:
            self._restore(tensors)
        loader = labelled_loader(self._train, self._ids, self._batch, self._config, self._ranks, self._device)
        title = f"{self._name}, {len(self._ids)} labels, epoch"
        progress = WorkProgress(title, done=done, per_second=False, shown=self._ranks.is_main)
        with closing(loader), progress:
            for epoch in range(done, section.epochs):
                loss = self._epoch(loader, epoch)
                self.state.save(epoch + 1, self._tensors())
                progress.update(epoch + 1, section.epochs, f"loss {loss:.3f}")
        return self

    def _epoch(self, loader: MultiCropLoader, epoch: int) -> float:
        steps, section = loader.steps_per_epoch, self._section
        self._model.train()
        total = torch.zeros((), device=self._device)
        for i, batch in enumerate(loader.epoch(epoch)):
            step = epoch * steps + i
            # all ranks alike: stochastic depth takes each sample's mask from the global batch's
            torch.manual_seed(derive_seed(self._config.seed, "fine-tuning", step))
            factor = warmup_cosine(step + 1, section.epochs * steps + 1, round(section.warmup_epochs * steps), 1.0, 0.0)
            for group in self._optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            with autocast(self._precision, self._device):
                logits = self._model(batch.views[0][0])
            loss = F.cross_entropy(logits.float(), batch.labels.to(self._device))
            self._optimizer.zero_grad()
            loss.backward()
            if self._ranks.world_size > 1:
                average_gradients([p for p in self._model.parameters() if p.requires_grad])
            self._optimizer.step()
            total += loss.detach()
        mean = float(all_reduce_sum(total)) / (steps * self._ranks.world_size)
        if not math.isfinite(mean):
            raise UserError(f"{self._name}: the loss of epoch {epoch + 1} is not finite; lower the learning rate (lr)")
        return mean

    @torch.no_grad()
    def classify(self, test: LabelledSet) -> Tensor:
        """The most likely classes `[M, min(5, C)]` of a data set's images, on the CPU."""
        self._model.eval()
        own = [torch.zeros(0, min(5, self._model.head.out_features), dtype=torch.int64)]
        for batch in eval_loader(test, self._config, self._ranks, self._device):
            logits = self._model(batch.images.to(self._device))
            own.append(logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu())
        return gather_rows(torch.cat(own), self._device)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": value for name, value in self._model.state_dict().items()}
        for name, p in self._model.named_parameters():
            for entry, value in self._optimizer.state.get(p, {}).items():
                if value is not None:
                    tensors[f"optimizer.{entry}.{name}"] = value
        return tensors

    @torch.no_grad()
    def _restore(self, tensors: dict[str, Tensor]) -> None:
        model = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
        self._model.load_state_dict(model)
        parameters = dict(self._model.named_parameters())
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, entry, name = key.split(".", 2)
                p = parameters[name]
                self._optimizer.state[p][entry] = value if value.ndim == 0 else value.to(p.device)


def _optimizer(model: Classifier, kind: str, rates: RatesConfig, scale: float) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW, with a group per depth. One-dimensional parameters are not decayed."""
    groups: list[dict[str, Any]] = []
    for group in param_groups_layer_decay(model.backbone.net, rates.weight_decay, layer_decay=rates.layer_decay):
        groups.append({"params": group["params"], "weight_decay": group["weight_decay"]})
        groups[-1]["peak"] = rates.lr * scale * group["lr_scale"]
    groups.append({"params": [model.head.weight], "weight_decay": rates.weight_decay, "peak": rates.head_lr * scale})
    groups.append({"params": [model.head.bias], "weight_decay": 0.0, "peak": rates.head_lr * scale})
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


@torch.no_grad()
def _pooled_width(backbone: Backbone, crop_px: int) -> int:
    skeleton = copy.deepcopy(backbone).to("meta").eval()
    return int(skeleton(torch.zeros(1, backbone.channels, crop_px, crop_px, device="meta")).pooled.shape[1])

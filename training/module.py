"""A thin LightningModule round `Forecaster`: the loss, the optimiser and its schedule."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from model.features import CLIP, Seen
from model.network import Forecaster
from model.quantiles import pinball
from training.windows import Batch


def pick(seen: Seen, row: Tensor, step: Tensor) -> Seen:
    """N single steps out of B streams by T steps, each as a stream of its own. row, step [N] int64."""
    context = seen.filled.shape[1] - seen.level.shape[1]
    return Seen(
        seen.inputs[row, step][:, None],
        seen.filled.unfold(1, context + 1, 1)[row, step],
        seen.level[row, step][:, None],
        seen.scale[row, step][:, None],
    )


class TrainingModule(pl.LightningModule):
    """Trains a forecaster by the pinball loss of the forecasts at all counted steps, in each stream's own scale.

    AdamW (Loshchilov and Hutter 2019) with one cycle of the learning rate over `total_steps` (Smith and Topin 2018).
    """

    def __init__(
        self, forecaster: Forecaster, learning_rate: float, weight_decay: float, total_steps: int, seed: int
    ) -> None:
        super().__init__()
        self.seed = seed
        self.forecaster = forecaster
        self.learning_rate, self.weight_decay, self.total_steps = learning_rate, weight_decay, total_steps
        self.quantiles = torch.tensor(forecaster.config.quantiles)

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """The mean pinball loss over what is known in a batch, and of how many truths."""
        state = self.forecaster.initial_state(len(batch.truths))
        outputs, _ = self.forecaster.recur(batch.seen, state)
        # The head works at counted steps only: in a validation window most are lead.
        row, step = (~batch.truths.isnan()).any(-1).nonzero(as_tuple=True)
        forecast = self.forecaster.forecast(pick(batch.seen, row, step), outputs[row, step][:, None])
        missed = (batch.truths[row, step][:, None] - forecast.base) / forecast.scale[..., None]
        known = ~missed.isnan()
        # As features are cut, so are truths: one absurd reading must not shout down all else.
        truth = missed.nan_to_num(0.0).clamp(-CLIP, CLIP).float()
        losses = pinball(forecast.offsets, truth, self.quantiles).mean(-1) * known
        count = int(known.sum())
        return losses.sum() / max(count, 1), count

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        torch.manual_seed(self.seed + self.global_step)  # so that a resumed training drops out the same units
        loss, count = self.loss(batch)
        self.log("loss", loss, batch_size=max(count, 1), on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, _index: int) -> None:
        loss, count = self.loss(batch)
        self.log("validation_loss", loss, batch_size=max(count, 1), prog_bar=True)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:  # noqa: ARG002
        return batch  # the series lie where the model trains: in the CPU's memory

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.learning_rate, total_steps=self.total_steps, pct_start=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

"""Range regularization for any Trainer."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from hf_r2.grain import parse_grain
from hf_r2.losses import RangeLoss
from hf_r2.projection import RangeProjection
from hf_r2.report.statistics import crest_factor
from hf_r2.training.arguments import R2TrainingArguments

R2_STATE_NAME = "r2_state.safetensors"

logger = logging.get_logger(__name__)


class _ProjectAfterStep(TrainerCallback):
    """Calls the trainer's projection between the optimizer step and the next forward."""

    def __init__(self, trainer: "R2Mixin") -> None:
        self.trainer = trainer

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.project()


class R2Mixin:
    """Restricts the range of weights in any Trainer: `class R2SFTTrainer(R2Mixin, SFTTrainer)`.

    `r2_mode="loss"` adds `strength × range loss` to the loss; `"prox"` and `"clip"` pull the weights back after each
    optimizer step (see [`RangeProjection`]), `"prox"` by `learning rate × strength`.

    The loss term enters exactly once per optimizer step, whatever the gradient accumulation, the number of processes
    and the way the model averages its loss. Evaluation losses stay the task's. Learnable margins and temperatures have
    an optimizer of their own, the only arrangement that runs alone, under DDP and under FSDP2.

    The trainer's arguments must have the `r2_*` fields of [`R2TrainingArguments`].
    """

    range_loss: RangeLoss | None = None
    range_projection: RangeProjection | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, R2TrainingArguments):
            raise ValueError(
                f"{type(self).__name__} needs R2TrainingArguments, got {type(self.args).__name__}: pass "
                "args=R2TrainingArguments(output_dir), or a subclass of both"
            )
        self._regularize(self.model)
        self.add_callback(_ProjectAfterStep(self))

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Train from fresh R2 state: `model_init` and a hyper-parameter trial may have changed model and arguments."""
        self._regularize(self.model)
        return super()._inner_training_loop(*args, **kwargs)

    def _regularize(self, model: nn.Module) -> None:
        self._probed = False
        self._r2_total: Tensor | float = 0.0
        self._r2_steps = 0
        self.range_loss = self.range_optimizer = self.range_projection = None
        if self.args.r2_mode == "none" or self.args.r2_strength == 0:
            return
        selection = {
            "grain": parse_grain(self.args.r2_grain),
            "include": self.args.r2_include,
            "exclude": self.args.r2_exclude,
            "min_numel": self.args.r2_min_numel,
        }
        if self.args.r2_mode != "loss":
            self.range_projection = RangeProjection(model, self.args.r2_mode, clip=self.args.r2_clip, **selection)
            return
        self.range_loss = RangeLoss(
            model,
            kind=self.args.r2_loss,
            **selection,
            margin_reduction=self.args.r2_margin_reduction,
            temperature=self.args.r2_temperature,
            tail_fraction=self.args.r2_tail_fraction,
        )
        if len(self.range_loss.learnable):
            # Without momentum it has no state to save. Adam would be wrong here: it normalises the tiny gradient of a
            # temperature, which then walks down by the learning rate at every step.
            self.range_optimizer = torch.optim.SGD(
                self.range_loss.parameters(), lr=self.args.r2_learning_rate, weight_decay=0.0
            )

    # --- how often things count -------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Count the items of an optimizer step; find out at the first one whether the loss heeds the count.

        Trainer believes that a model whose forward takes keyword arguments divides its loss by the items of the whole
        optimizer step. Many do not (ResNet, BERT classifiers …), and then Trainer multiplies the task loss by the
        accumulation steps and processes, which silently rescales the strength. So the loss is asked, once.
        """
        items = super()._get_num_items_in_batch(batch_samples, device)
        matters = self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1 or self.args.n_gpu > 1
        declared = self.compute_loss_func is not None or getattr(self, "loss_is_scaled_for_ga", None) is not None
        if items is None or not matters or declared or self._probed:
            return items
        self._probed = True
        if self._heeds_item_count(batch_samples[0]):
            return items
        self.model_accepts_loss_kwargs = False
        if self.is_world_process_zero():
            logger.warning(
                "The loss of %s ignores the number of items in the batch. Trainer would multiply it by gradient "
                "accumulation and processes; it is averaged over them instead.",
                type(self.model).__name__,
            )
        return None

    @torch.no_grad()
    def _heeds_item_count(self, batch: dict[str, Any]) -> bool:
        """Tell whether the loss changes with the number of items; one of 0 tells nothing and is left alone."""
        training = self.model.training
        self.model.eval()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                once, twice = (
                    super(R2Mixin, self).compute_loss(
                        self.model,
                        dict(self._prepare_inputs(batch)),
                        num_items_in_batch=torch.tensor(items, device=self.args.device),
                    )
                    for items in (1000, 2000)
                )
        finally:
            self.model.train(training)
        return bool((once == 0).all()) or not torch.allclose(once, twice, rtol=1e-3, atol=0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the task loss, in training with this micro-batch's share of the R2 term."""
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if self.range_loss is None or not model.training:
            return result
        loss, outputs = result if return_outputs else (result, None)
        term = self.args.r2_strength * self._r2_share() * self.range_loss()
        share = term / getattr(self, "current_gradient_accumulation_steps", 1)
        self._r2_total = self._r2_total + share.detach()
        # A loss that is a mean over the micro-batch is divided by the accumulation steps later, and the term with it
        loss = loss + (share if self._loss_is_scaled(num_items_in_batch) else term)
        return (loss, outputs) if return_outputs else loss

    def _r2_share(self) -> float:
        return self.args.r2_share(self.state.global_step / max(self.state.max_steps, 1))

    def project(self) -> None:
        """Pull the weights back after an optimizer step; a step that mixed precision skipped is none."""
        if self.range_projection is None or self.accelerator.optimizer_step_was_skipped:
            return
        share = self._r2_share()
        if self.args.r2_mode == "prox":
            share *= self.args.r2_strength * self.optimizer.param_groups[0]["lr"]
        self.range_projection.step(share)

    def _loss_is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Tell, as `Trainer.training_step` does, whether the loss is already averaged over the accumulation steps."""
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return declared
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a micro-batch's step; with the last of an optimizer step, update the learnable R2 parameters."""
        loss = super().training_step(*args, **kwargs)
        if self.range_loss is not None and self.accelerator.sync_gradients:
            self._r2_steps += 1
            if self.range_optimizer is not None:
                if self.accelerator.scaler is not None:
                    self.accelerator.scaler.step(self.range_optimizer)
                else:
                    self.range_optimizer.step()
                self.range_optimizer.zero_grad()
        return loss

    # --- what is shown and kept -------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; beside the training loss also the task's part, the R2 term and the mean crest factor."""
        if self.range_loss is not None and "loss" in logs and self._r2_steps:
            logs["r2_loss"] = float(self._r2_total) / self._r2_steps
            logs["task_loss"] = logs["loss"] - logs["r2_loss"]
            self._r2_total, self._r2_steps = 0.0, 0
        restriction = self.range_loss or self.range_projection
        if restriction is not None and "loss" in logs:
            weights = [getattr(module, attribute) for module, attribute in restriction.selection.values()]
            crests = [crest_factor(weight) for weight in weights]
            logs["crest_factor"] = float(torch.stack([crest.to(crests[0].device) for crest in crests]).mean())
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.range_optimizer is not None and self.args.should_save:
            save_file(self.range_loss.state_dict(), Path(output_dir) / R2_STATE_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.range_optimizer is None:
            return
        path = os.path.join(checkpoint, R2_STATE_NAME)
        state = load_file(path, device=str(self.args.device)) if os.path.isfile(path) else {}
        expected = self.range_loss.state_dict()
        if {name: tensor.shape for name, tensor in state.items()} != {
            name: tensor.shape for name, tensor in expected.items()
        }:
            raise ValueError(
                f"{checkpoint} does not hold the learnable values of r2_loss={self.args.r2_loss!r} with these "
                "settings: resume with the r2_* arguments that it was trained with, or start without resuming"
            )
        self.range_loss.load_state_dict(state)

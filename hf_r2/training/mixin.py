"""Range regularization for any Trainer."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from hf_r2.grain import parse_grain
from hf_r2.losses import RangeLoss
from hf_r2.moments import require_finite, shapes
from hf_r2.projection import RangeProjection
from hf_r2.quantization import R2QuantizationConfig
from hf_r2.quantization.attach import undecayed_names
from hf_r2.selection import current_weights
from hf_r2.training.arguments import R2TrainingArguments
from hf_r2.training.backends import differentiable_loss, require_supported
from hf_r2.training.compression import TrainedCompression
from hf_r2.training.distillation import Distillation, scores_next_token
from hf_r2.training.publishing import PublishingMixin
from hf_r2.training.resuming import ResumingMixin
from hf_r2.training.strength import CrestTarget, GradientRatioTarget
from hf_r2.training.teacher import START, copy_of, find_teacher, fingerprint, place

R2_STATE_NAME = "r2_state.safetensors"

logger = logging.get_logger(__name__)


class _R2Callback(TrainerCallback):
    """Calls the trainer where Trainer has no method to override."""

    def __init__(self, trainer: "R2Mixin") -> None:
        self.trainer = trainer

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.begin_compression()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.start_restriction()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.project()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.final_weights = self.trainer.weight_summary()


class R2Mixin(PublishingMixin, ResumingMixin):
    """Restricts the range of weights in any Trainer: `class R2SFTTrainer(R2Mixin, SFTTrainer)`.

    `r2_mode="loss"` adds `strength × range loss` to the loss; `"prox"` and `"clip"` pull the weights back after each
    optimizer step (see [`RangeProjection`]), `"prox"` by `learning rate × strength`.

    The loss term enters exactly once per optimizer step, whatever the gradient accumulation, the number of processes
    and the way the model averages its loss: its value is part of the loss that is returned and logged, and its gradient
    is added to the finished gradient of the task, before clipping. Evaluation losses stay the task's. Learnable margins
    and temperatures have an optimizer of their own, the only arrangement that runs alone, under DDP and under FSDP2.

    With a `quantization_config`, the model is compressed once it is trained, and `save_model` writes the compressed
    checkpoint; with a method in its `aware` or in `r2_aware`, it trains through its compression (see [`attach`]).
    Checkpoints made in training hold the float weights, to resume from.

    With a teacher, `(1 − share) × task loss + share × distillation loss` takes the task loss's place (see
    [`Distillation`]), and the R2 term is added to that. The teacher stays out of the model and of its checkpoints, and
    every process has all of it. A copy of the start (`r2_teacher="start"`) is made together with the trainer, before
    any checkpoint is loaded: to resume, build the trainer with the model that the run started from. Checkpoints hold a
    fingerprint of the teacher, so that another one is refused.

    The trainer's arguments must have the `r2_*` fields of [`R2TrainingArguments`].

    Args:
        *args: see the trainer.
        quantization_config: how the model is compressed; None leaves it float.
        teacher: model to distil from, for one that `r2_teacher` cannot name; put on the model's device, in evaluation
            mode.
        **kwargs: see the trainer.
    """

    range_loss: RangeLoss | None = None
    range_projection: RangeProjection | None = None
    final_weights: dict[str, dict[str, float]] | None = None

    compression: TrainedCompression | None = None

    teacher: nn.Module | None = None
    distillation: Distillation | None = None

    def __init__(
        self,
        *args: Any,
        quantization_config: R2QuantizationConfig | None = None,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, R2TrainingArguments):
            raise ValueError(
                f"{type(self).__name__} needs R2TrainingArguments, got {type(self.args).__name__}: pass "
                "args=R2TrainingArguments(output_dir), or a subclass of both"
            )
        self.require_publishable()
        if self.args.r2_aware is not None and quantization_config is None:
            raise ValueError(f"r2_aware={self.args.r2_aware!r} needs a quantization_config that says how to compress")
        if quantization_config is not None:
            if self.args.r2_aware is not None:
                content = {**quantization_config.to_dict(), "aware": self.args.r2_aware}
                quantization_config = R2QuantizationConfig(**content)
            self.compression = TrainedCompression(quantization_config, self.args.r2_aware_start_ratio)
        self.teacher = find_teacher(self.args.r2_teacher, teacher, self.model)
        self._regularize(self.model)
        self.add_callback(_R2Callback(self))

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Make a model of `model_init`; a teacher that is its start starts anew with it."""
        model = super().call_model_init(*args, **kwargs)
        if self.teacher is not None and self.args.r2_teacher == START:
            self.teacher = copy_of(model)
        return model

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Train from fresh R2 state: `model_init` and a hyper-parameter trial may have changed model and arguments."""
        if getattr(self.model, "hf_quantizer", None) is not None:
            raise ValueError("the model is compressed and cannot train: start from a float model, or a checkpoint")
        self._regularize(self.model)
        if self.teacher is not None:
            place(self.teacher, self.args.device, self.args.world_size)
        output = super()._inner_training_loop(*args, **kwargs)
        if self.compression is not None:
            self.compression.finish(self.model)
        return output

    def begin_compression(self) -> None:
        """Begin compression-aware training once its time has come."""
        if self.compression is not None:
            # The epoch is a whole number at its first step alone
            self.compression.step(self.model, self._progress(), new_epoch=self.state.epoch % 1 == 0)

    def _regularize(self, model: nn.Module) -> None:
        self._probed = False
        self._r2_value: Tensor | None = None
        self._r2_total: Tensor | float = 0.0
        self._r2_steps = 0
        self.range_loss = self.range_optimizer = self.range_projection = self.strength_target = None
        require_supported(self)
        if self.teacher is not None:
            temperature, share = self.args.r2_distillation_temperature, self.args.r2_distillation_share
            self.distillation = Distillation(self.teacher, temperature, share, shifted=scores_next_token(model))
        if self.compression is not None:
            self.compression.attach(model, compiled=self.args.torch_compile)
        if self.args.r2_mode == "none" or self.args.r2_strength == 0:
            return
        options = {
            "grain": parse_grain(self.args.r2_grain),
            "include": self.args.r2_include,
            "exclude": self.args.r2_exclude,
            "min_numel": self.args.r2_min_numel,
            "factors": self.args.r2_strength_factors,
        }
        if self.args.r2_mode == "loss":
            self._add_range_loss(model, options)
        else:
            self.range_projection = RangeProjection(model, self.args.r2_mode, clip=self.args.r2_clip, **options)
        restriction = self.range_loss or self.range_projection
        if self.args.torch_compile:
            restriction.compile()
        if self.args.r2_target_crest is not None:
            self.strength_target = CrestTarget(restriction, self.args.r2_target_crest)
        elif self.args.r2_target_gradient_ratio is not None:
            self.strength_target = GradientRatioTarget(restriction, self.args.r2_target_gradient_ratio)

    def _add_range_loss(self, model: nn.Module, options: dict[str, Any]) -> None:
        self.range_loss = RangeLoss(
            model,
            kind=self.args.r2_loss,
            **options,
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

    def start_restriction(self) -> None:
        """Make sure that every process starts from the same learnable values: those of the first."""
        if self.range_loss is not None and self.args.world_size > 1:
            for parameter in self.range_loss.parameters():
                parameter.data = broadcast(parameter.data.to(self.args.device)).to(parameter.device)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Leave what quantizers learn out of weight decay; see [`undecayed_names`]."""
        left_out = undecayed_names(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in left_out]

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
        """Return the task loss, in training distilled and with this micro-batch's share of the R2 term."""
        distilled = self.distillation is not None and model.training
        batch = dict(inputs) if distilled else {}  # as it is before label smoothing takes the labels out
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs or distilled, num_items_in_batch=num_items_in_batch
        )
        loss, outputs = result if return_outputs or distilled else (result, None)
        if distilled:
            loss = self._distil(loss, outputs, batch, num_items_in_batch)
        if self.range_loss is not None and model.training:
            loss = loss + self._r2_term(num_items_in_batch).to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _distil(
        self, loss: Tensor, outputs: Any, batch: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        scaled = self._loss_is_scaled(num_items_in_batch)
        items = num_items_in_batch if scaled else None
        if items is not None and self.args.average_tokens_across_devices:
            items = items / self.accelerator.num_processes  # they are all processes', whose gradients are averaged
        micro_batches = getattr(self, "current_gradient_accumulation_steps", 1)
        return self.distillation.mix(loss, outputs, batch, micro_batches, scaled, items)

    def _r2_term(self, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Measure the R2 term, once per optimizer step; return this micro-batch's share of it."""
        if differentiable_loss(self):
            value = self._strength() * self.range_loss()
            self._r2_value = value.detach()
        else:
            if self._r2_value is None:
                self._r2_value = self.range_loss.measure(self._strength())
            value = self._r2_value
        # A loss that is a mean over the micro-batch is divided by the accumulation steps later, and the value with it
        if self._loss_is_scaled(num_items_in_batch):
            value = value / getattr(self, "current_gradient_accumulation_steps", 1)
        return value

    def _strength(self) -> Tensor | float:
        """Strength of this optimizer step, without a projection's learning rate: a number, or one per weight."""
        chosen = self.args.r2_strength if self.strength_target is None else self.strength_target.strengths
        return chosen * self._r2_share()

    def _r2_share(self) -> float:
        return self.args.r2_share(self._progress())

    def _progress(self) -> float:
        return self.state.global_step / max(self.state.max_steps, 1)

    def project(self) -> None:
        """Pull the weights back after an optimizer step; a step that mixed precision skipped is none."""
        if self.range_projection is None or self.accelerator.optimizer_step_was_skipped:
            return
        if self.args.r2_mode == "clip":
            self.range_projection.step(self._r2_share())
            return
        self.range_projection.step(self._learning_rate() * self._strength())
        self._choose_strengths()

    def _learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _choose_strengths(self, grad_scale: Tensor | float = 1.0) -> None:
        """Choose the strengths of the next optimizer step, unless the schedule lets none through."""
        if self._r2_share() == 0:
            return
        if isinstance(self.strength_target, CrestTarget):
            self.strength_target.update(self._learning_rate())
        elif self.strength_target is not None:
            self.strength_target.update(grad_scale)

    def _loss_is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Tell, as `Trainer.training_step` does, whether the loss is already averaged over the accumulation steps."""
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return declared
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Take a micro-batch's step; with the last of an optimizer step, add the R2 term's gradient."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.compression is not None and self.compression.deltas_are_due:
            self.compression.update_deltas(self.model, self._prepare_inputs(inputs))
        if self._r2_value is not None and self.accelerator.sync_gradients:
            self._r2_total = self._r2_total + self._r2_value
            self._r2_steps += 1
            self._r2_value = None
            if not differentiable_loss(self):
                scaler = self.accelerator.scaler
                grad_scale = 1.0 if scaler is None else scaler.scale(torch.ones_like(loss))
                self._choose_strengths(grad_scale)
                self.range_loss.accumulate_grad_(grad_scale)
            if self.range_optimizer is not None:
                self.range_optimizer.step()
                self.range_optimizer.zero_grad()
        return loss

    # --- what is shown and kept -------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; beside the training loss also its parts and how the weights are distributed."""
        if "loss" in logs:
            if self._r2_steps:
                logs["r2_loss"] = float(self._r2_total) / self._r2_steps
                logs["task_loss"] = logs["loss"] - logs["r2_loss"]
                self._r2_total, self._r2_steps = 0.0, 0
            if self.distillation is not None:
                logs |= self.distillation.averages(lambda losses: self.accelerator.reduce(losses, "mean"))
            if self.strength_target is not None:
                logs["r2_strength"] = float(self.strength_target.strengths.mean())
            for statistic, values in self.weight_summary().items():
                logs[statistic] = sum(values.values()) / len(values)
                logs[f"{statistic}_max"] = max(values.values())
            if self.compression is not None:
                self.compression.warn(self.model)
        super().log(logs, start_time)

    def weight_summary(self) -> dict[str, dict[str, float]]:
        """Crest factor and kurtosis of every restricted weight, by statistic and parameter name; nothing without R2.

        Every process must call it when FSDP2 has cut the weights.

        Raises:
            ValueError: naming weights that hold NaN or infinite values.
        """
        restriction = self.range_loss or self.range_projection
        if restriction is None:
            return {}
        found = shapes(current_weights(restriction.selection))
        require_finite(restriction.selection, [shape.crest_factor for shape in found])
        return {
            statistic: {
                name: getattr(shape, statistic).item() for name, shape in zip(restriction.selection, found, strict=True)
            }
            for statistic in ("crest_factor", "kurtosis")
        }

    def _r2_state(self) -> dict[str, Tensor]:
        """Collect what is saved beside the optimizer: learnable values, chosen strengths, the teacher's fingerprint."""
        state = dict(self.range_loss.state_dict()) if self.range_optimizer is not None else {}
        if self.strength_target is not None:
            state |= {"strength_target.state": self.strength_target.state}
            state |= {"strength_target.strengths": self.strength_target.strengths}
        if self.teacher is not None:
            state |= {"teacher": fingerprint(self.teacher)}
        return state

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self._r2_state()
        if state and self.args.should_save:
            save_file({name: tensor.clone() for name, tensor in state.items()}, Path(output_dir) / R2_STATE_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        expected = self._r2_state() if checkpoint is not None else {}
        if not expected:
            return
        path = os.path.join(checkpoint, R2_STATE_NAME)
        state = load_file(path) if os.path.isfile(path) else {}
        if {name: tensor.shape for name, tensor in state.items()} != {
            name: tensor.shape for name, tensor in expected.items()
        }:
            raise ValueError(
                f"{checkpoint} does not hold the R2 state of r2_loss={self.args.r2_loss!r} with these settings: resume "
                "with the r2_* arguments that it was trained with, or start without resuming"
            )
        if self.teacher is not None and not torch.equal(state.pop("teacher"), expected["teacher"]):
            raise ValueError(
                f"the run of {checkpoint} has another teacher: resume with the same one; for r2_teacher={START!r}, "
                "build the trainer with the model that the run started from, not with a checkpoint's"
            )
        if self.strength_target is not None:
            self.strength_target.state = state.pop("strength_target.state")
            self.strength_target.strengths = state.pop("strength_target.strengths")
        if state:
            self.range_loss.load_state_dict(state)

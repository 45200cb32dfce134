"""What the training back ends allow: checks made before training, with what to use instead."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_r2.training.mixin import R2Mixin

_STEPS_IN_BACKWARD = ("lomo", "layerwise")
_FSDP2 = "use FSDP2 (recipes/accelerate_configs/fsdp2.yaml)"


def require_supported(trainer: "R2Mixin") -> None:
    """Check that range restriction works with the trainer's back end and optimizer.

    Raises:
        ValueError: for DeepSpeed ZeRO-3 and FSDP1, whose weights no process can read between steps; for projections
            and chosen strengths under DeepSpeed, whose optimizer keeps weights and gradients to itself; and for range
            losses with optimizers that step inside the backward pass; for teachers where a process has a part of the
            model or of a sequence, or several devices.
    """
    if trainer.compression is not None and trainer.compression.config.aware:
        _require_whole_weights(trainer)
    if trainer.teacher is not None:
        _require_whole_batches(trainer)
    if trainer.args.r2_mode == "none" or trainer.args.r2_strength == 0:
        return
    mode, optimizer = trainer.args.r2_mode, str(getattr(trainer.args.optim, "value", trainer.args.optim))
    deepspeed = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError(
            f"DeepSpeed ZeRO-3 leaves no weights to restrict outside the forward pass: {_FSDP2}, or ZeRO-2"
        )
    if deepspeed is not None and mode != "loss":
        raise ValueError(
            f"DeepSpeed would overwrite weights projected by r2_mode={mode!r}: use r2_mode='loss', or {_FSDP2}"
        )
    if deepspeed is not None and trainer.args.r2_strength == "auto":
        raise ValueError(
            f"DeepSpeed hides the gradients that r2_strength='auto' looks at: give r2_strength a number, or {_FSDP2}"
        )
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 1:
        raise ValueError(f"FSDP version 1 flattens weights, so their ranges cannot be restricted: {_FSDP2}")
    if mode == "loss" and any(kind in optimizer for kind in _STEPS_IN_BACKWARD):
        raise ValueError(
            f"optim={optimizer!r} updates weights inside the backward pass, before the R2 gradient is there: use "
            "another optimizer, or r2_mode='clip'"
        )


def _require_whole_weights(trainer: "R2Mixin") -> None:
    state = trainer.accelerator.state
    deepspeed = getattr(state, "deepspeed_plugin", None)
    if getattr(state, "fsdp_plugin", None) is not None or (deepspeed is not None and deepspeed.zero_stage == 3):
        raise ValueError(
            f"r2_aware={trainer.compression.config.aware!r} needs whole weights, but FSDP and DeepSpeed ZeRO-3 cut "
            "them: use DDP (recipes/accelerate_configs/ddp.yaml)"
        )


def _require_whole_batches(trainer: "R2Mixin") -> None:
    deepspeed = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError(f"DeepSpeed ZeRO-3 would cut the teacher as well: {_FSDP2}, or ZeRO-2")
    if trainer.args.n_gpu > 1:
        raise ValueError("distillation needs a process for each GPU: start with accelerate launch or torchrun")
    if trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() > 1:
        raise ValueError(f"distillation knows no tensor, context or sequence parallelism: use DDP, or {_FSDP2[4:]}")


def differentiable_loss(trainer: "R2Mixin") -> bool:
    """Tell whether the R2 term must pass through autograd: DeepSpeed takes the gradients over inside backward."""
    return getattr(trainer.accelerator.state, "deepspeed_plugin", None) is not None

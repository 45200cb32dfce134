"""Trains one case after the other, in every process of a launch: `trainer_run.py DIRECTORY`, see `trainer_cases.py`."""

import gc
import logging
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from trainer_cases import MODELS, Result, examples, load_model, read_cases
from training_cases import make_trainer
from transformers import Trainer

from hf_r2 import R2QuantizationConfig, R2Trainer
from hf_r2.aware import AWARE_METHODS


class MeanLossTrainer(Trainer):
    """A Trainer that is told that the model's loss is a mean over the batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


TRAINERS = {"R2Trainer": R2Trainer, "Trainer": Trainer, "MeanLossTrainer": MeanLossTrainer}


def whole(tensors):
    """Copies of tensors by name, put together from all processes."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().contiguous()
        for name, tensor in tensors.items()
    }


def run_case(case, directory, name):
    model = load_model(case.model, directory / "models", case.fsdp2)
    if case.estranged and PartialState().process_index > 0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter**3)
    data = examples(case.model)
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = MODELS[case.model].layer
    others = {"eval_dataset": data}
    if "r2_aware" in case.arguments:
        codec = AWARE_METHODS[case.arguments["r2_aware"]]
        others["quantization_config"] = R2QuantizationConfig(codec, bits=2, grain="channel", **case.quantization)
    arguments = dict(case.arguments)
    if arguments.get("r2_teacher") == "saved":
        arguments["r2_teacher"] = str(directory / "models" / f"{case.model}_teacher")
    trainer = make_trainer(model, data, directory / name, TRAINERS[case.trainer], others, **arguments)
    result = Result(processes=trainer.args.world_size)
    first = whole(learned(trainer))
    if case.train:
        trainer.train(resume_from_checkpoint=case.resume and str(directory / case.resume))
    for parameter_name, parameter in trainer.model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        result.held[parameter_name] = [local.numel(), parameter.numel()]
    if case.evaluate:
        result.eval_loss = trainer.evaluate()["eval_loss"]
    result.logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    result.weights = whole(trainer.model.state_dict())
    result.learned = whole(learned(trainer))
    result.change = max((float((result.learned[key] - first[key]).abs().max()) for key in first), default=0.0)
    return result


def learned(trainer):
    """Learnable values, and the strengths that were chosen."""
    range_loss, target = getattr(trainer, "range_loss", None), getattr(trainer, "strength_target", None)
    values = dict(range_loss.state_dict()) if range_loss is not None else {}
    return values | ({"strengths": target.strengths} if target is not None else {})


class Listener(logging.Handler):
    """Collects the messages of hf_r2 and transformers."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def pose_as_gpus():
    """Let accelerate believe that its CPUs are GPUs: for CPUs, it would quietly run DDP where FSDP2 was asked for."""
    prepare = PartialState.__init__

    def init(state, *args, **kwargs):
        prepare(state, *args, **kwargs)
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def main(directory, rank):
    listener = Listener()
    logging.getLogger("hf_r2").addHandler(listener)
    for name, case in read_cases(directory).items():
        listener.messages.clear()
        try:
            result = run_case(case, directory, name)
        except Exception:
            # An error in all processes spoils this case alone; after one in a single process the launch fails
            traceback.print_exc()
            result = Result(error=traceback.format_exc())
        result.messages = list(listener.messages)
        result.save(directory / name, rank)


if __name__ == "__main__":
    # Every training starts with a full collection, which need not look at the imported libraries
    gc.freeze()
    if "ACCELERATE_USE_FSDP" in os.environ:
        pose_as_gpus()
    state = PartialState(cpu=True, timeout=timedelta(seconds=60))
    main(Path(sys.argv[1]), state.process_index)
    state.wait_for_everyone()
    # Leave without the interpreter's teardown, in which gloo's threads abort the process now and then
    sys.stdout.flush()
    os._exit(0)

"""Teachers of a distillation: where they come from, where they are, and whether they are the same."""

import copy
import hashlib

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_r2.quantization import attached

START = "start"
"""Names the model itself as its training starts."""


def find_teacher(name: str | None, given: nn.Module | None, student: nn.Module) -> nn.Module | None:
    """Find the teacher of a training: the one given, a copy of the student, or a checkpoint's; None without any.

    Args:
        name: `"start"`, a local path or a name on the Hub.
        given: a model in hand.
        student: the model to be trained, before anything is changed in it.

    Raises:
        ValueError: for a name and a model at once, a model that shares parameters with the student, a student that
            cannot be copied, and a checkpoint that cannot teach it.
    """
    if given is not None and name is not None:
        raise ValueError(f"there are two teachers, teacher= and r2_teacher={name!r}: give one of them")
    if given is not None and {*map(id, given.parameters())} & {*map(id, student.parameters())}:
        raise ValueError(
            f"the teacher shares parameters with the model and would be trained with it: give r2_teacher={START!r}, "
            "which takes a copy"
        )
    if name is None:
        return given
    return copy_of(student) if name == START else load_teacher(name, student)


def copy_of(student: nn.Module) -> nn.Module:
    """Copy a float student, whole.

    Raises:
        ValueError: for a student that trains through its compression already, or that FSDP2 has cut.
    """
    if attached(student):
        raise ValueError(
            f"r2_teacher={START!r} needs the float model, but compression is attached to it: leave that to the "
            "trainer (r2_aware), or give r2_teacher the name of a checkpoint"
        )
    if any(isinstance(parameter, DTensor) for parameter in student.parameters()):
        raise ValueError(
            f"r2_teacher={START!r} cannot copy weights that FSDP2 has cut while loading: give r2_teacher the name of "
            "the checkpoint that the model was loaded from"
        )
    return copy.deepcopy(student)


def load_teacher(name: str, student: nn.Module) -> nn.Module:
    """Load a teacher with the Auto class of the student's class, or with the class itself if no Auto class has it.

    Remote code is never run.

    Raises:
        ValueError: for a student that is no transformers model, and a checkpoint that lacks some of the weights, which
            would be random.
    """
    student = getattr(student, "get_base_model", lambda: student)()  # without the adapters of PEFT
    if not isinstance(student, PreTrainedModel):
        raise ValueError(
            f"r2_teacher={name!r} can be loaded for transformers models only, not for {type(student).__name__}: load "
            "it yourself and pass teacher="
        )
    auto = _auto_class(student)
    options = {} if auto is None else {"trust_remote_code": False}
    teacher, info = (auto or type(student)).from_pretrained(name, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise ValueError(
            f"{name} is no teacher for {type(student).__name__}, because it lacks {', '.join(info['missing_keys'])}: "
            "name a checkpoint that was trained for the task"
        )
    return teacher


def _auto_class(student: PreTrainedModel) -> type | None:
    """Return the Auto class that has the student's class, but not `AutoModelForPreTraining`, which has every task's."""
    classes = (value for name, value in vars(modeling_auto).items() if name.startswith("AutoModel"))
    for auto in classes:
        mapping = getattr(auto, "_model_mapping", None)  # none in those that are deprecated
        if mapping is None or auto is modeling_auto.AutoModelForPreTraining:
            continue
        if mapping.get(type(student.config), None) is type(student):
            return auto
    return None


def place(teacher: nn.Module, device: torch.device, processes: int) -> None:
    """Put a teacher on a device, in evaluation mode; every process takes the first one's weights.

    The others may have none yet (FSDP with `cpu_ram_efficient_loading`), or a copy of weights of their own.
    """
    if processes > 1 and any(parameter.is_meta for parameter in teacher.parameters()):
        teacher.to_empty(device=device)
    teacher.to(device).eval()
    if processes > 1:
        for tensor in _tensors(teacher):
            tensor.data = broadcast(tensor.data.contiguous())


@torch.no_grad()
def fingerprint(teacher: nn.Module) -> Tensor:
    """Return 32 bytes that tell teachers apart: a digest of the exact sums of the bytes of their tensors."""
    bytes_of = (tensor.flatten().contiguous().view(torch.uint8) for tensor in _tensors(teacher))
    sums = [values.sum(dtype=torch.int64) for values in bytes_of]
    digest = hashlib.sha256(str(torch.stack(sums).tolist()).encode()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def _tensors(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers, tied ones as often as they are used: whether they are tied may differ by process."""
    return [
        *(parameter for _, parameter in model.named_parameters(remove_duplicate=False)),
        *(buffer for _, buffer in model.named_buffers(remove_duplicate=False)),
    ]

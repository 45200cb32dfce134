"""Checkpoints in training that every model resumes from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class ResumingMixin:
    """Makes a Trainer's checkpoints hold the names that the model has, and refuses those that lack some of its weights.

    transformers saves models whose modules were renamed (ViT in 5.23) under the names of the first release, which
    `from_pretrained` translates. Trainer reads its checkpoints without translating: it would go on with the weights
    that the model was made with, and say so in a warning only.
    """

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with _own_names(self.accelerator.unwrap_model(self.model)):
            super()._save_checkpoint(*args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        ignored = {*tied, *tied.values(), *(getattr(self.model, "_keys_to_ignore_on_save", None) or ())}
        missing = [name for name in load_result.missing_keys if name not in ignored]
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors of {type(self.model).__name__}, for example "
                f"{missing[0]!r}, which would stay as they are: resume from a checkpoint of this model, saved by "
                "R2Trainer"
            )
        super()._issue_warnings_after_load(load_result)


@contextmanager
def _own_names(model: nn.Module) -> Iterator[None]:
    """Let a transformers model be saved under its own names: with no conversion to be reverted."""
    before = vars(model).get("_weight_conversions")
    model._weight_conversions = []
    try:
        yield
    finally:
        if before is None:
            del model._weight_conversions
        else:
            model._weight_conversions = before

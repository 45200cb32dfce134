"""`transformers.Trainer` with range regularization."""

import time
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from hf_r2.report.manifest import Manifest
from hf_r2.training.mixin import R2Mixin


class R2Trainer(R2Mixin, Trainer):
    """Drop-in `Trainer` that keeps weights free of outliers; see [`R2Mixin`] for what it adds to the loss.

    `save_model` leaves a `manifest.json` beside the weights: the R2 arguments, seed, timings and training curves.
    """

    _seconds: float | None = None

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as `Trainer.train` does, and note how long it took."""
        start = time.perf_counter()
        output = super().train(*args, **kwargs)
        self._seconds = time.perf_counter() - start
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; the user's own call (not a checkpoint in training) also writes the manifest."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save:
            manifest = Manifest()
            manifest.add("train", **self.training_facts())
            manifest.save(output_dir or self.args.output_dir)

    def training_facts(self) -> dict[str, Any]:
        """Facts of the training stage: R2 arguments, seed, steps, seconds, and the logged curves."""
        r2 = {name: value for name, value in self.args.to_dict().items() if name.startswith("r2_")}
        return {
            "hub_model_id": self.args.hub_model_id,
            "r2": r2 if self.range_loss or self.range_projection else None,
            "seed": self.args.seed,
            "steps": self.state.global_step,
            "seconds": self._seconds,
            "log_history": self.state.log_history,
            "weights": self.final_weights or None,
        }

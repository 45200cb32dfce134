"""`transformers.Trainer` with range regularization."""

import os
import time
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from hf_r2.files import weight_file_bytes
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
        super().save_model(output_dir, _internal_call=True)
        if _internal_call:
            return
        self._write_manifest(output_dir or self.args.output_dir)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the manifest and, from it, the card."""
        self._write_manifest(self.args.output_dir)
        super().create_model_card(*args, **kwargs)

    def _write_manifest(self, directory: str) -> None:
        """Write the manifest of the model saved there; figures measured on these very weights since are kept."""
        if not self.args.should_save:
            return
        manifest = Manifest()
        manifest.add("train", **self.training_facts())
        if self.compression is not None and self.compression.facts:
            facts = dict(self.compression.facts)
            sizes = {"float": facts.pop("float_bytes"), "compressed": weight_file_bytes(directory)}
            facts["quantization_config"] = self.model.hf_quantizer.quantization_config.to_dict()  # now with digests
            earlier = Manifest.load(directory).last("quantize").get("quantization_config", {})
            if earlier.get("sha256") == facts["quantization_config"]["sha256"]:
                return
            manifest.add("quantize", base_model=self._base_model(), bytes=sizes, **facts)
        manifest.save(directory)

    def _base_model(self) -> str:
        """Name what the compressed model was made from, without a path of this machine."""
        return _without_path(self.model.name_or_path or self.args.hub_model_id or self.args.output_dir)

    def training_facts(self) -> dict[str, Any]:
        """Facts of the training stage: R2 arguments, teacher, seed, steps, seconds, and the logged curves."""
        r2 = {name: value for name, value in self.args.to_dict().items() if name.startswith("r2_")}
        r2["r2_teacher"] = r2["r2_teacher"] and _without_path(r2["r2_teacher"])
        return {
            "hub_model_id": self.args.hub_model_id,
            "r2": r2 if self.range_loss or self.range_projection else None,
            "seed": self.args.seed,
            "distillation": self._distillation_facts(r2["r2_teacher"]),
            "aware": self.compression.config.aware if self.compression else None,
            "steps": self.state.global_step,
            "seconds": self._seconds,
            "log_history": self.state.log_history,
            "weights": self.final_weights or None,
        }

    def _distillation_facts(self, name: str | None) -> dict[str, Any] | None:
        if self.teacher is None:
            return None
        return {
            "teacher": name or _without_path(getattr(self.teacher, "name_or_path", "") or type(self.teacher).__name__),
            "temperature": self.args.r2_distillation_temperature,
            "share": self.args.r2_distillation_share,
        }


def _without_path(name: str) -> str:
    """Name a model without a path of this machine."""
    return Path(name).name if os.path.exists(name) else name

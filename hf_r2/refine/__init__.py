"""Post-training refinement of compressed models."""

from hf_r2.refine.absorption import absorb_bias
from hf_r2.refine.adaptive_rounding import adaround
from hf_r2.refine.batch_norm import batch_norms, reestimate_batch_norm
from hf_r2.refine.bias_correction import correct_bias, expected_outputs
from hf_r2.refine.compensation import compensate
from hf_r2.refine.equalization import equalize
from hf_r2.refine.folding import fold_batch_norms
from hf_r2.refine.pipeline import REFINEMENTS, Refinement, in_order, refine_floats, refuse_steps_with_data

__all__ = [
    "REFINEMENTS",
    "Refinement",
    "absorb_bias",
    "adaround",
    "batch_norms",
    "compensate",
    "correct_bias",
    "equalize",
    "expected_outputs",
    "fold_batch_norms",
    "in_order",
    "reestimate_batch_norm",
    "refine_floats",
    "refuse_steps_with_data",
]

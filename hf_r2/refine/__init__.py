"""Post-training refinement of compressed models."""

from hf_r2.refine.batch_norm import batch_norms, reestimate_batch_norm

REFINEMENTS = ("batch_norm",)

__all__ = ["REFINEMENTS", "batch_norms", "reestimate_batch_norm"]

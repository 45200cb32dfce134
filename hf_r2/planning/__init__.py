"""Bits for each weight under a target of size or recovery."""

from hf_r2.planning.plan import Plan, plan_checkpoint

__all__ = ["Plan", "plan_checkpoint"]

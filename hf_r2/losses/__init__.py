"""Range losses: free functions on tensors, and [`RangeLoss`] over a model's selected weights."""

from hf_r2.losses.kurtosis import kurtosis
from hf_r2.losses.l_inf import l_inf
from hf_r2.losses.margin import margin
from hf_r2.losses.range_loss import RANGE_LOSSES, RangeLoss
from hf_r2.losses.soft_min_max import soft_min_max
from hf_r2.losses.tail_mean import tail_mean

__all__ = ["RANGE_LOSSES", "RangeLoss", "kurtosis", "l_inf", "margin", "soft_min_max", "tail_mean"]

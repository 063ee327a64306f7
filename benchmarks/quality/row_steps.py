"""The field's rule of quantization, to compare with: one step a row, in proportion to the deviation of its weights.

GPTQ goes through the columns in descending order of their inputs' power, as the field's best entries do. Only the steps
and that order are theirs: codes go through the same entropy coder, and calibration is the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hedgemix.artifact.tensors import LARGEST_INDEX, OCTAVE, Stepped, steps
from hedgemix.config import QuantizeConfig
from hedgemix.model.transformer import Model
from hedgemix.quantize import gptq
from hedgemix.quantize.calibration import Moments
from hedgemix.quantize.quantizer import Tensors, is_quantized

SHARES = {".mlp.": 11.5 / 31, ".attention.": 13 / 31, "": 14 / 63}
"""A step over the deviation of its row's weights, of matrices with these words in their names: k / (2^(b-1) - 1), with
k 11.5, 13 and 14 and b 6, 6 and 7 bits for MLP, attention and tables in the best entries of the public leaderboard."""


@torch.no_grad()
def row_step_tensors(model: Model, moments: Moments, config: QuantizeConfig, scale: float) -> Tensors:
    """Quantize every matrix and table with one step a row, `scale` times the field's; what is left is float16."""
    owner = {name: shared for shared, names in model.inputs().items() for name in names}
    tensors: Tensors = {}
    for name, parameter in model.named_parameters():
        if not is_quantized(parameter):
            tensors[name] = parameter.half()
            continue
        share = next(share for word, share in SHARES.items() if word in name)
        hessian_CC = moments.columns[owner.get(name, name)].clone()
        tensors[name] = rounded(parameter.float(), hessian_CC, share * scale, config, name)
    return tensors


def rounded(weight_RC: Tensor, hessian_CC: Tensor, share: float, config: QuantizeConfig, name: str) -> Stepped:
    """Round one matrix by GPTQ, the columns of most power first; steps are `share` times their row's deviation."""
    order_C = hessian_CC.diagonal().argsort(descending=True, stable=True)
    back_CC, _, _ = gptq.factor(hessian_CC[order_C][:, order_C], config.damping, name)
    deviation_R = weight_RC.std(1).clamp_min(2.0**-14)
    row_R = (OCTAVE * (deviation_R.double().log2() + math.log2(share))).round()
    row_R = row_R.clamp(-LARGEST_INDEX, LARGEST_INDEX).to(torch.int8)
    ones_C = torch.ones(weight_RC.shape[1], device=weight_RC.device)
    ordered = weight_RC[:, order_C]
    codes = gptq.round_to_steps(ordered[None], back_CC[None], steps(row_R)[None], ones_C[None], config.block_columns)
    codes_RC = torch.empty_like(codes[0])
    codes_RC[:, order_C] = codes[0]
    return Stepped(codes_RC, row_R, torch.zeros_like(order_C, dtype=torch.int8))

"""The feed-forward half of a block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mistral.config import Config


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), with silu(z) = z * sigmoid(z).

    Source: GLU Variants Improve Transformer, equation 6, https://arxiv.org/abs/2002.05202
    """

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        gate = self.gate_proj(x)  # [B, T, F]
        if torch.is_grad_enabled() or _is_watched(self.gate_proj):
            return self.down_proj(F.silu(gate) * self.up_proj(x))
        # In place: allocating [B, T, F] again costs more than the arithmetic.
        gate = F.silu(gate, inplace=True)
        return self.down_proj(gate.mul_(self.up_proj(x)))


def _is_watched(module: nn.Module) -> bool:
    """Whether its output may be held elsewhere: it has a hook, or is not a plain linear layer."""
    hooks = module._forward_hooks or nn.modules.module._global_forward_hooks
    return bool(hooks) or type(module) is not nn.Linear or "forward" in vars(module)

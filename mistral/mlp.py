"""The feed-forward half of a block."""

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
        # In place: allocating [B, T, F] again costs more than the arithmetic. (Autograd copies what
        # it needs first.)
        gate = F.silu(self.gate_proj(x), inplace=True)  # [B, T, F]
        return self.down_proj(gate.mul_(self.up_proj(x)))

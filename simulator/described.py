"""Models that published rows name and that minigpt does not train: mixtures of experts as built.

A row's columns do not say the experts' shape, so it is looked up by the model's name.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from minigpt.config import FFN, ModelConfig, Norm, Positions
from simulator.cells import MOST_LAYERS, Cells, Unknown, number, whole


@dataclass
class Described(ModelConfig):
    """A mixture of experts with heads, attention and blocks that ModelConfig has no words for.

    With `kv_rank` attention is latent (DeepSeek-AI 2024, DeepSeek-V2, section 2.1): keys and values
    come from kv_rank numbers a token, queries from q_rank (0: from all D), and `rotated` numbers a
    head carry positions besides the H others.
    """

    head_width: int = 0  # H; 0: D / heads
    q_rank: int = 0
    kv_rank: int = 0
    rotated: int = 0
    shared_ff: int = 0  # F of the experts that every token goes through, together
    dense_layers: int = 0  # blocks with one MLP of dense_ff in the place of experts
    dense_ff: int = 0
    window: int = 0  # tokens back that every second block attends to; 0: all of them do
    predicted_further: int = 0  # blocks and heads that predict the tokens after the next

    def __post_init__(self) -> None:
        """Nothing: heads need not divide the width."""

    @property
    def head_dim(self) -> int:
        return self.head_width or self.d_model // self.n_head

    @property
    def expert_layers(self) -> int:
        return self.n_layer - self.dense_layers

    @property
    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a block with experts."""
        d, f = self.d_model, self.shared_ff
        shared = {"up": (2 * f, d), "down": (d, f)} if f else {}
        return {
            **self._norm_shapes("attention_norm"),
            **self._norm_shapes("mlp_norm"),
            **{f"attention.{name}.weight": shape for name, shape in self._attention().items()},
            **{f"mlp.shared.{name}.weight": shape for name, shape in shared.items()},
            **self._expert_shapes(),
        }

    def _attention(self) -> dict[str, tuple[int, int]]:
        d, heads = self.d_model, self.n_head * self.head_dim
        if not self.kv_rank:
            kv = self.kv_heads * self.head_dim
            return {"q": (heads, d), "k": (kv, d), "v": (kv, d), "out": (d, heads)}
        key = heads + self.n_head * self.rotated
        q = (
            {"q_norm": (self.q_rank, d), "q": (key, self.q_rank)}
            if self.q_rank
            else {"q": (key, d)}
        )
        latent = {"kv_norm": (self.kv_rank + self.rotated, d), "kv": (2 * heads, self.kv_rank)}
        return {**q, **latent, "out": (d, heads)}

    @property
    def parameters(self) -> int:
        """Weights of the whole model."""
        block = sum(map(math.prod, self.block_shapes.values()))
        f = self.shared_ff + self.n_expert * self.ff_dim
        router = self.n_expert * self.d_model
        less = self.dense_layers * (3 * self.d_model * (f - self.dense_ff) + router)
        outer = sum(map(math.prod, self.outer_shapes.values()))
        return self.n_layer * block - less + outer


def score_width(model: ModelConfig) -> float:
    """Numbers of a head in a product of attention, the mean of scores and values."""
    return model.head_dim + getattr(model, "rotated", 0) / 2


LATENT = {"kv_rank": 512, "rotated": 64, "head_width": 128}
# Where a name, without case and signs, starts so. Of the papers and of the config.json that each
# publisher keeps beside the weights on Hugging Face
SHAPES: dict[str, dict[str, Any]] = {
    # DeepSeek-AI 2024, DeepSeek-V2, section 3.1.2 and appendix B
    "deepseekv2": LATENT
    | {"n_layer": 60, "n_expert": 160, "experts_per_token": 6, "d_ff": 1536, "shared_ff": 3072}
    | {"dense_layers": 1, "dense_ff": 12288, "q_rank": 1536},
    "deepseekv2lite": LATENT
    | {"n_layer": 27, "n_expert": 64, "experts_per_token": 6, "d_ff": 1408, "shared_ff": 2816}
    | {"dense_layers": 1, "dense_ff": 10944},
    # DeepSeek-AI 2024, DeepSeek-V3, section 4.2
    "deepseekv3": LATENT
    | {"n_layer": 61, "n_expert": 256, "experts_per_token": 8, "d_ff": 2048, "shared_ff": 2048}
    | {"dense_layers": 3, "dense_ff": 18432, "q_rank": 1536, "predicted_further": 1},
    # Kimi Team 2025, Kimi K2, table 2
    "kimik2": LATENT
    | {"n_layer": 61, "n_expert": 384, "experts_per_token": 8, "d_ff": 2048, "shared_ff": 2048}
    | {"dense_layers": 1, "dense_ff": 18432, "q_rank": 1536},
    # Qwen Team 2025, Qwen3 Technical Report, table 2
    "qwen330b": {"n_layer": 48, "n_expert": 128, "experts_per_token": 8, "d_ff": 768}
    | {"head_width": 128},
    "qwen3235b": {"n_layer": 94, "n_expert": 128, "experts_per_token": 8, "d_ff": 1536}
    | {"head_width": 128},
    # OpenAI 2025, gpt-oss-120b & gpt-oss-20b Model Card, section 2
    "gptoss120b": {"n_layer": 36, "n_expert": 128, "experts_per_token": 4, "d_ff": 2880}
    | {"head_width": 64, "window": 128},
    "gptoss20b": {"n_layer": 24, "n_expert": 32, "experts_per_token": 4, "d_ff": 2880}
    | {"head_width": 64, "window": 128},
    # Jiang et al. 2024, Mixtral of Experts, table 1
    "mixtral8x7b": {"n_layer": 32, "n_expert": 8, "experts_per_token": 2, "d_ff": 14336},
    "mixtral8x22b": {"n_layer": 56, "n_expert": 8, "experts_per_token": 2, "d_ff": 16384},
    # Muennighoff et al. 2024, OLMoE, table 1
    "olmoe": {"n_layer": 16, "n_expert": 64, "experts_per_token": 8, "d_ff": 1024},
}
ALIKE = {"deepseekr1": "deepseekv3", "kimi1t": "kimik2"}
OFF = 0.1  # of the parameters that a row states is what a shape may be off


def described(cells: Cells, seq_len: int) -> Described:
    """The model of a row with experts. Raises Unknown where its name or size says nothing."""
    given = cells.get("model_name", "")
    name = re.sub(r"[^a-z0-9]", "", given.lower())
    for alias, own in ALIKE.items():
        name = name.replace(alias, own, 1)
    fitting = [known for known in SHAPES if name.startswith(known)]
    if not fitting:
        raise Unknown(
            f"ffn_kind=moe: the shape of the experts of {given or 'a model'} is not known"
        )
    shape = dict(SHAPES[max(fitting, key=len)])
    full, layers = shape.pop("n_layer"), whole(cells, "n_layer", most=MOST_LAYERS)
    if layers != full and shape.get("dense_layers"):  # cut short: as large a share, one at least
        shape["dense_layers"] = max(1, round(shape["dense_layers"] * layers / full))
    if not _predicts_further(cells):
        shape.pop("predicted_further", None)
    heads = whole(cells, "n_head")
    model = Described(
        n_layer=layers,
        n_head=heads,
        n_kv_head=whole(cells, "n_kv_head", heads),
        d_model=whole(cells, "d_model"),
        vocab_size=whole(cells, "vocab"),
        context=seq_len,
        norm=Norm.rmsnorm,
        positions=Positions.rotary,
        ffn=FFN.moe,
        **shape,
    )
    stated = number(cells, "n_params")
    if stated and abs(model.parameters / stated - 1) > OFF:
        raise Unknown(
            f"n_params={stated:.3g}: the shape of {given} that is known has {model.parameters:.3g}"
        )
    return model


def _predicts_further(cells: Cells) -> bool:
    """NVIDIA's recipes train DeepSeek-V3's block that predicts a further token (Megatron-Bridge,
    scripts/performance/configs/deepseek: the m of pp_layout)."""
    return "NVIDIA" in cells.get("source", "")

"""What a user may set about the model, its data and its optimiser, checked on construction.

Standard library only: the launcher and the simulator read these without importing torch.
Shape letters: T sequence, D width, H head width, F MLP width, E experts, L layers, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from minigpt.checks import PATH, above, at_least, fraction, require


class Norm(str, Enum):
    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class Positions(str, Enum):
    learned = "learned"
    rotary = "rotary"
    sinusoidal = "sinusoidal"


class FFN(str, Enum):
    gelu = "gelu"
    swiglu = "swiglu"
    moe = "moe"  # experts that are swiglu each


class Attention(str, Enum):
    sdpa = "sdpa"
    plain = "plain"
    by_hand_plain = "by_hand_plain"  # minigpt/by_hand/attention.py
    by_hand_flash = "by_hand_flash"  # minigpt/by_hand/flash.py


class Pieces(str, Enum):
    torch = "torch"
    by_hand = "by_hand"  # minigpt/by_hand/: norm, MLP, dropout and loss, each with its backward


class Source(str, Enum):
    stdlib = "stdlib"
    text = "text"
    shakespeare = "shakespeare"
    openwebtext = "openwebtext"
    generated = "generated"
    random = "random"


class Tokenizer(str, Enum):
    """How text becomes ids: what data.tokenizer names, or `file` where it is a path."""

    bytes = "bytes"
    bpe = "bpe"
    by_hand_bpe = "by_hand_bpe"  # the same, trained by minigpt/by_hand/bpe.py
    ids = "ids"  # the files hold 16-bit ids already: nanoGPT's .bin
    file = "file"  # a tokenizer.json of Hugging Face


class OptimizerName(str, Enum):
    adamw = "adamw"
    sgd = "sgd"
    by_hand_adamw = "by_hand_adamw"


class Schedule(str, Enum):
    cosine = "cosine"
    constant = "constant"


@dataclass
class ModelConfig:
    """The shape of a decoder-only transformer. The defaults are configs/model/tiny.yaml's."""

    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int | None = None  # fewer than n_head is grouped-query attention; null: n_head
    d_model: int = 128
    d_ff: int | None = None  # null: 4 D for gelu, else 8/3 D in multiples of 64; of one expert
    vocab_size: int = 256
    # rows of embedding and head, so that tp divides them; ids from vocab_size on are never read nor
    # predicted. null: vocab_size
    pad_vocab_to: int | None = None
    context: int = 128  # the longest sequence (rows of a learned position table); seq_len's default
    norm: Norm = Norm.layernorm
    norm_eps: float = 1e-5
    positions: Positions = Positions.rotary
    rope_theta: float = 10000.0  # base of the rotary frequencies; Llama 3 uses 500000
    ffn: FFN = FFN.swiglu
    gelu_tanh: bool = False  # of ffn=gelu: the approximation that GPT-2 was trained with
    n_expert: int = 8  # these four: of ffn=moe
    experts_per_token: int = 2
    capacity_factor: float | None = None  # slots of an expert, in even shares; null: none dropped
    balance: float = 0.01  # weight of the load-balancing loss
    bias: bool = False  # in linear layers and LayerNorm; the head and the experts never have one
    tied: bool = False  # the head shares the embedding's weight
    dropout: float = 0.0
    attention: Attention = Attention.sdpa
    impl: Pieces = Pieces.torch

    def __post_init__(self) -> None:
        for key in ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "vocab_size", "context"):
            at_least(f"model.{key}", getattr(self, key), 1)
        require(
            self.pad_vocab_to is None or self.pad_vocab_to >= self.vocab_size,
            f"model.pad_vocab_to={self.pad_vocab_to}: must be at least "
            f"model.vocab_size={self.vocab_size}, which it pads",
        )
        at_least("model.n_expert", self.n_expert, 1)
        at_least("model.experts_per_token", self.experts_per_token, 1)
        require(
            self.experts_per_token <= self.n_expert,
            f"model.experts_per_token={self.experts_per_token}: "
            f"must be at most model.n_expert={self.n_expert}",
        )
        above("model.capacity_factor", self.capacity_factor, 0)
        at_least("model.balance", self.balance, 0)
        above("model.norm_eps", self.norm_eps, 0)
        above("model.rope_theta", self.rope_theta, 0)
        fraction("model.dropout", self.dropout)
        require(
            self.d_model % self.n_head == 0,
            f"model.d_model={self.d_model} % model.n_head={self.n_head} = "
            f"{self.d_model % self.n_head}: the width must divide by the heads",
        )
        require(
            self.n_head % self.kv_heads == 0,
            f"model.n_head={self.n_head} % model.n_kv_head={self.kv_heads} = "
            f"{self.n_head % self.kv_heads}: the query heads must divide by the key-value heads",
        )
        require(
            self.positions != Positions.rotary or self.head_dim % 2 == 0,
            f"model.positions=rotary: the head width model.d_model / model.n_head = "
            f"{self.head_dim} must be even",
        )
        require(
            self.positions != Positions.sinusoidal or self.d_model % 2 == 0,
            f"model.positions=sinusoidal: model.d_model={self.d_model} must be even",
        )
        require(
            self.attention != Attention.by_hand_flash or self.dropout == 0,
            f"model.attention=by_hand_flash: it has no dropout, and model.dropout={self.dropout}; "
            "use 0",
        )
        known = self.norm == Norm.layernorm and self.ffn in (FFN.gelu, FFN.swiglu)
        require(
            self.impl != Pieces.by_hand or (known and not self.gelu_tanh),
            f"model.impl=by_hand: has model.norm=layernorm and model.ffn=gelu or swiglu, not "
            f"{Norm(self.norm).value} with {FFN(self.ffn).value}, nor model.gelu_tanh=true",
        )

    @property
    def head_dim(self) -> int:
        """H, the width of one head."""
        return self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        """Heads of k and v, with null resolved."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and of the head: the vocabulary and its padding."""
        return self.vocab_size if self.pad_vocab_to is None else self.pad_vocab_to

    @property
    def ff_dim(self) -> int:
        """F, the width of the MLP or of one expert, with null resolved."""
        if self.d_ff is not None:
            return self.d_ff
        if self.ffn == FFN.gelu:
            return 4 * self.d_model
        return 64 * math.ceil(8 * self.d_model / (3 * 64))

    def expert_slots(self, seq_len: int) -> int:
        """C, choices of one sequence that an expert takes (Lepikhin et al. 2020, section 2.2).

        Never more than T: a token chooses an expert once. Needs a capacity_factor.
        """
        assert self.capacity_factor is not None
        share = seq_len * self.experts_per_token / self.n_expert
        return min(seq_len, math.ceil(self.capacity_factor * share))

    @property
    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of one block, under its name within the block."""
        d, f, kv = self.d_model, self.ff_dim, self.kv_heads * self.head_dim
        linears = {
            "attention.q": (d, d),
            "attention.k": (kv, d),
            "attention.v": (kv, d),
            "attention.out": (d, d),
        }
        if self.ffn == FFN.swiglu:
            linears["mlp.gate"] = (f, d)
        if self.ffn != FFN.moe:
            linears |= {"mlp.up": (f, d), "mlp.down": (d, f)}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in linears.items():
            shapes[f"{name}.weight"] = shape
            if self.bias:
                shapes[f"{name}.bias"] = shape[:1]
        return {
            **self._norm_shapes("attention_norm"),
            **self._norm_shapes("mlp_norm"),
            **shapes,
            **(self._expert_shapes() if self.ffn == FFN.moe else {}),
        }

    def _expert_shapes(self) -> dict[str, tuple[int, ...]]:
        e, f, d = self.n_expert, self.ff_dim, self.d_model
        return {
            "mlp.router.weight": (e, d),
            "mlp.experts.gate": (e, f, d),
            "mlp.experts.up": (e, f, d),
            "mlp.experts.down": (e, d, f),
        }

    @property
    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The same for what is in no block; a tied head has no parameter of its own."""
        v, d = self.vocab_rows, self.d_model
        learned = self.positions == Positions.learned
        return {
            "embedding.weight": (v, d),
            **({"positions.weight": (self.context, d)} if learned else {}),
            **self._norm_shapes("norm"),
            **({} if self.tied else {"head.weight": (v, d)}),
        }

    def _norm_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        has_bias = self.bias and self.norm == Norm.layernorm
        bias = {f"{name}.bias": (self.d_model,)} if has_bias else {}
        return {f"{name}.weight": (self.d_model,), **bias}

    @property
    def parameters(self) -> int:
        """Weights of the whole model, a tied head counted once."""
        block = sum(map(math.prod, self.block_shapes.values()))
        return self.n_layer * block + sum(map(math.prod, self.outer_shapes.values()))


@dataclass
class DataConfig:
    """The text that is trained on, and how it becomes tokens."""

    source: Source = Source.stdlib
    # of data=text: a file, a folder or a pattern of files
    path: str | None = field(default=None, metadata=PATH)
    text_field: str | None = "text"  # of JSON lines and parquet; null: the lines as they are
    sha256: str | None = None  # of the raw text; a text with another one is refused
    # bytes, bpe, by_hand_bpe, ids, or a tokenizer.json file
    tokenizer: str = field(default="bytes", metadata=PATH)
    # ids: bytes always make 256, a bpe is trained to this many; null: 256, or all of a file's
    vocab_size: int | None = None
    bpe_sample: int = 10_000_000  # bytes that a bpe is learnt from, spread over the training split
    validation_fraction: float = 0.1  # the tail of the text, held out
    tokens: int = 1_000_000  # how much data=generated and data=random make
    ragged: bool = False  # sequences of uneven length: targets behind a random end are ignored
    # where encoded text is kept, by its SHA-256
    cache: str = field(default="~/.cache/worldsize", metadata=PATH)

    def __post_init__(self) -> None:
        require(
            self.source != Source.text or bool(self.path),
            "data.path is not set: data=text needs data.path=FILE",
        )
        kind = self.kind
        size = self.id_count
        makes_tokens = self.source in (Source.generated, Source.random)
        require(
            kind != Tokenizer.bytes or makes_tokens or size == 256,
            f"data.vocab_size={size}: data.tokenizer=bytes always has 256",
        )
        require(
            kind == Tokenizer.bytes or not makes_tokens,
            f"data.tokenizer={self.tokenizer}: data={self.source.value} makes tokens, not "
            "text; use bytes",
        )
        if kind == Tokenizer.ids:
            require(
                self.source == Source.text,
                f"data.tokenizer=ids: data={self.source.value} is text; use bytes or bpe",
            )
            require(
                size is not None,
                "data.vocab_size is not set: data.tokenizer=ids needs the size of the vocabulary",
            )
        learns = kind in (Tokenizer.bpe, Tokenizer.by_hand_bpe)
        at_least("data.vocab_size", size, 257 if learns else 2)
        if kind != Tokenizer.file and size is not None:
            most = 2**16  # tokens are stored in 16 bits
            require(size <= most, f"data.vocab_size={size}: at most {most}")
        at_least("data.bpe_sample", self.bpe_sample, 1)
        above("data.validation_fraction", self.validation_fraction, 0)
        fraction("data.validation_fraction", self.validation_fraction)
        at_least("data.tokens", self.tokens, 1)

    @property
    def id_count(self) -> int | None:
        """The size of the vocabulary, with null resolved; None if only the data's files tell it."""
        from_files = self.kind in (Tokenizer.file, Tokenizer.ids)
        return 256 if self.vocab_size is None and not from_files else self.vocab_size

    @property
    def kind(self) -> Tokenizer:
        """How text becomes ids; a tokenizer that is none of the names is a file."""
        named = [kind for kind in Tokenizer if kind.value == self.tokenizer]
        return named[0] if named and named[0] != Tokenizer.file else Tokenizer.file


# Adam's best rate falls with the width (Yang et al. 2022, Tensor Programs V, table 3). This gives
# 6.7e-4 to GPT-2 (published 6e-4), 4.2e-5 to GPT-3 175B (6e-5), 1.3e-4 to Llama 3 8B (3e-4).
LR_TIMES_WIDTH = 0.512


@dataclass
class OptimizerConfig:
    """The update rule and its learning-rate schedule."""

    name: OptimizerName = OptimizerName.adamw
    lr: float | None = None  # the schedule's highest; null: LR_TIMES_WIDTH / model.d_model
    schedule: Schedule = Schedule.cosine  # after warm-up: down to min_lr_ratio x lr, or constant
    warmup_steps: int = 30
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1  # on matrices only; vectors (norms, biases) are never decayed
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.0  # sgd only

    def __post_init__(self) -> None:
        above("optimizer.lr", self.lr, 0)
        at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        require(
            0 <= self.min_lr_ratio <= 1,
            f"optimizer.min_lr_ratio={self.min_lr_ratio}: must be between 0 and 1",
        )
        at_least("optimizer.weight_decay", self.weight_decay, 0)
        for key in ("beta1", "beta2", "momentum"):
            fraction(f"optimizer.{key}", getattr(self, key))
        above("optimizer.eps", self.eps, 0)

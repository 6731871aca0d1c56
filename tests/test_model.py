"""The model: published sizes, causality, attention written out against torch's, initial values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.attention import plain, sdpa
from minigpt.by_hand.positions import rotary_angles, rotate, sinusoids
from minigpt.config import FFN, Attention, ModelConfig, Norm, Positions
from minigpt.lora import LoRALinear
from minigpt.model import GPT, IGNORE, initial_value, token_loss
from tests.configs import model_of

SMALL = {"n_layer": 2, "d_model": 32, "n_head": 4, "vocab_size": 50, "context": 16}

# exact counts of the released weights; GPT-3's is of the paper, rounded there (table 2.1)
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "mixtral_8x7b": 46_702_792_704,
}

model_configs = st.builds(
    ModelConfig,
    n_layer=st.integers(1, 3),
    n_head=st.just(4),
    n_kv_head=st.sampled_from([None, 1, 2]),
    d_model=st.sampled_from([16, 32]),
    d_ff=st.sampled_from([None, 24]),
    vocab_size=st.integers(2, 60),
    context=st.integers(4, 16),
    norm=st.sampled_from(Norm),
    positions=st.sampled_from(Positions),
    ffn=st.sampled_from(FFN),
    n_expert=st.sampled_from([2, 8]),
    bias=st.booleans(),
    tied=st.booleans(),
    attention=st.sampled_from(Attention),
)


def small(**changes: object) -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{**SMALL, **changes}))
    model.init_weights(0)
    return model.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    config = model_of(name)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name] == config.parameters


def test_gpt3_has_175_billion() -> None:
    config = model_of("gpt3_175b")
    with torch.device("meta"):
        counted = sum(p.numel() for p in GPT(config).parameters())
    assert counted == config.parameters
    assert round(counted / 1e9, 1) in (174.6, 175.0)


@given(model_configs)
@settings(max_examples=60)
def test_shapes_in_closed_form_are_the_modules(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = GPT(config)
    wanted = dict(config.outer_shapes)
    for layer in range(config.n_layer):
        wanted |= {f"blocks.{layer}.{name}": s for name, s in config.block_shapes.items()}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == wanted
    assert config.parameters == sum(p.numel() for p in model.parameters())


@given(model_configs, st.integers(1, 3))
@settings(max_examples=40)
def test_no_position_sees_a_later_one(config: ModelConfig, batch: int) -> None:
    model = GPT(config)
    model.init_weights(1)
    T = config.context
    tokens = torch.randint(config.vocab_size, (batch, T))
    changed = tokens.clone()
    changed[:, T // 2] = (changed[:, T // 2] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model.eval()(tokens), model(changed)
    # an expert's rows are one product, which rounds by how many there are
    rounding = 1e-6 if config.ffn == FFN.moe else 0.0
    assert (before - after)[:, : T // 2].abs().max() <= rounding
    assert before.shape == (batch, T, config.vocab_size)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 3, 8])
def test_plain_attention_equals_torchs(kv_heads: int, queries: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, queries, 16, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 8, 16, requires_grad=True) for _ in range(2))
    results = []
    for attend in (plain, sdpa):
        y = attend(q, k, v)
        results.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [32, 600])
def test_low_precision_on_a_cpu_stays_near_fp32(length: int) -> None:
    """Both ways round torch's slow kernel: scores written out, and the fp32 kernel."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 16) for _ in range(3))
    low = sdpa(*(x.bfloat16() for x in (q, k, v)))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), sdpa(q, k, v), atol=3e-2, rtol=3e-2)


def test_attention_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k = torch.zeros(64, 4, 8, 16), torch.zeros(64, 4, 8, 16)
    v = torch.ones(64, 4, 8, 16)
    for attend in (plain, sdpa):
        y = attend(q, k, v, 0.5)
        assert y.mean().item() == pytest.approx(1.0, abs=0.05)
        assert y.std() > 0.1


def test_rotary_scores_depend_on_the_distance_only() -> None:
    """Su et al. 2021, eq. 16: q at m and k at n give a product that depends on m - n."""
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(m: int, n: int) -> float:
        at = [rotary_angles(torch.tensor([p]), 8, 10000.0) for p in (m, n)]
        return (rotate(q, *at[0]) * rotate(k, *at[1])).sum().item()

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-4)


def test_sinusoids_are_those_of_the_paper() -> None:
    """Vaswani et al. 2017, section 3.5."""
    table = sinusoids(torch.arange(50), 8)
    assert table[5, 2].item() == pytest.approx(math.sin(5 / 10000 ** (2 / 8)), abs=1e-6)
    assert table[5, 3].item() == pytest.approx(math.cos(5 / 10000 ** (2 / 8)), abs=1e-6)


def test_tied_head_is_one_parameter_and_gets_both_gradients() -> None:
    model = small(tied=True)
    assert model.head is not None and model.embedding is not None
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    loss, _ = token_loss(model(torch.tensor([[1, 2]])), torch.tensor([[2, 3]]))
    loss.backward()
    gradient = model.embedding.weight.grad
    assert gradient is not None
    assert gradient[1].abs().sum() > 0, "the embedding's rows that were read"
    assert gradient[40].abs().sum() > 0, "the head's rows, which are all read"


def test_initial_values_are_gpt2s_and_depend_on_the_name_alone() -> None:
    config = ModelConfig(**{**SMALL, "d_model": 256, "n_layer": 8, "bias": True})
    projection = initial_value("blocks.3.attention.out.weight", (256, 256), config, 0)
    assert projection.std().item() == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.02)
    assert initial_value("embedding.weight", (50, 256), config, 0).std() == pytest.approx(
        0.02, rel=0.02
    )
    assert initial_value("blocks.0.mlp.up.bias", (8,), config, 0).eq(0).all()
    assert initial_value("blocks.0.mlp_norm.weight", (8,), config, 0).eq(1).all()
    again = initial_value("blocks.3.attention.out.weight", (256, 256), config, 0)
    assert torch.equal(projection, again)
    for other in (("blocks.4.attention.out.weight", 0), ("blocks.3.attention.out.weight", 1)):
        assert not torch.equal(projection, initial_value(other[0], (256, 256), config, other[1]))


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    model = small()
    tokens = torch.randint(50, (4, 16))
    loss, count = token_loss(model(tokens), tokens.roll(-1, 1))
    assert loss.item() / count.item() == pytest.approx(math.log(50), abs=0.05)


def test_token_loss_is_a_sum_and_a_count_of_what_counts() -> None:
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[1, 2, IGNORE], [IGNORE, 4, 0]])
    loss, count = token_loss(logits, targets)
    wanted = -sum(
        logits[b, t].log_softmax(-1)[targets[b, t]]
        for b in range(2)
        for t in range(3)
        if targets[b, t] != IGNORE
    )
    assert count == 4
    torch.testing.assert_close(loss, wanted)
    nothing, none = token_loss(logits, torch.full((2, 3), IGNORE))
    assert nothing == 0 and none == 0


def test_a_stage_passes_activations_on() -> None:
    """What a pipeline stage lacks is None; two stages in a row are the whole model."""
    whole, first, last = small(), small(), small()
    first.norm = first.head = None
    del first.blocks["1"]
    last.embedding = last.positions = None
    del last.blocks["0"]
    assert set(first.state_dict()) | set(last.state_dict()) == set(whole.state_dict())
    tokens = torch.randint(50, (2, 16))
    assert torch.equal(last(first(tokens)), whole(tokens))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_compiled_attention_projects_once(bias: bool, adapted: bool) -> None:
    """One product for q, k and v, of plain modules, with the same gradients; an adapter's stay."""
    attention = small(bias=bias, n_kv_head=2).blocks["0"].attention
    if adapted:
        attention.v = LoRALinear(attention.v, 2, 1.0)
        for parameter in attention.v.parameters():
            torch.nn.init.normal_(parameter)
    products: list[int] = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        products.append(sum(node.target is F.linear for node in graph.graph.nodes))
        return graph.forward

    x = torch.randn(2, 16, 32)
    parameters = list(attention.parameters())
    wanted = torch.autograd.grad(attention(x).square().sum(), parameters)
    compiled = torch.compile(attention, backend=count, fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), parameters)
    torch.testing.assert_close(found, wanted)
    assert products == [6 if adapted else 2]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"d_model": 30}, "model.d_model=30 % model.n_head=4 = 2"),
        ({"n_kv_head": 3}, "model.n_head=4 % model.n_kv_head=3 = 1"),
        ({"d_model": 12, "positions": Positions.rotary}, "model.positions=rotary"),
        ({"d_model": 5, "n_head": 5, "positions": Positions.sinusoidal}, "model.d_model=5"),
        ({"n_layer": 0}, "model.n_layer=0"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0"),
        ({"rope_theta": math.nan}, "model.rope_theta=nan"),
        ({"n_expert": 0}, "model.n_expert=0: must be at least 1"),
        ({"experts_per_token": 9}, "model.experts_per_token=9: must be at most model.n_expert=8"),
        ({"experts_per_token": 0}, "model.experts_per_token=0: must be at least 1"),
        ({"capacity_factor": 0.0}, "model.capacity_factor=0.0: must be greater than 0"),
        ({"balance": -0.1}, "model.balance=-0.1: must be at least 0"),
    ],
)
def test_bad_shapes_are_refused_by_name(changes: dict, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        ModelConfig(**{**SMALL, **changes})
    assert said in str(refused.value) and "\n" not in str(refused.value)

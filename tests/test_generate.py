"""Sampling: the cache gives what a full pass would, and the knobs do what they say."""

from __future__ import annotations

import pytest
import torch

from minigpt.config import Attention, ModelConfig, Positions
from minigpt.generate import KVCache, choose, generate
from minigpt.model import GPT


def a_model(**changes: object) -> GPT:
    small = {"n_layer": 2, "d_model": 32, "vocab_size": 40, "context": 16, **changes}
    model = GPT(ModelConfig(**small))  # type: ignore[arg-type]
    model.init_weights(3)
    with torch.no_grad():  # far from uniform, so that a wrong position shows
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model.eval()


@pytest.mark.parametrize("positions", Positions)
@pytest.mark.parametrize("attention", Attention)
@pytest.mark.parametrize("kv_heads", [None, 2])
@torch.no_grad()
def test_the_cache_gives_the_logits_of_a_full_pass(
    positions: Positions, attention: Attention, kv_heads: int | None
) -> None:
    model = a_model(positions=positions, attention=attention, n_kv_head=kv_heads)
    tokens = torch.randint(40, (3, 16))
    cache, parts = KVCache(16), []
    for chunk in tokens.split([5, 1, 1, 6, 3], dim=1):
        parts.append(model(chunk, cache=cache))
        cache.length += chunk.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_greedy_is_the_likeliest_token_each_time() -> None:
    model, ids = a_model(), [1, 2, 3]
    made = generate(model, ids, 10, temperature=0)
    for token in made:
        assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids = [*ids, token]
    assert generate(model, [1, 2, 3], 10, temperature=0) == made


def test_it_goes_on_beyond_the_context() -> None:
    model = a_model()
    made = generate(model, list(range(30)), 50, temperature=1.0, seed=1)
    assert len(made) == 50 and all(0 <= token < 40 for token in made)
    assert made == generate(model, list(range(30)), 50, temperature=1.0, seed=1)
    assert made != generate(model, list(range(30)), 50, temperature=1.0, seed=2)


def test_top_k_never_draws_another() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9, -1.0])
    stream = torch.Generator().manual_seed(0)
    drawn = {choose(logits, 1.0, stream, top_k=2) for _ in range(200)}
    assert drawn == {1, 2}


def test_draws_follow_the_softmax_of_logits_over_temperature() -> None:
    logits, stream = torch.tensor([0.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    drawn = torch.tensor([choose(logits, 0.5, stream) for _ in range(4000)])
    share = torch.bincount(drawn, minlength=3) / 4000
    torch.testing.assert_close(share, (logits / 0.5).softmax(-1), atol=0.03, rtol=0)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(a_model(), [], 5)

"""The network: what it sees, how it begins, and where it drops out."""

import math

import pytest
import torch

from model import GPT, GPTConfig


def tiny(**changes):
    torch.manual_seed(0)
    sizes = dict(block_size=12, vocab_size=8, n_layer=2, n_head=2, n_embd=16)
    return GPT(GPTConfig(**{**sizes, **changes}))


def opinionated(**changes):
    """A model in eval mode whose weights are large enough for every input to matter."""
    model = tiny(**changes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("rope", [True, False])
def test_every_position_sees_both_sides(rope):
    model = opinionated(rope=rope)
    idx = torch.zeros(1, 12, dtype=torch.long)
    for changed in (0, 11):
        other = idx.clone()
        other[0, changed] = 1
        moved = (model(idx) - model(other)).abs().amax(-1)[0]
        assert (moved > 1e-6).all()


@pytest.mark.parametrize("rope", [True, False])
def test_the_order_of_tokens_matters(rope):
    """Without positions, a bidirectional transformer could not tell abc from cba."""
    model = opinionated(rope=rope)
    idx = torch.tensor([[0, 1, 2, 7]])
    assert not torch.allclose(model(idx)[0, -1], model(idx[:, [2, 1, 0, 3]])[0, -1], atol=1e-4)


def test_rotary_positions_are_relative():
    """To shift all positions changes no attention, to stretch them does."""
    model = opinionated()
    idx, cos, sin = torch.arange(6)[None], model.cos, model.sin
    expected = model(idx)
    model.cos, model.sin = cos[6:], sin[6:]
    torch.testing.assert_close(model(idx), expected, atol=1e-4, rtol=1e-4)
    model.cos, model.sin = cos[::2], sin[::2]
    assert (model(idx) - expected).abs().max() > 0.01


@pytest.mark.parametrize("qk_norm", [True, False])
def test_with_qk_norm_the_lengths_of_queries_and_keys_do_not_count(qk_norm):
    model, idx = opinionated(qk_norm=qk_norm), torch.arange(8)[None]
    before = model(idx)
    with torch.no_grad():
        model.h[0].attn.c_attn.weight[:32] *= 8                # queries and keys
    assert torch.allclose(model(idx), before, atol=1e-4) == qk_norm


@pytest.mark.parametrize("bias", [True, False])
def test_the_initialization_is_gpt2s(bias):
    model = tiny(n_embd=128, n_layer=3, bias=bias)
    weights = dict(model.named_parameters())
    assert abs(weights["h.0.mlp.c_fc.weight"].std() - 0.02) < 1e-3
    for name in ("h.2.mlp.c_proj.weight", "h.1.attn.c_proj.weight"):
        assert abs(weights[name].std() - 0.02 / math.sqrt(6)) < 1e-3
    assert any("bias" in name for name in weights) == bias
    logits = model(torch.randint(8, (4, 12)))
    assert logits.shape == (4, 12, 8)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(8, (48,)))
    assert abs(loss - math.log(8)) < 0.2  # no opinion yet


def test_dropout_is_where_gpt2_has_it_and_in_training_only(monkeypatch):
    """After the embedding, on the attention weights, and on what each half of a block adds to the
    residual stream."""
    used = []
    F = torch.nn.functional
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def seen_dropout(x, p, training):
        used.append(p * training)
        return dropout(x, p, training)

    def seen_attention(*qkv, dropout_p, **kwargs):
        used.append(dropout_p)
        return attention(*qkv, dropout_p=dropout_p, **kwargs)
    monkeypatch.setattr(F, "dropout", seen_dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen_attention)
    model, idx = tiny(dropout=0.5), torch.zeros(1, 12, dtype=torch.long)
    assert not torch.equal(model(idx), model(idx)) and used == [0.5] * 2 * (1 + 3 * 2)
    model.eval()
    assert torch.equal(model(idx), model(idx)) and used[14:] == [0.0] * 14


def test_what_does_not_fit_is_a_value_error():
    with pytest.raises(ValueError, match="block_size=12"):
        tiny()(torch.zeros(1, 13, dtype=torch.long))
    for bad in (dict(n_head=3), dict(n_embd=2), dict(n_layer=0), dict(n_layer=2**17),
                dict(dropout=1.0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            tiny(**bad)


@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_model_does_not_see_what_follows(causal):
    model = opinionated(causal=causal)
    x = torch.randint(7, (2, 12))
    other = x.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 7
    same = torch.isclose(model(x), model(other), atol=1e-5).all(-1)
    assert bool(same[:, :6].all()) == causal and not same[:, 6:].any()

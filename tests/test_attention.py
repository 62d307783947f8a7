"""Attention in its three forms, against a loop over heads."""

import pytest
import torch

from sptseg_lib.attention import attend, attend_in_pairs, plain_attention


def by_hand(q, k, v):
    heads = []
    for b in range(len(q)):
        for h in range(q.shape[1]):
            weight = torch.exp(q[b, h] @ k[b, h].T / q.shape[-1] ** 0.5)
            heads.append(weight / weight.sum(1, keepdim=True) @ v[b, h])
    return torch.stack(heads).view(*q.shape[:3], -1)


@pytest.fixture
def qkv():
    return [torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7)]


@pytest.mark.parametrize("form", [attend, plain_attention, attend_in_pairs])
def test_forms_agree_with_their_gradients(form, qkv):
    weight = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    expected = torch.autograd.grad((by_hand(*qkv) * weight).sum(), qkv)
    torch.testing.assert_close(form(*qkv), by_hand(*qkv))
    torch.testing.assert_close(torch.autograd.grad((form(*qkv) * weight).sum(), qkv), expected)
    with torch.no_grad():
        torch.testing.assert_close(form(*qkv), by_hand(*qkv))


@pytest.mark.parametrize("tokens", [9, 600])
def test_bfloat16_on_a_cpu_is_near_float32(tokens):
    q, k, v = (torch.randn(1, 3, tokens, 8) for _ in range(3))
    actual = attend(*(x.bfloat16() for x in (q, k, v)))
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), attend(q, k, v), atol=0.03, rtol=0.03)


def test_pairs_keep_no_weights_for_the_gradient(qkv):
    long = [torch.randn(1, 2, 64, 4, requires_grad=True) for _ in range(3)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        attend_in_pairs(*long)
    assert max(kept, default=0) < 2 * 64 * 64, "the (N, N) weights are kept"
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        plain_attention(*long)
    assert max(kept) == 2 * 64 * 64

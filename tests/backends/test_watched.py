"""What the last token attends to, told by a pass, against eager attention's own weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from kvcomm.backends import watched
from kvcomm.errors import CacheFault
from kvcomm.testing import FAMILIES, tiny_random

if TYPE_CHECKING:
    from tests.backends.conftest import Case

N = 72  # as in conftest
OVERRIDES: dict[str, dict[str, Any]] = {"gemma2": {"attn_logit_softcapping": None}}  # fused attention leaves it out, eager not


@torch.no_grad()
def eager(family: str, ids: torch.Tensor) -> torch.Tensor:
    """[N]: mean over layers and heads of the last row, by plain transformers, on a model of its own."""
    model: PreTrainedModel = tiny_random(family, **OVERRIDES.get(family, {}))
    model.set_attn_implementation("eager")
    return torch.stack([layer[0, :, -1] for layer in model(input_ids=ids, output_attentions=True).attentions]).mean((0, 1))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_attention_is_that_of_the_models_eager_code(make: Callable[..., Case], family: str) -> None:
    """After reuse that changes nothing, by a pass over seams; sliding layers see their window alone."""
    case = make(family, **OVERRIDES.get(family, {}))
    cache = case.cache(case.same_place((0, 20), (22, 61)))
    seen = case.backend.look(cache, case.ids, torch.tensor([7, 20, 21, *range(61, N)]), last=3)
    assert seen.attention.shape == (N,)
    torch.testing.assert_close(seen.attention, eager(family, case.ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.logits, case.logits[-3:], rtol=0, atol=1e-4)


def test_the_model_is_left_as_it_was(make: Callable[..., Case]) -> None:
    """Attention, answers and what is watched for changes, before and after looking."""
    for family in ("llama", "gpt_oss"):
        case = make(family)
        attention = case.model.config._attn_implementation
        plain = case.generate()
        cache = case.cache(case.same_place((0, 61)))
        case.backend.look(cache, case.ids, torch.arange(61, N))
        assert case.model.config._attn_implementation == attention
        assert case.backend.refusal(case.ids, {}) is None
        case.backend.arm(cache, case.ids, torch.tensor([N - 1]))
        with case.backend.hooked():
            assert torch.equal(case.generate(cache), plain)


def test_drafted_tokens_can_be_looked_at_and_taken_back(make: Callable[..., Case]) -> None:
    """Logits behind the prompt and five tokens more, against one dense forward; then the prompt's own answer."""
    case = make("qwen3")
    longer = torch.cat([case.ids, case.prompt(9, 5)], dim=1)
    cache = case.cache(case.same_place((0, 61)))
    case.backend.look(cache, case.ids, torch.arange(61, N))
    seen = case.backend.look(cache, longer, torch.tensor([3, *range(N - 1, N + 5)]), last=6)
    torch.testing.assert_close(seen.logits, case.dense(longer)[1][-6:], rtol=0, atol=1e-4)
    case.backend.arm(cache, case.ids, torch.tensor([N - 1]))
    with case.backend.hooked():
        assert torch.equal(case.generate(cache), case.generate())


def test_attention_that_cannot_be_watched_is_a_fault(make: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention functions of a kind that is not known, and of a model with a table of its own."""

    class Own(nn.Module):
        pass

    assert watched.Witness.of(Own(), "sdpa") is None
    case = make("llama")
    monkeypatch.setattr(case.model.config, "_attn_implementation", "paged|eager")
    with pytest.raises(CacheFault, match="cannot be watched"):
        case.backend.look(case.cache(case.same_place((0, 71))), case.ids, torch.tensor([N - 1]))


def test_a_model_that_hands_nothing_down_is_a_fault() -> None:
    """As if its forward had dropped the argument."""
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(CacheFault, match="hand"):
        watched.attend(nn.Module(), q, q, q, torch.zeros(1, 1, 3, 3))

"""Moving keys, against rotation by complex numbers in float64 and against the model's own keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvcomm.backends.hf import HFBackend
from kvcomm.errors import UnsupportedModel
from kvcomm.rope import Rope, relative, tolerance
from kvcomm.testing import FAMILIES, tiny_random

INTERLEAVED = {"glm", "cohere2"}  # element pairs (0, 1), (2, 3), ...; the others pair element i with i + d / 2


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str) -> PreTrainedModel:
    return tiny_random(family)


@pytest.fixture(scope="module")
def rope(model: PreTrainedModel) -> Rope:
    return HFBackend(model).rope


def random_keys(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(3)).to(dtype)


def moved(rope: Rope, layer: int, keys: Tensor, old: Tensor, new: Tensor, lengths: tuple[int, int] = (30, 30)) -> Tensor:
    out = torch.empty_like(keys)
    rope.rotate(layer, keys, rope.turn(rope.tables(new, lengths[1]), rope.tables(old, lengths[0])), out)
    return out


def as_complex(keys: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """The rotary part of keys [heads, tokens, dim] as complex128 [heads, tokens, rotary_dim / 2]."""
    x = keys[..., :rotary_dim].double()
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.complex(a, b)


def test_there_and_back_is_the_identity(rope: Rope) -> None:
    here, there, keys = torch.arange(5, 25), torch.arange(300, 320), random_keys(20)
    for layer, rotates in enumerate(rope.rotates):
        away = moved(rope, layer, keys, here, there)
        assert torch.equal(away, keys) != rotates
        torch.testing.assert_close(moved(rope, layer, away, there, here), keys, rtol=0, atol=1e-5)


def test_equals_complex_multiplication_in_float64(family: str, model: PreTrainedModel, rope: Rope) -> None:
    """`rotate` against exp(i * moved * frequency), with the frequencies that the model's rotary module holds."""
    rotary, keys = model.get_decoder().rotary_emb, random_keys(20)
    here, there = torch.arange(5, 25), torch.arange(11, 31)
    for layer in (i for i, rotates in enumerate(rope.rotates) if rotates):
        name = f"{rope.types[layer]}_inv_freq" if rope.types[layer] else "inv_freq"
        frequency = getattr(rotary, name).double()  # [rotary_dim / 2]
        rotary_dim = 2 * len(frequency)
        turned = as_complex(keys, rotary_dim, family in INTERLEAVED) * torch.exp(1j * (there - here)[:, None] * frequency)
        out = moved(rope, layer, keys, here, there)
        torch.testing.assert_close(as_complex(out, rotary_dim, family in INTERLEAVED), turned, rtol=0, atol=2e-5)
        assert torch.equal(out[..., rotary_dim:], keys[..., rotary_dim:])


def keys_of(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> list[Tensor]:
    """Keys [heads, tokens, dim] per layer, as the model caches them at `positions`; tables follow the last position."""
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[None], position_ids=positions[None], past_key_values=cache, use_cache=True)
    return [layer.keys[0] for layer in cache.layers]  # type: ignore[union-attr,index]  # every layer of these models has keys


@pytest.mark.parametrize(("old", "new"), [(0, 3000), (0, 60), (60, 0), (900, 7)])
def test_moved_keys_are_the_models_own(model: PreTrainedModel, rope: Rope, old: int, new: int) -> None:
    """One prompt at two places: attention sees differences of positions only, so keys of all layers differ by rotation alone
    (but for the rounding of angles, which deeper layers have seen).
    """
    layers = len(rope.rotates) if rope.same(old + 20, new + 20) else 1  # under other tables attention itself is different
    ids, steps = torch.arange(5, 25), torch.arange(20)
    before, after = keys_of(model, ids, old + steps), keys_of(model, ids, new + steps)
    for layer in range(layers):
        out = moved(rope, layer, before[layer], old + steps, new + steps, (old + 20, new + 20))
        assert relative(out, after[layer]) < (3e-4 if layer else 2e-5)


@pytest.mark.parametrize("new", [5, 40, 3000, 100_000])
def test_far_positions_lose_nothing(new: int) -> None:
    """From position 7 to `new` and beyond, float32 tables against angles computed in float64; a step of float32 at 100,000
    radians is 8e-3, so tables of the difference would be off by that much.
    """
    model = tiny_random("llama")
    rope, keys, frequency = HFBackend(model).rope, random_keys(1), model.get_decoder().rotary_emb.inv_freq
    old, there = torch.tensor([new - 3]), torch.tensor([new])
    angle = {p: (p.float()[:, None] * frequency).double() for p in (old, there)}  # as the model rounds them
    truth = as_complex(keys, 16, False) * torch.exp(1j * (angle[there] - angle[old]))
    out = moved(rope, 0, keys, old, there)
    torch.testing.assert_close(as_complex(out, 16, False), truth, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keys_move_within_one_rounding(dtype: torch.dtype) -> None:
    rope, keys = HFBackend(tiny_random("llama")).rope, random_keys(20)
    here, there = torch.arange(5, 25), torch.arange(705, 725)
    out = moved(rope, 0, keys.to(dtype), here, there)
    assert out.dtype == dtype
    assert relative(out, moved(rope, 0, keys.to(dtype).float(), here, there)) <= torch.finfo(dtype).eps


def test_attention_factor_cancels() -> None:
    """Yarn scales its tables by 1.14; the rotation between two of them must not."""
    rope = HFBackend(tiny_random("llama-yarn")).rope
    steps = torch.arange(20)
    (cos, sin), (new_cos, new_sin) = (
        rope.tables(steps, 20)[None],
        rope.turn(rope.tables(steps + 9, 29), rope.tables(steps, 20))[None],
    )
    assert float((cos**2 + sin**2).min()) > 1.2
    torch.testing.assert_close(new_cos**2 + new_sin**2, torch.ones_like(new_cos), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama-dynamic", "phi3-longrope"])
def test_tables_follow_the_length_that_is_named(family: str) -> None:
    """Tables for a length, whatever was asked before, against a new model's rotary module at that length."""
    rope, positions = HFBackend(tiny_random(family)).rope, torch.arange(10)
    for length in (200, 30, 90, 41, 40, 200):
        fresh = tiny_random(family).get_decoder().rotary_emb
        cos, sin = fresh(torch.empty(1, 0), torch.cat([positions, torch.tensor([length - 1])])[None])
        ours = rope.tables(positions, length)[None]
        assert torch.equal(ours[0], cos[:, :10])
        assert torch.equal(ours[1], sin[:, :10])
    assert rope.follows_length
    assert rope.same(12, 40)
    assert not rope.same(40, 41)


@pytest.mark.parametrize("family", ["llama", "llama-yarn", "gemma3", "glm"])
def test_other_tables_do_not_follow_the_length(family: str) -> None:
    rope = HFBackend(tiny_random(family)).rope
    assert not rope.follows_length
    assert rope.same(3, 30_000)


def test_which_layers_rotate() -> None:
    """Against the families' definitions: SmolLM3 leaves out every fourth layer, Cohere2 the layers that see everything."""
    assert HFBackend(tiny_random("smollm3")).rope.rotates == (True, True, True, False)
    assert HFBackend(tiny_random("cohere2")).rope.rotates == (True, False, True, False)
    assert HFBackend(tiny_random("gemma3")).rope.rotates == (True,) * 4


def test_keys_that_are_no_rotation_of_each_other_are_refused() -> None:
    model = tiny_random("llama")
    rope, near = Rope(model.get_decoder(), 1), random_keys(1)
    turn = rope.turn(rope.tables(torch.tensor([97]), 98), rope.tables(torch.tensor([0]), 98))
    far = torch.empty_like(near)
    rope.rotate(0, near, turn, far)
    rope.calibrate([near], [far], turn)  # what a rotation is
    for wrong in (far + 1e-3, far * 1.01, far.flip(-1), torch.full_like(far, torch.nan)):
        with pytest.raises(UnsupportedModel, match="not the rotated keys"):
            rope.calibrate([near], [wrong], turn)


def test_one_layer_of_nan_is_refused() -> None:
    rope, near = Rope(tiny_random("llama").get_decoder(), 2), random_keys(1)
    turn = rope.turn(rope.tables(torch.tensor([97]), 98), rope.tables(torch.tensor([0]), 98))
    far = torch.empty_like(near)
    rope.rotate(0, near, turn, far)
    with pytest.raises(UnsupportedModel, match="not the rotated keys"):
        rope.calibrate([near, near], [far, torch.full_like(far, torch.nan)], turn)


def test_a_model_that_never_rotates_is_refused() -> None:
    rope, near = Rope(tiny_random("llama").get_decoder(), 1), random_keys(1)
    with pytest.raises(UnsupportedModel, match="not the rotated keys"):
        rope.calibrate([near], [near], rope.turn(rope.tables(torch.tensor([97]), 98), rope.tables(torch.tensor([0]), 98)))


def test_tolerance_is_some_roundings_and_nan_is_never_within() -> None:
    assert tolerance(torch.float32) == 1e-5
    assert 0.02 < tolerance(torch.bfloat16) < 0.05
    assert not relative(torch.tensor([torch.nan]), torch.ones(1)) <= 1e30


@pytest.mark.parametrize(("family", "halves"), [("llama", True), ("phi3", True), ("gpt_neox", True), ("glm", False)])
def test_the_short_way_of_turning_is_taken_where_it_is_the_models_own(family: str, halves: bool) -> None:
    """Keys turned the short way against the same keys turned by the model's function; which one is taken is decided at load."""
    rope = HFBackend(tiny_random(family)).rope
    assert rope._by_halves is halves
    old, new = torch.arange(5), torch.arange(20, 25)
    taken = moved(rope, 0, random_keys(5), old, new)
    rope._by_halves = False
    assert torch.allclose(taken, moved(rope, 0, random_keys(5), old, new), atol=1e-6)

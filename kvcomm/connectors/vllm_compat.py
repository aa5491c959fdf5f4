"""Everything that is bound to a version of vLLM beyond the connector's own interface; other modules hold no such knowledge.

Written against 0.32 and tried there alone. Uses: the names of a request's fields, `Request.block_hashes` (salt), the worker's
attribute `model_runner` (handle), its `attn_groups` and their metadata builders, `CommonAttentionMetadata`,
`set_forward_context`, the model's call, `do_kv_cache_update` (drafters inside vLLM use the same six to run a forward); the
model's `embed_input_ids`; to fold tokens into the engine's own forward, the runner's input buffers and the forward's context.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from kvcomm.connectors.vllm import TESTED
from kvcomm.errors import UnsupportedModel

__all__ = [
    "LayerCache",
    "Rows",
    "Runner",
    "RunnerHandle",
    "asked",
    "check_version",
    "engine_refusal",
    "fingerprint",
    "finished_well",
    "layer_caches",
    "log",
    "request_refusal",
    "running",
    "salt",
]

log = logging.getLogger("vllm.kvcomm")  # vLLM prints nothing of loggers outside its own name


def check_version(*, untested: bool) -> None:
    """Raises UnsupportedModel for a vLLM that this module was not tried with; `untested` makes that a warning."""
    import vllm

    if TESTED.contains(vllm.__version__, prereleases=True):
        return
    said = f"kvcomm's connector was tested with vLLM {TESTED}, this is {vllm.__version__}"
    if not untested:
        raise UnsupportedModel(f"{said}; install a tested version, or set untested_vllm in the connector's extra config")
    log.warning("%s: going on because untested_vllm is set. Answers may be WRONG.", said)


def engine_refusal(config: Any, kv_cache_config: Any) -> str | None:
    """Why an engine (VllmConfig, KVCacheConfig) cannot share KV; None if it can."""
    model, parallel, groups = config.model_config, config.parallel_config, kv_cache_config.kv_cache_groups
    specs = [group.kv_cache_spec for group in groups]
    dtype = str(model.dtype).removeprefix("torch.")
    reasons = {
        "its cache is a compressed latent (MLA), whose position is not in the keys": model.use_mla,
        "it keeps a recurrent state (state-space or hybrid)": model.is_hybrid or model.is_attention_free,
        "it is an encoder-decoder": model.is_encoder_decoder,
        "its positions have several axes (M-RoPE)": model.uses_mrope,
        "its layers cache K/V in several ways (sliding windows?)": len(specs) != 1
        or type(specs[0]).__name__ != "FullAttentionSpec"
        or bool(specs[0].sliding_window or specs[0].attention_chunk_size or specs[0].non_causal),
        "a draft model writes to its cache (speculative decoding)": config.speculative_config is not None,
        f"its cache is quantised ({config.cache_config.cache_dtype})": config.cache_config.cache_dtype not in ("auto", dtype),
        "it is spread over a pipeline": parallel.pipeline_parallel_size != 1,
        "data-parallel engines work in step": parallel.data_parallel_size != 1,
        "its context is spread over devices": parallel.decode_context_parallel_size != 1
        or getattr(parallel, "prefill_context_parallel_size", 1) != 1,
    }
    return next((reason for reason, true in reasons.items() if true), None)


def request_refusal(request: Any) -> str | None:
    """Why a request must be left alone; None if it can be served."""
    if request.sampling_params is None:
        return "not-generating"
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "prompt-embeddings"
    if request.mm_features:
        return "multimodal"
    if request.lora_request is not None:
        return "adapter"
    if request.resumable:
        return "streamed-input"
    if request.sampling_params.prompt_logprobs is not None:
        return "prompt-logprobs"
    if request.skip_reading_prefix_cache:
        return "skips-prefix-cache"
    return None


def asked(request: Any) -> dict[str, Any]:
    """What a request says to kvcomm: `kv_transfer_params["kvcomm"]`, or `kvcomm_...` among `vllm_xargs`."""
    said = (request.kv_transfer_params or {}).get("kvcomm") or {}
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    xargs = {k.removeprefix("kvcomm_"): v for k, v in extra.items() if k.startswith("kvcomm_")}
    return {**xargs, **said} if isinstance(said, Mapping) else {"mode": said}


def salt(request: Any, kept: int) -> bool:
    """Take a request out of everybody's prefix cache, but for its first `kept` blocks: those behind them are hashed under a
    salt of its own from now on. False, and nothing is changed, where that is not possible.
    """
    hashes, tenant = list(request.block_hashes), request.cache_salt
    alone = uuid4()
    if kept:  # a block's hash holds that of the block before it: let that one be nobody else's while the next are made
        request.block_hashes = [*hashes[: kept - 1], blake2b(hashes[kept - 1] + alone.bytes, digest_size=32).digest()]
    else:
        request.cache_salt, request.block_hashes = f"kvcomm:{alone}:{tenant or ''}", []
    request.update_block_hashes()
    if kept:
        request.block_hashes[:kept] = hashes[:kept]
    if len(request.block_hashes) == len(hashes) and not set(request.block_hashes[kept:]) & set(hashes):
        return True
    request.cache_salt, request.block_hashes = tenant, hashes
    return False


def running(request: Any) -> bool:
    """Whether a request is part of the engine's steps now."""
    return bool(request.status.name == "RUNNING")


def finished_well(request: Any) -> bool:
    """Whether a finished request ran to its end: what it computed is whole."""
    return request.status.name in ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_REPETITION")


def fingerprint(config: Any) -> str:
    """Identity of the model of one engine, for KV that never leaves it."""
    model = config.model_config
    facts = (model.model, model.revision, str(model.dtype), model.quantization, config.cache_config.cache_dtype)
    return blake2b(repr((*facts, model.hf_text_config.to_json_string())).encode(), digest_size=16).hexdigest()


# -- the worker's side --------------------------------------------------------------------------------------------------

_RUNNERS: list[weakref.ref[Any]] = []  # of this process; a connector has no other way to the model


class RunnerHandle:
    """Mixed into vLLM's worker by `--worker-extension-cls`: notes the model runner when the worker sets its attribute."""

    @property
    def model_runner(self) -> Any:
        return self.__dict__.get("_kvcomm_runner")

    @model_runner.setter
    def model_runner(self, runner: Any) -> None:
        self.__dict__["_kvcomm_runner"] = runner
        if runner is not None:
            _RUNNERS[:] = [r for r in _RUNNERS if r() is not None]
            _RUNNERS.append(weakref.ref(runner))


@dataclass(frozen=True, eq=False)
class LayerCache:
    """One attention layer and its paged K/V: first axis blocks, what a block holds is the backend's business."""

    layer: Any
    paged: Tensor

    @property
    def heads(self) -> int:
        return int(self.layer.num_kv_heads)

    @property
    def dim(self) -> int:
        return int(self.layer.head_size)

    def write(self, keys: Tensor, values: Tensor, slots: Tensor, paged: Tensor | None = None) -> None:
        """keys, values [tokens, heads, dim] in the model's dtype, slots int64 [tokens] = block * block size + offset."""
        paged = self.paged if paged is None else paged
        self.layer.impl.do_kv_cache_update(self.layer, keys, values, paged, slots)


def layer_caches(config: Any, paged: Mapping[str, Tensor], blocks: int) -> tuple[LayerCache, ...]:
    """The layers in the order of the model. Raises UnsupportedModel where their blocks cannot be told apart."""
    from vllm.model_executor.models.utils import extract_layer_index

    layers = config.compilation_config.static_forward_context
    names = sorted(paged, key=extract_layer_index)
    for name in names:
        if paged[name].shape[0] != blocks or getattr(layers[name], "kv_sharing_target_layer_name", None):
            raise UnsupportedModel(
                f"the cache of {name} is {list(paged[name].shape)}; [{blocks} blocks, ...] of its own expected"
            )
    return tuple(LayerCache(layers[name], paged[name]) for name in names)


@dataclass(frozen=True, eq=False)
class Rows:
    """Sequences of one short forward: row i computes `tokens[i]` ids that end its `lengths[i]` tokens of context."""

    ids: Tensor  # int32 [n]
    positions: Tensor  # int64 [n], of the rotation alone
    slots: Tensor  # int64 [n], where K/V go
    tokens: tuple[int, ...]  # per row
    lengths: tuple[int, ...]  # per row
    blocks: Sequence[Sequence[int]]  # per row


class Runner:
    """Runs short forwards over the paged cache, beside the engine's own."""

    def __init__(self, config: Any) -> None:
        """Raises UnsupportedModel where this process has no model runner, or one whose cache is built otherwise."""
        runners = [r for r in (ref() for ref in _RUNNERS) if r is not None]
        mine = [r for r in runners if r.vllm_config is config] or runners[-1:]
        if not mine:
            raise UnsupportedModel(
                "the connector cannot reach the model; add --worker-extension-cls kvcomm.connectors.vllm.RunnerHandle"
            )
        self._runner, self._config = mine[0], mine[0].vllm_config
        if missing := [name for name in ("attn_groups", "input_batch", "model") if not hasattr(self._runner, name)]:
            raise UnsupportedModel(
                f"the model runner {type(self._runner).__name__} has no {', '.join(missing)}; set VLLM_USE_V2_MODEL_RUNNER=0"
            )
        groups = [group for groups in self._runner.attn_groups for group in groups]
        if any(group.kernel_block_size is not None for group in groups):
            raise UnsupportedModel("attention uses other blocks than the cache's manager")
        # Builders of our own, for either kind of forward: they may hold buffers that the step in progress points to.
        self._apart, self._folded = (
            [
                (g.layer_names, g.backend.get_builder_cls()(g.kv_cache_spec, g.layer_names, self._config, self._runner.device))
                for g in groups
            ]
            for _ in range(2)
        )
        self.device: torch.device = self._runner.device
        if self.device.type == "cpu" and torch.cpu._is_amx_tile_supported():
            torch.cpu._init_amx()  # asks the kernel for the tiles; else a forward before the engine's first one is killed
        self.max_tokens = int(self._config.scheduler_config.max_num_batched_tokens)
        self.max_rows = int(self._config.scheduler_config.max_num_seqs)

    def embed(self, ids: Tensor) -> Tensor:
        """[n] (int64) -> [n, channels]. Not for a vocabulary that is spread over ranks."""
        embedded: Tensor = self._runner.model.embed_input_ids(ids.to(self.device))
        return embedded

    @torch.inference_mode()
    def forward(self, rows: Rows) -> None:
        """Computes K/V of all rows. In every layer all of them are written before any row attends."""
        from vllm.forward_context import set_forward_context

        starts = torch.zeros(len(rows.tokens) + 1, dtype=torch.int32)
        starts[1:] = torch.tensor(rows.tokens).cumsum(0)
        lengths = torch.tensor(rows.lengths, dtype=torch.int32)
        table = torch.zeros(len(rows.tokens), max(len(blocks) for blocks in rows.blocks), dtype=torch.int32)
        for i, blocks in enumerate(rows.blocks):
            table[i, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        slots, positions = rows.slots.to(self.device), rows.positions.to(self.device)
        common = self._common(starts, lengths, table.to(self.device), slots, positions)
        attention = _built(self._apart, common)
        mapping = dict.fromkeys(attention, slots)
        forward = set_forward_context(attention, self._config, num_tokens=len(rows.ids), slot_mapping=mapping)
        with self._no_adapters(len(rows.ids)), forward:
            self._runner.model(
                input_ids=rows.ids.to(self.device), positions=positions, intermediate_tensors=None, inputs_embeds=None
            )

    @contextmanager
    def _no_adapters(self, tokens: int) -> Iterator[None]:
        """A forward of so many tokens by the model itself; afterwards adapters (LoRA) are those of the engine's step again."""
        runner, batch = self._runner, self._runner.input_batch
        if self._config.lora_config is None:
            yield
            return
        runner._set_active_loras((0,), (0,) * tokens, set())
        try:
            yield
        finally:
            if batch.num_reqs:
                runner.set_active_loras(batch, np.diff(runner.query_start_loc.np[: batch.num_reqs + 1]))

    def fold(self, context: Any, wanted: Mapping[str, tuple[Tensor, Tensor]]) -> set[str]:
        """Have the engine's forward that is about to run under `context` compute other tokens than the last ones of requests:
        per request ids int32 [n] at positions int64 [n], ascending, n being the tokens that it is scheduled with.

        Every run of positions becomes a sequence of its own on the request's blocks. Returns the requests for which it is so:
        none where the forward is captured whole, cut in two, in an order that short sequences would break, or fed otherwise.
        """
        runner = self._runner
        if (
            context.cudagraph_runtime_mode.name == "FULL"
            or context.ubatch_slices is not None
            or not isinstance(context.attn_metadata, dict)
            or any(builder.reorder_batch_threshold is not None for _, builder in self._folded)
            or runner.supports_mm_inputs
            or runner.enable_prompt_embeds
        ):
            return set()
        batch, taken = runner.input_batch, set()
        count, total = batch.num_reqs, int(runner.query_start_loc.np[batch.num_reqs])
        ids, positions = runner.input_ids.gpu[:total], runner.positions[:total]
        new_ids, new_positions = ids.clone(), positions.clone()
        edges: list[int] = [0]  # of sequences among the tokens
        owners: list[int] = []  # the request of each
        for i, (a, b) in enumerate(pairwise(runner.query_start_loc.np[: count + 1].tolist())):
            ends, name = [b], batch.req_ids[i]
            if name in wanted:
                mine, at = wanted[name]
                inner = ((at.diff() != 1).nonzero().flatten() + a + 1).tolist()
                as_said = len(at) == b - a and positions[b - 1].item() == at[-1].item() and ids[b - 1].item() == mine[-1].item()
                if as_said and len(owners) + len(inner) + count - i <= self.max_rows:
                    taken.add(name)
                    new_ids[a:b], new_positions[a:b] = mine.to(ids), at.to(positions)
                    ends = [*inner, b]
            edges += ends
            owners += [i] * len(ends)
        if not taken:
            return taken
        offsets = torch.tensor(edges, dtype=torch.int32)
        blocks = batch.block_table[0]
        table = blocks.get_device_tensor(count)[torch.tensor(owners, device=self.device)]
        tokens = offsets.diff()
        row = torch.repeat_interleave(torch.arange(len(owners)), tokens.long()).to(self.device)
        slots = table[row, new_positions // blocks.block_size].long() * blocks.block_size + new_positions % blocks.block_size
        lengths = new_positions.cpu()[offsets[1:].long() - 1].int() + 1
        common = self._common(offsets, lengths, table, slots, new_positions)
        built = _built(self._folded, common)
        ids.copy_(new_ids)
        positions.copy_(new_positions)
        for given in {x.data_ptr(): x for x in context.slot_mapping.values()}.values():
            given[:total] = slots
        context.attn_metadata.update(built)
        return taken

    def _common(self, starts: Tensor, lengths: Tensor, table: Tensor, slots: Tensor, positions: Tensor) -> Any:
        """vLLM's description of a batch: starts int32 [rows + 1] among its tokens and lengths int32 [rows] of the sequences, on
        the CPU; table int32 [rows, blocks], slots and positions [tokens], on the device.
        """
        from vllm.v1.attention.backend import CommonAttentionMetadata

        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(self.device),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=len(lengths),
            num_actual_tokens=len(slots),
            max_query_len=int(starts.diff().max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=table,
            slot_mapping=slots,
            causal=True,
            is_prefilling=torch.ones(len(lengths), dtype=torch.bool),
            positions=positions,
        )


def _built(groups: Sequence[tuple[Sequence[str], Any]], common: Any) -> dict[str, Any]:
    """Attention metadata of every layer; those of a group share theirs."""
    return {name: metadata for names, builder in groups for metadata in [builder.build(0, common)] for name in names}

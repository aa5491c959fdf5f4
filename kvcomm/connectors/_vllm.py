"""The connector that vLLM sees. Translates its calls for the scheduler's side (`Desk`) and the workers' (`Worker`).

Holds no method of its own: what is matched, planned, promised, rotated, computed and kept is decided elsewhere.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA

from kvcomm.connectors import vllm_compat as compat
from kvcomm.connectors.advising import Adviser, Lens
from kvcomm.connectors.capture import Keeper
from kvcomm.connectors.costs import measure
from kvcomm.connectors.holes import HolePass
from kvcomm.connectors.identity import weights
from kvcomm.connectors.loading import Loader
from kvcomm.connectors.pages import Pages
from kvcomm.connectors.scheduling import Desk
from kvcomm.connectors.selftest import try_engine, try_fold, try_holes
from kvcomm.connectors.settings import Settings
from kvcomm.connectors.stats import Exporter, Stats, summary
from kvcomm.connectors.worker import Refusing, Worker
from kvcomm.errors import KVCommError, UnsupportedModel
from kvcomm.store.memory import MemoryStore

__all__ = ["KVCommConnector"]


class KVCommConnector(KVConnectorBase_V1, SupportsHMA):
    """Shares KV among the requests of one engine. One object in the scheduler's process, one in each worker's."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Raises UnsupportedModel for an engine that cannot be served and InputError for settings that cannot be used."""
        super().__init__(vllm_config, role, kv_cache_config)
        settings = Settings.from_extra(self._kv_transfer_config.kv_connector_extra_config)
        compat.check_version(untested=settings.untested_vllm)
        if reason := compat.engine_refusal(vllm_config, kv_cache_config):
            raise UnsupportedModel(f"{vllm_config.model_config.model} cannot share its KV: {reason}")
        self._settings = settings
        self._ranks = vllm_config.parallel_config.tensor_parallel_size
        self._fingerprint = compat.fingerprint(vllm_config)
        if settings.server is not None:
            if self._ranks > 1:
                raise UnsupportedModel(f"{self._ranks} ranks keep different heads: with a server, use one rank or leave it out")
            model = vllm_config.model_config
            self._fingerprint += f" {weights(model.model, model.revision)}"
        self._stats = Stats()
        if role == KVConnectorRole.SCHEDULER:
            texts = settings.store(wait_ms=0.0, reads_kv=False)  # a scheduler must not wait
            self.desk = Desk(
                settings,
                self._fingerprint,
                ranks=self._ranks,
                step_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
                max_rows=vllm_config.scheduler_config.max_num_seqs,
                block_size=kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
                prefix_caching=bool(vllm_config.cache_config.enable_prefix_caching),
                shared=None if texts is None else texts.index,
            )
        else:
            self.worker: Worker | Refusing = Refusing("the engine has not shown its cache")

    # -- the scheduler's side -------------------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        self.desk.arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.desk.promised(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.desk.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        return self.desk.step(scheduler_output.num_scheduled_tokens, self._blocks_of)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        needed, report = self.desk.finished(request, block_ids)
        return needed, None if report is None else {"kvcomm": summary(report)}

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def update_connector_output(self, connector_output: Any) -> None:
        if connector_output.kv_connector_worker_meta is not None:
            self.desk.heard(connector_output.kv_connector_worker_meta)

    def reset_cache(self) -> bool:
        self.desk.reset()
        return True

    def _blocks_of(self, request_id: str) -> list[int]:
        blocks: list[int] = self._kv_cache_manager.get_block_ids(request_id)[0]
        return blocks

    # -- the workers' side ----------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: Any) -> None:
        """The cache exists, and is empty: try what will be needed, and answer densely for ever where it does not work."""
        config, cache = self._vllm_config, self._kv_cache_config
        try:
            size = cache.kv_cache_groups[0].kv_cache_spec.block_size
            pages = Pages(compat.layer_caches(config, kv_caches, cache.num_blocks), size)
            runner = compat.Runner(config)
            rope = try_engine(config.model_config.hf_text_config, pages, runner, config.model_config.max_model_len)
            holes = HolePass(runner, size)
            try_holes(pages, holes)
            costs = measure(pages, rope, holes, min(runner.max_tokens, config.model_config.max_model_len))
        except Exception as error:  # noqa: BLE001  # whatever it was, the engine itself is well
            known = isinstance(error, KVCommError)
            compat.log.error("kvcomm: this engine cannot be served: %s", error, exc_info=not known)
            self.worker = Refusing(str(error) if known else repr(error))
            return
        settings, alone = self._settings.config, self._ranks == 1
        store = self._settings.store(wait_ms=0.0) or MemoryStore(settings.store_bytes // self._ranks)
        keeper, adviser = Keeper(pages, store), None
        if alone and settings.anchors != "off":
            adviser = Adviser(Lens(self._fingerprint, rope, runner), store, keeper, settings)
        proof = partial(try_fold, pages, holes)
        never = config.model_config.max_model_len  # a prompt has no more tokens
        self.worker = Worker(
            Loader(pages, rope, store),
            keeper,
            holes,
            store,
            proof,
            adviser,
            least_gain=never if costs.least_gain is None else costs.least_gain,
            alone=alone,
            shared=self._settings.server is not None,
        )
        compat.log.log(logging.WARNING if costs.least_gain is None else logging.INFO, "kvcomm: %s", costs)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.worker.before_forward(self._get_connector_metadata(), forward_context)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything was loaded before the forward."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Everything is saved after the forward."""

    def wait_for_save(self) -> None:
        self.worker.after_forward(self._get_connector_metadata())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return self.worker.finished() or None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker.bad_blocks()

    def build_connector_worker_meta(self) -> Any:
        return self.worker.news()

    # -- numbers --------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> Stats | None:
        if not hasattr(self, "desk"):
            return None
        return self._stats.since(self.desk.counters)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        return Stats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> Exporter:
        return Exporter(metric_types, labelnames, per_engine_labelvalues)

"""A real vLLM engine on a tiny random Llama, and what its answers must be: a Hugging Face forward with hand-made past KV. And
`kvcomm vllm` as a server.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcomm.connectors.local import LocalEngine
from kvcomm.plain import PlainKV
from kvcomm.segments import Plan
from kvcomm.testing import tiny_random
from kvcomm.tiny import FOLDER

# Before vLLM is imported, here and in the subprocesses of tests.
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # everything in this process: tests look inside
    VLLM_HOST_IP="127.0.0.1",
    VLLM_NO_USAGE_STATS="1",
)

VOCABULARY = 512
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024,
        },
    },
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # vLLM's own, of which there are many


def random_model(folder: Path, rope: str = "default") -> Any:
    """A tiny Llama, saved to `folder`, with a head size that vLLM's CPU kernels take."""
    model = tiny_random(
        "llama", hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=VOCABULARY, max_position_embeddings=4096,
        initializer_range=0.08, **ROPES[rope],
    )  # fmt: skip
    model.save_pretrained(folder)
    return model


@dataclass
class Oracle:
    """What a model answers where K/V is put together by hand. Rotates by its own arithmetic, in double precision."""

    model: Any
    _dense: dict[bytes, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def kv(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values of a dense forward: [layers, heads, tokens, dim]."""
        from transformers import DynamicCache

        name = np.asarray(ids, dtype=np.int32).tobytes()
        if name not in self._dense:
            cache: Any = DynamicCache()
            self.model(torch.tensor([list(ids)]), past_key_values=cache, use_cache=True)
            self._dense[name] = (
                torch.stack([layer.keys[0] for layer in cache.layers]),
                torch.stack([layer.values[0] for layer in cache.layers]),
            )
        return self._dense[name]

    def turned(self, keys: Tensor, tokens: int) -> Tensor:
        """Keys moved by `tokens` positions."""
        angle = tokens * self.model.model.rotary_emb.inv_freq.double()
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = keys.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def placed(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Keys of position 0 [tokens, heads * dim], brought to `positions`: [heads, tokens, dim]."""
        angle = torch.outer(positions.double(), self.model.model.rotary_emb.inv_freq.double())
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = rows.view(len(rows), self.model.config.num_key_value_heads, -1).transpose(0, 1).chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    @torch.no_grad()
    def answer(
        self, ids: Sequence[int], plan: Plan | None = None, new: int = 8, added: Mapping[int, PlainKV] | None = None
    ) -> tuple[list[int], Tensor]:
        """Greedy tokens, and the log-probabilities of the first, with the prompt's K/V put together as `plan` says, from dense
        K/V of what its segments stood in: reused runs are appended, the others computed, one after the other. `added`: by the
        position of a span, what is added to the K/V of its tokens that are reused.
        """
        from transformers import DynamicCache

        cache, computed = DynamicCache(), np.ones(len(ids), dtype=bool)
        source = np.full(len(ids), -1)
        for i, span in enumerate(() if plan is None else plan.spans):
            assert span.segment.exact, "the oracle knows dense K/V only"
            source[span.start : span.end] = i
        if plan is not None:
            computed[:] = False
            computed[plan.recompute] = True
        source[computed] = -1
        edges = [0, *(np.flatnonzero(np.diff(source)) + 1).tolist(), len(ids)]
        logits = torch.empty(0)
        for start, end in pairwise(edges):
            if source[start] < 0:
                where = torch.arange(start, end)[None]
                out = self.model(
                    torch.tensor([list(ids[start:end])]), past_key_values=cache, use_cache=True, position_ids=where
                )
                logits = out.logits[0, -1]
                continue
            assert plan is not None
            span = plan.spans[source[start]]
            old = span.segment.start + span.offset + start - span.start
            keys, values = self.kv([*span.segment.context.tolist(), *span.segment.ids.tolist()])
            part = slice(old, old + end - start)
            more = (added or {}).get(span.start)
            for layer in range(len(keys)):
                k, v = self.turned(keys[layer, :, part], start - old), values[layer, :, part]
                if more is not None:
                    which = slice(start - span.start, end - span.start)
                    k = k + self.placed(more.keys[layer][which], torch.arange(start, end))
                    v = v + more.values[layer][which].view(end - start, len(v), -1).transpose(0, 1)
                cache.update(k[None], v[None], layer)
        first, tokens = logits.log_softmax(-1), []
        for i in range(new):
            tokens.append(int(logits.argmax()))
            at = torch.tensor([[len(ids) + i]])
            logits = self.model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True, position_ids=at).logits[
                0, -1
            ]
        return tokens, first


@dataclass
class Engine:
    """One engine in this process, and how each of its requests was served."""

    llm: Any
    oracle: Oracle
    served: dict[str, Plan] = field(default_factory=dict)  # external id of a request -> as it was computed

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def desk(self) -> Any:
        return self.scheduler.connector.desk

    @property
    def worker(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().worker

    def watch(self) -> None:
        """Note every request's plan when it finishes."""
        finished = self.desk.finished

        def noting(request: Any, blocks: list[int]) -> Any:
            state = self.desk._requests.get(request.request_id)
            if state is not None:
                self.served[request.request_id.rpartition("-")[0] or request.request_id] = state.plan
            return finished(request, blocks)

        self.desk.finished = noting

    def ask(
        self,
        *prompts: Sequence[int],
        new: int = 8,
        salts: Sequence[str | None] = (),
        adapter: Any = None,
        stop: int | None = None,
        **kvcomm: Any,
    ) -> list[Any]:
        """All at once; outputs in order. `stop`: the token that ends an answer. `kvcomm` is what the requests say to the
        connector.
        """
        from vllm import SamplingParams

        inputs: list[dict[str, Any]] = [{"prompt_token_ids": list(ids)} for ids in prompts]
        for given, salt in zip(inputs, salts, strict=False):
            if salt is not None:
                given["cache_salt"] = salt
        extra = {"extra_args": {"kv_transfer_params": {"kvcomm": kvcomm}}} if kvcomm else {}
        params = SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=20,
            stop_token_ids=None if stop is None else [stop], **extra,
        )  # fmt: skip
        outputs: list[Any] = self.llm.generate(inputs, params, use_tqdm=False, lora_request=adapter)
        return outputs

    def plan(self, output: Any) -> Plan:
        return self.served[output.request_id]

    def error(
        self, output: Any, plan: Plan | None = None, added: Mapping[int, PlainKV] | None = None, greedy: bool = True
    ) -> float:
        """Distance of an output from the oracle: the largest difference among the top-20 log-probabilities of its first token;
        infinite where its greedy tokens differ, unless `greedy` is false (where rounding decides between two near ones).
        """
        ours = list(output.outputs[0].token_ids)
        tokens, first = self.oracle.answer(output.prompt_token_ids, plan, len(ours), added)
        if greedy and ours != tokens:
            return float("inf")
        said = output.outputs[0].logprobs[0]
        return max(abs(first[token].item() - float(one.logprob)) for token, one in said.items())

    def check(self, *outputs: Any) -> None:
        """Every output is what the oracle says for the plan that served it."""
        for output in outputs:
            assert self.error(output, self.plan(output)) < 1e-4


@pytest.fixture(scope="session")
def start_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Iterator[Engine]]:
    """A function that runs one engine for as long as its generator is open; there can be one at a time. Not `inside`: in
    processes of its own, where nobody can look. `model`: a folder, instead of a random one.
    """
    pytest.importorskip("vllm")

    def start(
        rope: str = "default",
        extra: dict[str, Any] | None = None,
        policy: str = "recompute",
        inside: bool = True,
        model: Path | None = None,
        **options: Any,
    ) -> Iterator[Engine]:
        folder = model or tmp_path_factory.mktemp("model")
        oracle = Oracle(None if model else random_model(folder, rope))
        options = {"dtype": "float32", "max_model_len": 2048, "max_num_seqs": 32, "max_num_batched_tokens": 2048, **options}
        extra = {"least_gain": 32, **(extra or {})}
        local = LocalEngine.start(str(folder), tokens=options.pop("max_model_len"), extra=extra, policy=policy, **options)
        engine = Engine(local.llm, oracle)
        if inside:
            engine.watch()
        engine.ask(list(range(3, 40)))  # from now on it is ready
        yield engine
        del engine
        local.close()

    return start


@pytest.fixture(scope="module")
def engine(start_engine: Callable[..., Iterator[Engine]]) -> Iterator[Engine]:
    """The usual engine of a module."""
    yield from start_engine()


@pytest.fixture
def text() -> Callable[[int], list[int]]:
    """Random token ids, other ones in every test."""
    rng = np.random.default_rng()

    def some(tokens: int) -> list[int]:
        ids: list[int] = rng.integers(3, VOCABULARY, tokens).tolist()
        return ids

    return some


@dataclass(frozen=True)
class Server:
    """`kvcomm vllm` as a user runs it: the embedded model behind the OpenAI API, in processes of its own."""

    url: str

    def counters(self) -> dict[str, float]:
        """Those of /metrics summed over vLLM's labels, by name and our own label."""
        found: dict[str, float] = {}
        with urlopen(f"{self.url}/metrics", timeout=30) as response:
            for line in response.read().decode().splitlines():
                if parts := re.match(r"([\w:]+_total)\{([^}]*)\} (\S+)", line):
                    ours = re.search(r'(rung|reason|kind)="[^"]*"', parts[2])
                    name = parts[1] + (f"{{{ours[0]}}}" if ours else "")
                    found[name] = found.get(name, 0.0) + float(parts[3])
        return found

    def reused(self) -> float:
        """Prompt tokens reused so far, on every rung."""
        return sum(count for name, count in self.counters().items() if name.startswith("kvcomm:reused_tokens_total"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The one of this run; it writes tool calls where a request's `tool_choice` says so."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--model", str(FOLDER), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    options += ["--kvcomm-config", '{"least_gain": 32}']
    options += ["--max-model-len", "2048", "--host", "127.0.0.1", "--port", str(port)]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "xlam"]
    options += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "kvcomm", "vllm", *options], stdout=out, stderr=out, env=env)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log)
        yield Server(url)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urlopen(f"{url}/health", timeout=1).close()
            return
        except (URLError, OSError):
            time.sleep(0.5)
    pytest.fail(log.read_text()[-4000:])

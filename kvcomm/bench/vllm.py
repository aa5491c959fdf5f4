"""`kvcomm bench vllm`: time to first token of five fully connected agents on a real vLLM, the setting of `kvcomm bench ttft`.

    agent i reads  | its own prefix | shared input | outputs of the agents before it, each behind a header | closing text |

Four arms on the same prompts in one engine, which has prefix caching and the connector:

    dense         nothing is cached: a cache salt of its own, and kvcomm leaves it alone
    prefix_cache  vLLM's prefix cache has seen the agent's own prefix; kvcomm leaves it alone
    shared        kvcomm, as a tenant of its own that has seen the agents' prefixes, the prompts and the outputs before
    exact_hit     vLLM's prefix cache has seen this very prompt, which is then asked for again

The order of the arms changes, but for exact_hit, which follows dense. Times run from the call to the first token, everything
included. An output is given; its K/V is computed in its producer's context by a request of its own, which nobody times.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from kvcomm.backends.loading import dtype_named
from kvcomm.bench import ttft
from kvcomm.connectors.local import LocalEngine, need_vllm
from kvcomm.report import document, dumps, write_json
from kvcomm.segments import ReuseReport

__all__ = ["add_arguments", "measure", "run"]

ARMS = ("dense", "prefix_cache", "shared", "exact_hit")
OFF = {"mode": "off"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `kvcomm bench ttft`."""
    ttft.add_arguments(parser)
    parser.set_defaults(model="random:1024x12x16x8")


class Arms:
    """One prompt under every arm. A method named for an arm returns its milliseconds."""

    def __init__(self, engine: LocalEngine, prompt: ttft.Prompt, tenant: str) -> None:
        self.engine, self.prompt, self.tenant = engine, prompt, tenant
        self.said: ReuseReport | None = None

    def dense(self) -> dict[str, float]:
        alone = f"dense, {self.tenant}, {len(self.prompt.ids)}"
        return {arm: self.engine.ask(self.prompt.ids, tenant=alone, words=OFF).first_ms for arm in ("dense", "exact_hit")}

    def prefix_cache(self) -> dict[str, float]:
        alone = f"prefix, {self.tenant}, {len(self.prompt.ids)}"
        self.engine.ask(self.prompt.prefix, tenant=alone, words=OFF)
        return {"prefix_cache": self.engine.ask(self.prompt.ids, tenant=alone, words=OFF).first_ms}

    def shared(self) -> dict[str, float]:
        reply = self.engine.ask(self.prompt.ids, tenant=self.tenant, new=2)
        self.said = reply.report
        return {"shared": reply.first_ms}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns its JSON document. Raises InputError where vLLM is missing."""
    need_vllm()
    answer_tokens = next((int(x) for x in args.output if x.isdigit()), 512)
    longest = args.prefix + args.input + args.agents * (answer_tokens + 5) + 64
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model.startswith("random:"):
            ttft.random_model(model, dtype_named(args.dtype)).model.save_pretrained(folder)
            model = folder
        engine = LocalEngine.start(model, dtype=args.dtype, tokens=longest, seed=args.seed, quiet=args.quiet)
    team = ttft.prompts(args, answer_tokens, engine.vocabulary)
    times: list[dict[str, list[float]]] = [{arm: [] for arm in ARMS} for _ in team]
    said: list[ReuseReport | None] = [None for _ in team]
    rng = random.Random(args.seed)
    with tqdm(total=args.repetitions * len(team), disable=args.quiet, leave=False) as bar:
        for repetition in range(-1, args.repetitions):  # the first one, of two agents, is a warm-up
            tenant = f"team {repetition}"
            for prompt in team:
                engine.ask(prompt.prefix, tenant=tenant, new=2)
            for i, prompt in enumerate(team[:2] if repetition < 0 else team):
                arms = Arms(engine, prompt, tenant)
                for arm in rng.sample(("dense", "prefix_cache", "shared"), 3):
                    for name, ms in getattr(arms, arm)().items():
                        if repetition >= 0:
                            times[i][name].append(ms)
                said[i] = arms.said
                engine.ask([*prompt.ids, *prompt.answer], tenant=tenant, new=2)
                bar.update(repetition >= 0)
    version = engine.version
    engine.close()
    agents = [
        {
            "agent": i + 1,
            "prompt_tokens": len(team[i].ids),
            **{name: getattr(said[i], name) for name in ("reused_tokens", "computed_tokens", "tokens_by_rung", "fallback")},
            **{f"{arm}_ms": median(ms) for arm, ms in times[i].items()},
            "all_ms": times[i],
        }
        for i in range(len(team))
    ]
    return document(
        "kvcomm.bench.vllm/1",
        vllm_version=version,
        model=args.model,
        dtype=args.dtype,
        prefix_tokens=args.prefix,
        input_tokens=args.input,
        output_tokens=answer_tokens,
        repetitions=args.repetitions,
        agents=agents,
        later_agents=ttft.ratios(agents[1:]),
    )


def run(args: argparse.Namespace) -> int:
    doc = measure(args)
    if args.format == "json":
        print(dumps(doc))
    else:
        print(f"vLLM {doc['vllm_version']}, {doc['model']}, {doc['dtype']}; median of {doc['repetitions']}, ms to first token")
        print(f"{'agent':>6} {'tokens':>7} {'reused':>7} {'dense':>9} {'prefix cache':>13} {'shared':>8} {'exact hit':>10}")
        for a in doc["agents"]:
            print(
                f"{a['agent']:>6} {a['prompt_tokens']:>7} {a['reused_tokens']:>7} {a['dense_ms']:>9.1f} "
                f"{a['prefix_cache_ms']:>13.1f} {a['shared_ms']:>8.1f} {a['exact_hit_ms']:>10.1f}"
            )
        if doc["later_agents"]:
            print(ttft.worst(doc["later_agents"]))
    for folder in (Path(x) for x in args.output if not x.isdigit()):
        write_json(folder / "vllm.json", doc)
    return 0

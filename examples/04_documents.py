"""Documents are prefilled ahead of any request, alone, without the header that each prompt will put in front of them.

What is true of a document depends on that header: its KV, used as it is, would not know whose city it names. The first requests
are computed, and leave anchors behind; from then on only the few tokens that the header changes are computed again.

Run it: python examples/04_documents.py
"""

import random

from kvcomm import KVComm
from kvcomm.tiny import tasks
from kvcomm.tiny.words import RETRIEVAL


def contents(rng: random.Random, documents: int) -> list[tuple[str, str]]:
    """City and text of each document."""
    out = []
    for city in rng.sample(RETRIEVAL.values["city"], documents):
        sentences = [tasks.filler(rng) for _ in range(20)]
        sentences.insert(rng.randrange(20), f"city is {city} .")
        out.append((city, " " + " ".join(sentences)))
    return out


def main() -> None:
    rng = random.Random(1)
    comm = KVComm.from_pretrained()
    documents = contents(rng, 5)
    for _, text in documents:
        comm.prefill(text)

    for _ in range(10):
        owners = rng.sample(RETRIEVAL.owners, len(documents))
        texts = " ".join(f"report about {owner} :{text}" for owner, (_, text) in zip(owners, documents, strict=True))
        messages = [
            {"role": "system", "content": tasks.role_text("clerk", "plain")},
            {"role": "user", "content": f"{texts} questions : city of {owners[2]} ? {tasks.CLOSING}"},
        ]
        out = comm.generate(messages, agent="clerk", max_new_tokens=16, do_sample=False)
        how = out.report.fallback or f"{out.report.reuse_rate:.0%} reused"
        right = "right" if documents[2][0] in out.text else "WRONG"
        print(f"{out.text:24} {right}  {how:12} {out.ttft_ms:4.0f} ms, {len(comm.anchors)} anchors known")


if __name__ == "__main__":
    main()

"""Two agents read the same reports; the second one's model computes only what it has not seen.

Run it: python examples/01_generate.py
"""

from kvcomm import KVComm

REPORTS = [
    "report about bob : city is oslo . pet is cat . food is rice . the old river waits slowly .",
    "report about carol : city is lima . boss is bob . the small market opens early . color is blue .",
    "report about dan : pet is owl . the busy train moves again . boss is carol . food is soup .",
    "report about erin : city is rome . color is red . the warm garden rests today . code is 4 2 .",
]
ROLE = "you are the {} , a careful agent of the team . your style is {} . use only what is said below ."
ASK = "questions : {} now write the final answer in the style of your role only ."


def main() -> None:
    comm = KVComm.from_pretrained()  # the embedded model; any Hugging Face id or folder goes here

    for agent, style, reports, question in (
        ("scout", "plain", REPORTS, "city of bob ? food of dan ?"),
        ("critic", "loud", REPORTS[::-1], "color of erin ? city of carol ?"),  # other role, other order, other question
    ):
        messages = [
            {"role": "system", "content": ROLE.format(agent, style)},
            {"role": "user", "content": " ".join([*reports, ASK.format(question)])},
        ]
        output = comm.generate(messages, agent=agent, max_new_tokens=32, do_sample=False)
        report = output.report
        print(f"{agent}: {output.text}")
        print(f"  {report.reused_tokens} of {report.prompt_tokens} tokens reused, first token after {output.ttft_ms:.1f} ms")
        for span in report.spans:
            print(f"  [{span.start:3}, {span.end:3})  {span.rung}, computed for {span.producer}, moved by {span.moved_tokens}")


if __name__ == "__main__":
    main()

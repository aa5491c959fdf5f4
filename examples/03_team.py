"""A team of five agents from a file, run on one shared KV-cache.

Run it: python examples/03_team.py
"""

from pathlib import Path

from kvcomm import KVComm
from kvcomm.agents.team import Team

REQUEST = {  # a field per slot of the templates in team.yaml
    "input": (
        "report about bob : city is oslo . pet is cat . food is rice . the old river waits slowly . "
        "report about carol : city is lima . boss is bob . the small market opens early . color is blue . "
        "report about dan : pet is owl . the busy train moves again . boss is carol . food is soup . "
        "report about erin : city is rome . color is red . the warm garden rests today . code is 4 2 ."
    ),
    "scout": "note a : city of bob ?",
    "analyst": "note b : food of dan ?",
    "writer": "color of erin ? note a ?",
    "critic": "note c : city of boss of dan ?",
    "judge": "note a ? note c ? pet of bob ?",
}


def main() -> None:
    team = Team.from_yaml(Path(__file__).with_name("team.yaml"))
    print(team.graph(), end="\n\n")

    run = team.run(KVComm.from_pretrained(), REQUEST)
    for turn in run.turns:
        report = turn.output.report
        print(f"{turn.agent:8} {turn.output.text}")
        print(f"         {report.reused_tokens} of {report.prompt_tokens} prompt tokens reused, {turn.wall_ms:.0f} ms in all")
    print(f"\nthe team's answer: {run.answer}")


if __name__ == "__main__":
    main()

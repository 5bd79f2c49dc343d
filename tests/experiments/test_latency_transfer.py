"""What the study of unseen GPUs says of the families it leaves out."""

import runpy
from pathlib import Path

STUDY = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "latency_transfer" / "run.py"))
SYSTEMS = ["a100", "b200", "gb200", "h100"]


def test_systems_of_a_group_are_one_family_and_all_others_their_own():
    assert STUDY["families_of"](SYSTEMS, "b200, b300,gb200;;h100,h200") == {
        "a100": "a100",
        "b200": "b200",
        "gb200": "b200",
        "h100": "h100",
    }


def test_names_that_are_in_no_table_are_told():
    groups = "b200,gb20;h100,h200"
    families = STUDY["families_of"](SYSTEMS, groups)
    said = STUDY["told"](families, groups)
    assert "left out together: a100; b200; gb200; h100\n" in said
    assert said.endswith("of no effect: gb20, h200")
    assert "no effect" not in STUDY["told"](families, "b200,gb200")

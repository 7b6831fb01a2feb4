"""Writes the table of transformers' families in docs/transformers.md from the results of their tests.

pytest tests/test_transformers*.py --junitxml=results.xml
python tests/family_table.py results.xml docs/transformers.md
"""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

BEGIN, END = "<!-- families: tests/family_table.py -->", "<!-- end of families -->"
COLUMNS = {"test_experts_class": "experts", "test_model": "model", "test_routers": "router", "test_replace": "replace"}


def results(path):
    """Passed or failed of each family, by column; of several classes in a family the worst."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        match = re.fullmatch(r"(\w+)\[(.+?)\]", case.get("name", ""))
        own = match and match[1] in COLUMNS and case.get("classname", "").rpartition(".")[2] != "test_transformers"
        if not own or case.find("skipped") is not None:
            continue
        family, _, rest = match[2].replace("nllb-moe", "nllb_moe").partition("-")
        family = family.removesuffix("_text")
        good = {"True": "route", "False": "left alone"}.get(rest, "yes")
        failed = case.find("failure") is not None or case.find("error") is not None
        row = found.setdefault(family, {})
        column = COLUMNS[match[1]]
        row[column] = "FAILED" if failed or row.get(column) == "FAILED" else good
    return found


def table(found):
    names = list(COLUMNS.values())
    lines = ["| family | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for family, row in sorted(found.items()):
        lines.append(f"| {family} | " + " | ".join(row.get(name, "") for name in names) + " |")
    return "\n".join(lines)


def main(source, target):
    text = Path(target).read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        sys.exit(f"{target}: no lines {BEGIN} and {END}")
    Path(target).write_text(f"{before}{BEGIN}\n{table(results(source))}\n{END}{after}")


if __name__ == "__main__":
    main(*sys.argv[1:])

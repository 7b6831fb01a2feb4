"""Writes what was tested of transformers' families into the README, docs/transformers.md and docs/routing.md, from the
results.

pytest --long tests/test_transformers*.py --junitxml=results.xml -o junit_family=xunit1
python tests/family_table.py results.xml README.md docs/transformers.md docs/routing.md
"""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

COLUMNS = {
    "test_experts_class": "experts", "test_model": "float32", "test_bfloat16": "bfloat16", "test_routers": "router",
    "test_replace": "replace",
}  # fmt: skip
ORDER = ("class", "experts", "float32", "bfloat16", "text", "router", "replace")


def results(path):
    """Passed or failed of each family, by column; of several classes in a family the worst. What the tests recorded
    as properties stands beside it: the model's class, its text, and the options of its router."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        match = re.fullmatch(r"(\w+)\[(.+?)\]", case.get("name", ""))
        own = match and match[1] in COLUMNS and case.get("classname", "").rpartition(".")[2] != "test_transformers"
        if not own or case.find("skipped") is not None:
            continue
        row = found.setdefault(match[2].partition("-")[0], {})
        column = COLUMNS[match[1]]
        failed = case.find("failure") is not None or case.find("error") is not None
        recorded = {each.get("name"): each.get("value") for each in case.iter("property")}
        good = recorded.pop("router", "yes")
        row[column] = "FAILED" if failed or row.get(column) == "FAILED" else good
        row |= recorded
    return found


def families(found):
    lines = ["| family | " + " | ".join(ORDER) + " |", "| --- |" + " --- |" * len(ORDER)]
    for family, row in sorted(found.items()):
        lines.append(f"| {family} | " + " | ".join(row.get(name, "") for name in ORDER) + " |")
    return "\n".join(lines)


def in_short(found):
    """Families by the line of code that serves them."""
    served = {"`enable(model, router=True)`": [], "`enable(model)`": [], "`replace(model)`": [], "not yet": []}
    for family, row in sorted(found.items()):
        if "FAILED" in row.values():
            served["not yet"].append(family)
        elif row.get("replace") == "yes":
            served["`replace(model)`"].append(family)
        else:
            also = row.get("router") == "route"
            served["`enable(model, router=True)`" if also else "`enable(model)`"].append(family)
    lines = ["| served by | families |", "| --- | --- |"]
    lines += [f"| {how} | {', '.join(names)} |" for how, names in served.items() if names]
    return "\n".join(lines)


def routers(found):
    """Families by what their router is in the options of route."""
    by_options = {}
    for family, row in sorted(found.items()):
        if "options" in row:
            by_options.setdefault(row["options"], []).append(family)
    lines = ["| router | families |", "| --- | --- |"]
    for options, names in sorted(by_options.items(), key=lambda pair: (not pair[0].startswith("`"), -len(pair[1]))):
        lines.append(f"| {options} | {', '.join(names)} |")
    return "\n".join(lines)


def write(target, begin, end, table):
    before, _, rest = Path(target).read_text().partition(begin)
    _, _, after = rest.partition(end)
    if not rest or not after:
        sys.exit(f"{target}: no lines {begin} and {end}")
    Path(target).write_text(f"{before}{begin}\n{table}\n{end}{after}")


def main(source, readme, transformers, routing):
    found = results(source)
    write(readme, "<!-- families: tests/family_table.py -->", "<!-- end of families -->", in_short(found))
    write(transformers, "<!-- families: tests/family_table.py -->", "<!-- end of families -->", families(found))
    write(routing, "<!-- routers: tests/family_table.py -->", "<!-- end of routers -->", routers(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

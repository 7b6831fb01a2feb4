"""The command torch-moe-ops: `python -m moe_ops`, and what it cannot say.

Lives outside the package, as an unrelated project on PyPI installs a `moe_ops` too, over ours or in front of it.
"""

from importlib.metadata import PackageNotFoundError, packages_distributions, version
from types import ModuleType

DISTRIBUTION = "torch-moe-ops"
PUBLIC = ("route", "plan", "permute", "grouped_gemm", "combine", "dispatch", "moe_mlp", "reference")


def installed(distribution: str) -> str:
    """The version of a distribution, or a word that there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def foreign(moe_ops: ModuleType) -> list[str]:
    """What tells that the moe_ops that was imported is not ours, or shares its folder with another; one text each."""
    place = moe_ops.__file__ or "an unknown place"
    missing = [name for name in PUBLIC if not hasattr(moe_ops, name)]
    found = []
    if missing:
        found.append(f"the moe_ops imported from {place} is not {DISTRIBUTION}: it has no {', '.join(missing)}")
    return found + neighbours()


def neighbours() -> list[str]:
    """The other distributions that install a moe_ops; one text each."""
    return [
        f"the distribution {other} {installed(other)} installs files as moe_ops too: run `pip uninstall {other}`, "
        f"then `pip install --force-reinstall --no-deps {DISTRIBUTION}`"
        for other in sorted(set(packages_distributions().get("moe_ops", [])) - {DISTRIBUTION})
    ]


def main() -> int:
    """The report of our moe_ops; where it cannot be had, what stands in the way. 1 if something is wrong."""
    problems = []
    try:
        import moe_ops

        problems = foreign(moe_ops)
        from moe_ops.__main__ import main as report

        return report()
    except Exception as error:  # whatever a foreign package does
        problems = [*(problems or neighbours()), f"{type(error).__name__}: {error}"]
    for problem in problems:
        print(f"PROBLEM: {problem}")
    return 1

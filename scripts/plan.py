"""Says whether a configuration fits a slice, without the slice.

    python scripts/plan.py --config configs/qwen3_8b.py --topology v5e:4x4 [--mesh fsdp=8,tensor=2]
    python scripts/plan.py --config configs/qwen3_8b.py --search [--topology v5e,v6e]
    python scripts/plan.py --table > docs/hardware.md

Compiles the real train step, sampler and teacher refresh for the slice (TPUs need libtpu: pip
install '.[plan]'; GPUs and CPUs are compiled for the host platform) and prints the memory of each
part and phase, what would make it fit, and the least time that peaks allow. Verdicts are kept in
the user's cache folder. Exit codes: 0 fits, 1 does not fit, 2 bad input.
"""

import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a plan touches no accelerator
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from opsdc_jax import cli, config, sharding
from opsdc_jax.planner import plan, search, text, topology
from opsdc_jax.planner.changes import changes

_FAMILIES = ("v5e", "v6e", "v5p")
_CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def main(argv: Sequence[str]) -> int:
    """Parses, plans or searches, prints."""
    if "--table" in argv or "--table=true" in argv:
        return table(argv)
    values = cli.config_flag_values(argv)
    define = {"flag_values": values}
    flags.DEFINE_string(
        "topology",
        None,
        "v5e:4x4, gpu:8xH200, cpu:8; with --search v5e,v6e",
        **define,
    )
    flags.DEFINE_string("mesh", None, "in place of config.mesh: fsdp=8,tensor=2", **define)
    flags.DEFINE_bool("json", False, "print one JSON object a line", **define)
    flags.DEFINE_bool("search", False, "find the smallest slices and meshes that fit", **define)
    flags.DEFINE_bool("table", False, "print docs/hardware.md: a search for every size", **define)
    args = cli.parse(values, argv)
    config.validate(args.config)
    if args.mesh and args.search:
        raise config.InputError("--search tries meshes of its own: leave out --mesh")
    if args.mesh:
        set_mesh(args.config, args.mesh)
    if args.search:
        families = args.topology.split(",") if args.topology else _FAMILIES
        slices = {family: candidates(family) for family in families}  # of all, before any search
        return min([find(args.config, *item, args.json) for item in slices.items()])
    if not args.topology:
        raise config.InputError("--topology is required, for instance --topology v5e:4x4")
    made = plan.make_plan(args.config, topology.parse(args.topology))
    return show(made, changes(made, args.config), args.json)


def show(made: plan.Plan, wanted: Sequence[str], as_json: bool) -> int:
    """Prints one plan; 0 if it fits."""
    print(json.dumps(text.as_json(made, wanted)) if as_json else text.as_text(made, wanted))
    return cli.EXIT_DONE if made.fits else cli.EXIT_FAILED


def find(
    settings: ConfigDict, family: str, slices: Sequence[topology.Topology], as_json: bool
) -> int:
    """Prints the plan of the smallest slice that holds a configuration; 1 if none does."""
    made = search.smallest(settings, slices, progress)
    if made is None:
        print(f"{settings.model.path} fits no {family} slice", file=sys.stderr)
        return cli.EXIT_FAILED
    return show(made, (), as_json)


def candidates(name: str) -> list[topology.Topology]:
    """The slices that "v5e", "gpu:H200" or "v5e:4x4" stands for, smallest first."""
    is_slice = name.partition(":")[2][:1].isdigit()
    return [topology.parse(name)] if is_slice else list(topology.slices(name))


def table(argv: Sequence[str]) -> int:
    """Prints docs/hardware.md: the smallest slice of each family for every configuration."""
    values = flags.FlagValues()
    flags.DEFINE_bool("table", True, "as above", flag_values=values)
    cli.parse(values, argv)
    rows = []
    for path in sorted(_CONFIGS.glob("qwen3_*.py"), key=_parameters):
        settings = load(path)
        for family in _FAMILIES:
            made = search.smallest(settings, topology.slices(family), progress)
            if made is not None:
                rows.append((path.name, made))
    print(text.document(rows))
    return cli.EXIT_DONE


def load(path: pathlib.Path) -> ConfigDict:
    """The configuration in a file of configs/."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def _parameters(path: pathlib.Path) -> float:
    """Size of a configuration by its name, to order them: qwen3_0p6b is 0.6."""
    return float(path.stem.removeprefix("qwen3_").removesuffix("b").replace("p", "."))


def set_mesh(settings: ConfigDict, given: str) -> None:
    """Replaces config.mesh by "fsdp=8,tensor=2"; axes not named are 1.

    Raises:
      InputError: not of that form, or no such axis.
    """
    sizes = dict.fromkeys(sharding.MESH_AXES, 1)
    for part in given.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.isdecimal() or not int(size):
            raise config.InputError(
                f"--mesh {given!r}: write AXIS=SIZE,... with axes {', '.join(sizes)} and positive "
                "sizes"
            )
        sizes[axis] = int(size)
    for axis, number in sizes.items():
        settings.mesh[axis] = number


def progress(line: str) -> None:
    """What a search is at, on standard error."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
